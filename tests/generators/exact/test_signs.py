"""Signs of a leaky ReLU's units under noise: against known signs, numerical integrals and sums over all signs."""

import itertools

import pytest
import torch
from dense import backward, layer_of
from torch import nn

from gitlight.generators.exact import Estimate, rule_for
from gitlight.generators.exact.posterior import N_DEVIATIONS, Prior, solve_stacked
from gitlight.generators.exact.signs import (
    TwoSlopes,
    _binary_regression,
    _sides,
    expected_outputs,
    solve_with_signs,
    unsure,
)

SLOPES = (1.0, 0.05)


class Case:
    """A convolution before a leaky ReLU whose output is known with an error, and noisy gradients."""

    def __init__(self, noise, spread, bias=True, groups=1):
        torch.manual_seed(5)
        self.module = nn.Conv2d(2, 8, 3, 2, 1, bias=bias, groups=groups).double()
        self.shape = (2, 8, 8)
        self.rule = rule_for(layer_of(self.module, self.shape))
        root = torch.randn(128, 128, dtype=torch.float64) / 128**0.5 + torch.eye(128, dtype=torch.float64)
        self.prior = Prior(torch.zeros(128, dtype=torch.float64), root.T @ root)
        its_inputs = torch.linalg.solve(root, torch.randn(128, 6, dtype=torch.float64)).T
        self.inputs = its_inputs.reshape(6, *self.shape)
        self.outputs = self.module(self.inputs).detach()
        slope = torch.where(self.outputs > 0, *SLOPES)
        delta = torch.randn_like(self.outputs)
        self.delta = delta * slope
        gradient, _ = backward(self.module, self.inputs, self.delta)
        bias_gradient = self.delta.sum(dim=(2, 3))
        size = self.delta.flatten(1).norm(dim=1)
        self.noise = noise * size
        self.gradient = gradient + torch.randn_like(gradient) * self.noise.view(-1, 1, 1, 1, 1)
        self.bias_gradient = None
        if bias:
            self.bias_gradient = bias_gradient + torch.randn_like(bias_gradient) * self.noise.view(-1, 1)
        activation = self.outputs * slope + spread * torch.randn_like(self.outputs)
        known = Estimate(activation, torch.full_like(activation, spread**2))
        errors = torch.zeros(6, N_DEVIATIONS, *delta.shape[1:], dtype=torch.float64)
        self.activation = TwoSlopes(known, delta, errors, SLOPES)
        self.weights = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        self.its = (self.weights["weight"], self.rule.bias_of(self.weights), self.prior)

    def settle(self):
        return solve_with_signs(self.rule, self.activation, self.gradient, self.bias_gradient, self.noise, *self.its)

    def by_the_value_alone(self):
        """Signs and slopes as the activation's value says."""
        value = self.activation.output.value
        slope = torch.where(value > 0, *SLOPES)
        output = Estimate(value / slope, self.activation.output.variance / slope.square())
        delta = self.activation.delta * slope
        return solve_stacked(self.rule, delta, self.gradient, self.noise, output, *self.its)


def wrong(above, outputs):
    assert torch.isfinite(above).all()
    return ((above > 0.5) != (outputs > 0)).sum().item()


@pytest.mark.parametrize("bias", [True, False])
def test_signs_that_the_value_leaves_open_are_found(bias):
    case = Case(1e-5, 0.05, bias)
    settled = case.settle()
    assert wrong(case.activation.output.value.sign(), case.outputs) > 40
    assert wrong(settled.above, case.outputs) < 5
    error = (settled.stacked.estimate.value - case.inputs).square().mean().sqrt()
    assert error < 0.2 * (case.by_the_value_alone().estimate.value - case.inputs).square().mean().sqrt()


def test_errors_of_input_output_and_delta_are_as_stated():
    case = Case(1e-3, 0.05)
    settled = case.settle()
    error = (settled.stacked.estimate.value - case.inputs).square().mean()
    assert error.item() == pytest.approx(settled.stacked.estimate.variance.mean().item(), rel=0.5)
    error = (settled.output.value - case.outputs).square().mean()
    assert error.item() == pytest.approx(settled.output.variance.mean().item(), rel=0.5)
    error = (settled.delta - case.delta).square().mean().item()
    assert error <= 3 * settled.errors.square().mean().item() + 1e-12


def test_where_nothing_is_in_doubt_it_is_the_plain_solve():
    case = Case(1e-6, 1e-9)
    expected = expected_outputs(case.rule, *case.its, 6)
    assert not unsure(case.activation, expected).any()
    settled = case.settle()
    assert wrong(settled.above, case.outputs) == 0
    plain = case.by_the_value_alone()
    torch.testing.assert_close(settled.stacked.estimate.value, plain.estimate.value, rtol=0, atol=1e-5)
    torch.testing.assert_close(settled.delta, case.delta)


def test_examples_in_doubt_are_named():
    case = Case(1e-6, 1e-9)
    case.activation.output.value[2, 0, 0, 0] = 1e-10
    assert unsure(case.activation, expected_outputs(case.rule, *case.its, 6)).tolist() == [
        number == 2 for number in range(6)
    ]


def test_grouped_convolutions_settle_by_forward_equations_alone():
    case = Case(1e-4, 0.02, groups=2)
    assert wrong(case.settle().above, case.outputs) < wrong(case.activation.output.value.sign(), case.outputs)


def test_sides_are_the_integrals_of_gaussians_cut_at_zero():
    value = torch.tensor([[-0.3, -0.01, 0.0, 0.02, 0.5]]).double()
    activation = TwoSlopes(Estimate(value, torch.full_like(value, 0.02)), value, value, SLOPES)
    expected = Estimate(torch.tensor([[0.1, -0.5, 0.3, 1.0, -0.2]]).double(), torch.full_like(value, 0.7))
    sides = _sides(activation, expected)
    grid = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    for number in range(5):
        mean = expected.value[0, number]
        slope = torch.where(grid > 0, *SLOPES)
        density = torch.exp(-((grid - mean).square()) / 1.4 - (value[0, number] - slope * grid).square() / 0.04)
        above, below = density * (grid > 0), density * (grid < 0)
        assert sides.odds[0, number].item() == pytest.approx((above.sum() / below.sum()).log().item(), abs=1e-3)
        for side, part in enumerate((above, below)):
            share = part / part.sum()
            its_mean = (share * grid).sum()
            assert sides.means[side][0, number].item() == pytest.approx(its_mean.item(), abs=1e-5)
            variance = (share * (grid - its_mean).square()).sum().item()
            assert sides.variances[side][0, number].item() == pytest.approx(variance, rel=1e-4)
        weight = above.sum() / density.sum()
        mean, variance = sides.moments(torch.sigmoid(sides.odds))
        assert weight.item() == pytest.approx(torch.sigmoid(sides.odds)[0, number].item(), abs=1e-4)
        share = density / density.sum()
        assert mean[0, number].item() == pytest.approx((share * grid).sum().item(), abs=1e-4)
        exact = (share * grid.square()).sum() - (share * grid).sum().square()
        assert variance[0, number].item() == pytest.approx(exact.item(), rel=1e-3)


def test_binary_regression_agrees_with_the_sum_over_all_combinations():
    torch.manual_seed(3)
    columns = torch.randn(20, 6, 30, dtype=torch.float64)
    truth = (torch.rand(20, 6) < 0.5).double()
    odds = torch.randn(20, 6, dtype=torch.float64)
    variances = torch.full((20, 30), 4.0, dtype=torch.float64)
    means = torch.sigmoid(odds)
    seen = ((truth - means).unsqueeze(2) * columns).sum(dim=1) + 2 * torch.randn(20, 30, dtype=torch.float64)
    ratios = _binary_regression(columns, seen, variances, odds)
    for number in range(20):
        weights = torch.zeros(6, 2, dtype=torch.float64)
        for choice in itertools.product((0, 1), repeat=6):
            its = torch.tensor(choice).double()
            rest = seen[number] - (its - means[number]) @ columns[number]
            log = -0.5 * (rest.square() / variances[number]).sum() + (its * odds[number]).sum()
            for unit, value in enumerate(choice):
                weights[unit, value] += log.exp()
        exact = weights[:, 1] / weights.sum(dim=1)
        assert (torch.sigmoid(odds[number] + ratios[number]) - exact).abs().max() < 0.12
