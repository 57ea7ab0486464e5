"""Errors of δ: samples carried down, and what they do to a layer's equations, against errors that were made."""

import pytest
import torch
from dense import layer_of
from hypothesis import given
from small_layers import affine_layers, quick
from torch import nn

from gitlight.generators.exact import Estimate, rule_for
from gitlight.generators.exact.errors import Noise, carry_errors, row_noise
from gitlight.generators.exact.posterior import N_DEVIATIONS, Prior


def test_noise_is_the_same_for_the_same_calls_and_for_all_leaks():
    like = torch.zeros(3, 2, 4, dtype=torch.float64)
    first, second = Noise(), Noise()
    assert torch.equal(first.normal(like), second.normal(like))
    assert not torch.equal(first.normal(like), Noise().normal(like))
    assert first.normal(like).shape == (1, N_DEVIATIONS, 2, 4)


@quick
@given(affine_layers)
def test_an_affine_layer_carries_errors_as_it_carries_delta(small):
    module, shape = small
    rule = rule_for(layer_of(module, shape))
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    delta = torch.randn_like(module(torch.zeros(2, *shape, dtype=torch.float64)))
    errors = torch.randn(2, N_DEVIATIONS, *delta.shape[1:], dtype=torch.float64)
    size = torch.tensor([1.0, 1e-60], dtype=torch.float64)  # beyond the range of single precision
    carried = carry_errors(rule, delta, errors * size.view(2, *[1] * delta.dim()), 0, [None], None, weights, Noise())
    for number in range(N_DEVIATIONS):
        wanted = rule.carry(delta + errors[:, number], 0, [None], None, weights)
        wanted = wanted - rule.carry(delta, 0, [None], None, weights)
        found = carried[:, number] / size.view(2, *[1] * (delta.dim() - 1))
        # A few digits are enough of an error.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, torch.inf])
def test_a_leak_without_finite_errors_changes_no_other(size):
    torch.manual_seed(0)
    rule = rule_for(layer_of(nn.Linear(3, 2, dtype=torch.float64), (3,)))
    weights = {"weight": torch.randn(2, 3, dtype=torch.float64)}
    errors = torch.randn(2, N_DEVIATIONS, 2, dtype=torch.float64)
    alone = carry_errors(rule, errors[:1, 0], errors[:1], 0, [None], None, weights, Noise())
    errors[1] = size
    both = carry_errors(rule, errors[:, 0], errors, 0, [None], None, weights, Noise())
    torch.testing.assert_close(both[:1], alone)
    assert (both[1] == 0).all() if size == 0 else not torch.isfinite(both[1]).any()


def test_an_activation_adds_what_its_outputs_errors_do_to_the_slope():
    rule = rule_for(layer_of(nn.Sigmoid(), (4000,)))
    torch.manual_seed(0)
    outputs = torch.sigmoid(torch.randn(1, 4000, dtype=torch.float64))
    delta = torch.randn(1, 4000, dtype=torch.float64)
    known = Estimate(outputs, torch.full_like(outputs, 1e-6))
    none = torch.zeros(1, N_DEVIATIONS, 4000, dtype=torch.float64)
    carried = carry_errors(rule, delta, none, 0, [None], known, {}, Noise())
    derivative = delta * (1 - 2 * outputs)  # of a (1 − a)
    assert carried.square().mean().item() == pytest.approx(1e-6 * derivative.square().mean().item(), rel=0.05)


def test_an_unknown_output_adds_nothing():
    rule = rule_for(layer_of(nn.ReLU(), (6,)))
    outputs = torch.rand(1, 6, dtype=torch.float64)
    delta = torch.randn(1, 6, dtype=torch.float64)
    known = Estimate(outputs, torch.full_like(outputs, torch.inf))
    none = torch.zeros(1, N_DEVIATIONS, 6, dtype=torch.float64)
    rule_errors = carry_errors(rule, delta, none, 0, [None], known, {}, Noise())
    assert (rule_errors == 0).all()


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv2d(2, 3, 3, 2, 1), (2, 8, 8)), (nn.Linear(5, 3), (4, 5))], ids=["conv", "tokens"]
)
def test_row_noise_is_the_error_of_the_equations(module, shape):
    """Against equations made with wrong δ at inputs drawn from the prior: errors of the scale, which all share."""
    torch.manual_seed(0)
    module = module.double()
    rule = rule_for(layer_of(module, shape))
    size = rule.n_inputs
    prior = Prior(torch.rand(size, dtype=torch.float64), 4 * torch.eye(size, dtype=torch.float64))
    delta = torch.randn_like(module(torch.zeros(1, *shape, dtype=torch.float64)))
    each = (-1, *[1] * (delta.dim() - 1))
    shared = torch.randn(N_DEVIATIONS, dtype=torch.float64)
    errors = 0.1 * (delta * shared.view(each)).unsqueeze(0)
    found = row_noise(rule, errors, torch.tensor([0.03]).double(), prior)
    n_drawn = 100 * N_DEVIATIONS
    inputs = (prior.mean + 0.5 * torch.randn(n_drawn, size, dtype=torch.float64)).view(-1, *shape)
    made = rule.weight_gradient(inputs, 0.1 * delta * shared.repeat(100).view(each))
    wanted = (made.flatten(2).square().mean(dim=(0, 2)) + 0.03**2).sqrt()
    assert (found[0] / wanted - 1).abs().max() < 0.2


def test_without_a_prior_inputs_are_of_size_one():
    rule = rule_for(layer_of(nn.Linear(3, 2).double(), (3,)))
    errors = torch.full((1, N_DEVIATIONS, 2), 0.1, dtype=torch.float64)
    assert row_noise(rule, errors, torch.tensor([0.0]).double(), None)[0].tolist() == pytest.approx([0.1, 0.1])


def test_further_variance_counts_too():
    rule = rule_for(layer_of(nn.Linear(3, 2).double(), (3,)))
    none = torch.zeros(1, N_DEVIATIONS, 2, dtype=torch.float64)
    prior = Prior(torch.full((3,), 2.0).double(), 1e6 * torch.eye(3).double())
    variance = torch.tensor([[0.01, 0.0]]).double()
    found = row_noise(rule, none, torch.tensor([0.1]).double(), prior, variance)
    assert found[0].tolist() == pytest.approx([(0.01 + 0.01 * 4) ** 0.5, 0.1], rel=1e-4)
