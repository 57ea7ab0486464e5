"""Stacked equations against dense weighted least squares."""

import pytest
import torch
from dense import backward, forward_matrix, gradient_matrix, layer_of, relative
from hypothesis import given
from hypothesis import strategies as st
from small_layers import affine_layers, quick
from torch import nn

from gitlight.generators.exact import Estimate, posterior, rule_for
from gitlight.generators.exact.posterior import Prior, solve_stacked


def random_prior(size):
    root = torch.randn(size, size, dtype=torch.float64) / size**0.5 + torch.eye(size, dtype=torch.float64)
    return Prior(torch.randn(size, dtype=torch.float64), root.T @ root)


def dense_map(module, shape, delta, gradient, noise, value, variance, prior):
    """The most probable input of one example, and its covariance, by a dense least-squares solve."""
    rows = [gradient_matrix(module, delta, shape) / noise]
    wanted = [gradient.flatten() / noise]
    known = torch.isfinite(variance).flatten()
    spread = variance.flatten()[known].sqrt()
    constant = module(torch.zeros(1, *shape, dtype=torch.float64)).detach()[0]
    rows.append(forward_matrix(module, shape)[known] / spread[:, None])
    wanted.append((value - constant).flatten()[known] / spread)
    if prior is not None:
        root = torch.linalg.cholesky(prior.precision).T
        rows.append(root)
        wanted.append(root @ prior.mean)
    matrix = torch.cat(rows)
    inverse = torch.linalg.pinv(matrix)
    return inverse @ torch.cat(wanted), inverse @ inverse.T


class Case:
    """A layer, its input, and noisy equations of three leaks: every third output's error is unknown."""

    def __init__(self, module, shape, noise, spread):
        self.module, self.shape = module, shape
        self.rule = rule_for(layer_of(module, shape))
        self.inputs = torch.rand(3, *shape, dtype=torch.float64)
        outputs = module(self.inputs).detach()
        self.delta = torch.randn_like(outputs) * torch.tensor([1e-3, 1.0, 1e3]).double().view(-1, *[1] * len(shape))
        gradient, _ = backward(module, self.inputs, self.delta)
        size = self.delta.flatten(1).norm(dim=1)
        self.noise = noise * size
        self.gradient = gradient + torch.randn_like(gradient) * self.noise.view(-1, *[1] * (gradient.dim() - 1))
        self.variance = spread**2 * (0.1 + torch.rand_like(outputs))
        self.value = outputs + torch.randn_like(outputs) * self.variance.sqrt()
        self.variance.flatten()[::3] = torch.inf
        self.value.flatten()[::3] = 1e9

    def solve(self, prior, output=True, row_noise=None):
        weights = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        known = Estimate(self.value, self.variance) if output else None
        bias = self.rule.bias_of(weights)
        its = (self.rule, self.delta, self.gradient, self.noise, known, weights["weight"], bias, prior)
        return solve_stacked(*its, row_noise=row_noise)

    def dense(self, number, prior, output=True):
        variance = self.variance if output else torch.full_like(self.variance, torch.inf)
        one = (self.delta[number], self.gradient[number], self.noise[number], self.value[number], variance[number])
        return dense_map(self.module, self.shape, *one, prior)


@quick
@given(affine_layers, st.sampled_from([1e-1, 1e-3]), st.sampled_from([1e-1, 1e-3]))
def test_with_noise_and_a_prior_it_is_the_most_probable_input(small, noise, spread):
    case = Case(*small, noise, spread)
    prior = random_prior(case.rule.n_inputs)
    found, solved, *_ = case.solve(prior)
    assert solved.all()
    for number in range(3):
        torch.testing.assert_close(found.value[number].flatten(), case.dense(number, prior)[0], rtol=1e-6, atol=1e-7)


@quick
@given(affine_layers)
def test_without_forward_equations_the_prior_fills_what_gradients_leave_open(small):
    case = Case(*small, 1e-2, 1.0)
    prior = random_prior(case.rule.n_inputs)
    found, *_ = case.solve(prior, output=False)
    for number in range(3):
        wanted = case.dense(number, prior, output=False)[0]
        torch.testing.assert_close(found.value[number].flatten(), wanted, rtol=1e-6, atol=1e-7)


def test_determined_equations_need_no_prior_and_are_exact():
    torch.manual_seed(0)
    case = Case(nn.Conv2d(2, 6, 3, 2, 1).double(), (2, 6, 6), 1e-15, 1e-15)
    assert not case.rule.exact, "the gradient equations alone leave directions open"
    found, solved, *_ = case.solve(None)
    assert solved.all()
    assert relative(found.value, case.inputs) < 1e-11


def test_outputs_known_exactly_are_taken_as_such():
    torch.manual_seed(0)
    case = Case(nn.Conv2d(2, 6, 3, 2, 1).double(), (2, 6, 6), 1e-12, 1.0)
    case.value, case.variance = case.module(case.inputs).detach(), torch.zeros_like(case.variance)
    assert relative(case.solve(None)[0].value, case.inputs) < 1e-10


@pytest.mark.parametrize("spread", [1e-2, 1.0])
def test_variance_is_the_mean_of_the_dense_covariance(spread):
    torch.manual_seed(0)
    case = Case(nn.Conv2d(2, 6, 3, 2, 1).double(), (2, 6, 6), 1e-2, spread)
    prior = random_prior(72)
    found, *_ = case.solve(prior)
    for number in range(3):
        assert found.variance[number].unique().numel() == 1
        wanted = case.dense(number, prior)[1].diagonal().mean().item()
        assert found.variance[number].mean().item() == pytest.approx(wanted, rel=0.5), "from sixteen samples"


def test_deviations_have_the_dense_covariance():
    torch.manual_seed(0)
    case = Case(nn.Linear(4, 3).double(), (4,), 1e-1, 1e-1)
    prior = random_prior(4)
    many = case.solve(prior).deviations
    assert many.shape == (3, posterior.N_DEVIATIONS, 4)
    for number in range(3):
        covariance = case.dense(number, prior)[1]
        factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
        white = many[number] @ factor
        assert white.square().mean().item() == pytest.approx(1, rel=0.35)


@quick
@given(affine_layers)
def test_equations_of_an_output_count_by_their_own_noise(small):
    case = Case(*small, 1e-2, 1.0)
    prior = random_prior(case.rule.n_inputs)
    n_outputs = case.gradient.shape[1]
    factors = 1 + torch.rand(3, n_outputs, dtype=torch.float64) * 9
    found = case.solve(prior, row_noise=case.noise[:, None] * factors).estimate
    for number in range(3):
        rows = gradient_matrix(case.module, case.delta[number], case.shape)
        each = (case.noise[number] * factors[number]).repeat_interleave(len(rows) // n_outputs)
        outputs = torch.isfinite(case.variance[number]).flatten()
        spread = case.variance[number].flatten()[outputs].sqrt()
        constant = case.module(torch.zeros(1, *case.shape, dtype=torch.float64)).detach()[0]
        root = torch.linalg.cholesky(prior.precision).T
        matrix = torch.cat(
            [rows / each[:, None], forward_matrix(case.module, case.shape)[outputs] / spread[:, None], root]
        )
        wanted = torch.cat(
            [
                case.gradient[number].flatten() / each,
                (case.value[number] - constant).flatten()[outputs] / spread,
                root @ prior.mean,
            ]
        )
        torch.testing.assert_close(
            found.value[number].flatten(),
            torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0],
            rtol=1e-6,
            atol=1e-7,
        )


def test_a_priors_deviations_have_its_covariance():
    torch.manual_seed(0)
    prior = random_prior(40)
    white = prior.deviations @ torch.linalg.cholesky(prior.precision)
    assert prior.deviations.shape == (posterior.N_DEVIATIONS, 40)
    assert white.square().mean().item() == pytest.approx(1, rel=0.15)


def test_examples_that_do_not_fit_into_memory_together_are_solved_in_turn(monkeypatch):
    torch.manual_seed(0)
    case = Case(nn.Linear(4, 3).double(), (4,), 1e-2, 1e-2)
    prior = random_prior(4)
    monkeypatch.setattr(posterior, "WORKSPACE_BYTES", 1.0)
    found, solved, *_ = case.solve(prior)
    assert solved.shape == (3,)
    for number in range(3):
        torch.testing.assert_close(found.value[number], case.dense(number, prior)[0])


@quick
@given(affine_layers)
def test_gradient_equations_are_added_where_their_columns_are(small):
    module, shape = small
    rule = rule_for(layer_of(module, shape))
    delta = torch.randn_like(module(torch.zeros(2, *shape, dtype=torch.float64)))
    system = torch.ones(2, rule.n_inputs, rule.n_inputs, dtype=torch.float64)
    rule.add_normal(system, delta)
    for found, its_delta in zip(system, delta, strict=True):
        matrix = gradient_matrix(module, its_delta, shape)
        torch.testing.assert_close(found, 1 + matrix.T @ matrix)


@quick
@given(affine_layers)
def test_a_weight_is_applied_without_its_bias(small):
    module, shape = small
    inputs = torch.rand(2, *shape, dtype=torch.float64)
    found = rule_for(layer_of(module, shape)).forward(inputs, module.weight.detach())
    torch.testing.assert_close(found.flatten(1), inputs.flatten(1) @ forward_matrix(module, shape).T)


def test_a_system_that_rounding_left_without_a_factor_is_damped_and_marked():
    rounded = torch.diag(torch.tensor([1.0, 1.0, -1e-14], dtype=torch.float64))
    hopeless = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    fine = torch.eye(3, dtype=torch.float64)
    factor, solved, damped = posterior.factorised(torch.stack([rounded, hopeless, fine, fine * torch.nan]))
    assert solved.tolist() == [True, False, True, False]
    assert damped.tolist() == [True, False, False, False]
    torch.testing.assert_close(factor[0] @ factor[0].T, rounded, rtol=0, atol=1e-11)
    torch.testing.assert_close(factor[2], fine)
