"""Equations and inequalities below a ReLU, against the true input and linear programming."""

import numpy as np
import pytest
import torch
from dense import backward, forward_matrix, gradient_matrix, layer_of, null_space, relative
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import linprog
from small_layers import quick
from torch import nn

from gitlight.generators.exact import Estimate, rule_for
from gitlight.generators.exact.bounded import solve_bounded
from gitlight.generators.exact.posterior import Prior

POSITIVE, PIXELS, FREE = (0.0, None), (0.0, 1.0), (None, None)
ROUNDING = 1e-14


class BelowReLU:
    """A layer before a ReLU, exact gradients, and the ReLU's exact output; ``share`` of the inputs are not zero."""

    def __init__(self, module, shape, share, seed, n=3):
        torch.manual_seed(seed)
        self.module, self.shape = module.double(), shape
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        self.rule = rule_for(layer_of(module, shape))
        self.inputs = torch.rand(n, *shape, dtype=torch.float64) * (torch.rand(n, *shape) < share)
        self.outputs = module(self.inputs).detach()
        self.on = self.outputs > 0
        self.delta = torch.randn_like(self.outputs) * self.on
        self.gradient, _ = backward(module, self.inputs, self.delta)

    def solve(self, bounds, prior=None, noise=ROUNDING, output_error=ROUNDING):
        n = len(self.inputs)
        variance = torch.where(self.on, output_error**2, torch.inf).double()
        output = Estimate(self.outputs.clamp_min(0), variance, ~self.on)
        weight, bias = self.module.weight.detach(), self.rule.bias_of({"bias": self.module.bias.detach()})
        noises = torch.full((n,), noise, dtype=torch.float64)
        return solve_bounded(self.rule, self.delta, self.gradient, noises, output, weight, bias, prior, bounds)

    def equations(self, number):
        """All equations of one example as a dense matrix."""
        rows = forward_matrix(self.module, self.shape)[self.on[number].flatten()]
        return torch.cat([gradient_matrix(self.module, self.delta[number], self.shape), rows])

    def width(self, number):
        """How far the inputs that meet all equations and inequalities reach, along random directions."""
        free = null_space(self.equations(number)).numpy()
        if free.shape[1] == 0:
            return 0.0
        truth = self.inputs[number].flatten().numpy()
        off = forward_matrix(self.module, self.shape)[~self.on[number].flatten()].numpy()
        below = -self.outputs[number].flatten()[~self.on[number].flatten()].numpy()
        rows, most = np.concatenate([-free, off @ free]), np.concatenate([truth, below]) + 1e-10
        directions = np.random.default_rng(0).standard_normal((3, free.shape[1]))
        solutions = [linprog(one, rows, most, bounds=(None, None)) for one in (*directions, *-directions)]
        return max(-one.fun if one.status == 0 else np.inf for one in solutions)


def test_a_sparse_input_is_exact_where_inequalities_determine_it():
    case = BelowReLU(nn.Conv2d(2, 5, 3, 2, 1), (2, 8, 8), 0.4, seed=1, n=6)
    assert all(null_space(case.equations(number)).shape[1] > 2 for number in range(6)), "equations alone do not"
    only_one = torch.tensor([case.width(number) < 1e-6 for number in range(6)])
    assert only_one.sum() >= 3
    found, determined = case.solve(POSITIVE)
    assert (determined | ~only_one).all()
    assert relative(found.value[only_one], case.inputs[only_one]) < 1e-9


@quick
@given(
    st.integers(1, 3), st.integers(2, 6), st.integers(2, 3), st.sampled_from([0.1, 0.3, 0.6, 1.0]), st.integers(0, 99)
)
def test_what_is_called_determined_is_exact(channels, outputs, stride, share, seed):
    case = BelowReLU(nn.Conv2d(channels, outputs, 3, stride, 1), (channels, 6, 6), share, seed)
    assume((case.delta != 0).flatten(1).any(dim=1).all())
    found, determined = case.solve(POSITIVE)
    assert (found.value >= 0).all()
    if determined.any():
        assert relative(found.value[determined], case.inputs[determined]) < 1e-3, "but for rounding"


@quick
@given(st.integers(1, 4), st.sampled_from([PIXELS, POSITIVE]), st.sampled_from([ROUNDING, 1e-3]), st.integers(0, 99))
def test_bounds_are_kept_and_exact_equations_met(outputs, bounds, output_error, seed):
    case = BelowReLU(nn.Conv2d(1, outputs, 3, 2, 1), (1, 6, 6), 1.0, seed)
    assume((case.delta != 0).flatten(1).any(dim=1).all())
    found, _ = case.solve(bounds, output_error=output_error)
    assert (found.value >= bounds[0]).all()
    assert bounds[1] is None or (found.value <= bounds[1]).all()
    assert torch.isfinite(found.variance).all()
    for number in range(3 if output_error == ROUNDING else 0):
        matrix, truth = case.equations(number), case.inputs[number].flatten()
        assert relative(matrix @ found.value[number].flatten(), matrix @ truth) < 1e-4


def test_pixels_that_no_equation_meets_are_not_determined():
    # Three columns apart, kernels of two leave every third row and column out.
    case = BelowReLU(nn.Conv2d(1, 8, 2, 3), (1, 6, 6), 0.5, seed=0)
    found, determined = case.solve(POSITIVE, Prior(torch.full((36,), 0.25).double(), torch.eye(36).double()))
    unseen = torch.ones(6, dtype=torch.bool)
    unseen[[0, 1, 3, 4]] = False
    met = ~(unseen[:, None] | unseen[None, :])
    assert not determined.any()
    assert relative(found.value[:, :, met], case.inputs[:, :, met]) < 1e-6
    torch.testing.assert_close(found.value[:, :, ~met], torch.full((3, 1, 20), 0.25).double(), msg="what is expected")


def test_pixels_beyond_the_last_whole_patch_are_not_determined():
    case = BelowReLU(nn.Conv2d(1, 9, 2, 2), (1, 5, 4), 1.0, seed=0)
    found, determined = case.solve(PIXELS)
    assert not determined.any()
    assert relative(found.value[:, :, :4], case.inputs[:, :, :4]) < 1e-6


def test_without_inequalities_it_is_the_most_probable_input_that_meets_the_equations():
    torch.manual_seed(0)
    case = BelowReLU(nn.Conv2d(1, 2, 3, 2, 1), (1, 6, 6), 1.0, seed=0)
    case.on[:] = True
    case.delta = torch.randn_like(case.delta)
    case.gradient, _ = backward(case.module, case.inputs, case.delta)
    root = torch.randn(36, 36, dtype=torch.float64) / 6 + torch.eye(36, dtype=torch.float64)
    prior = Prior(torch.rand(36, dtype=torch.float64), root.T @ root)
    output = Estimate(case.outputs, torch.full_like(case.outputs, ROUNDING**2))
    weight, bias = case.module.weight.detach(), case.module.bias.detach().view(-1, 1, 1)
    noise = torch.full((3,), ROUNDING, dtype=torch.float64)
    its = (case.rule, case.delta, case.gradient, noise, output, weight, bias, prior)
    found, determined = solve_bounded(*its, FREE)
    for number in range(3):
        matrix, truth = case.equations(number), case.inputs[number].flatten()
        free = null_space(matrix)
        # In the null space the gradient of the prior's penalty vanishes.
        step = torch.linalg.solve(free.T @ prior.precision @ free, free.T @ prior.precision @ (prior.mean - truth))
        torch.testing.assert_close(found.value[number].flatten(), truth + free @ step, rtol=1e-6, atol=1e-6)
    assert not determined.any()


@pytest.mark.parametrize("bounds", [FREE, POSITIVE, PIXELS])
def test_uncertain_outputs_give_an_estimate_nearer_than_the_prior(bounds):
    case = BelowReLU(nn.Conv2d(2, 12, 3, 2, 1), (2, 6, 6), 1.0, seed=0)
    prior = Prior(torch.full((72,), 0.5).double(), 12 * torch.eye(72).double())
    case.outputs = case.outputs + 0.02 * torch.randn_like(case.outputs)
    found, determined = case.solve(bounds, prior, noise=1e-3, output_error=0.02)
    assert not determined.any()
    assert (found.value - case.inputs).norm() < 0.5 * (case.inputs - 0.5).norm()
    mean_square = (found.value - case.inputs).square().mean()
    assert 0.1 * mean_square < found.variance.mean() < 10 * mean_square


@pytest.mark.parametrize("output_error", [ROUNDING, 0.02])
def test_an_input_of_zeros_alone_stays_finite(output_error):
    case = BelowReLU(nn.Conv2d(2, 8, 3, 2, 1), (2, 6, 6), 0.5, seed=0)
    nn.init.ones_(case.module.bias)
    case.inputs[1] = 0
    case.outputs = case.module(case.inputs).detach()
    case.on = case.outputs > 0
    case.delta = torch.randn_like(case.outputs) * case.on
    case.gradient, _ = backward(case.module, case.inputs, case.delta)
    found, _ = case.solve(POSITIVE, output_error=output_error)
    assert torch.isfinite(found.value).all()
    assert found.value[1].abs().max() < 0.1
    if output_error == ROUNDING:
        assert relative(found.value, case.inputs) < 1e-6
