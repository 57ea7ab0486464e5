"""A last layer without a bias, by the rank-one factor of its weight's gradient, against its known input and ``δ``."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.generators.exact.factor import allow_factor, rank_one_factor, solve_factor
from gitlight.generators.exact.plan import rules_of

N_LEAKS, N_CLASSES, N_FEATURES = 200, 5, 60


@pytest.fixture(scope="module")
def leaks():
    """Weight, inputs, labels and ``δ``; the label's probability is between 1e-3 and 0.99."""
    torch.manual_seed(0)
    weight = 0.8 * torch.randn(N_CLASSES, N_FEATURES, dtype=torch.float64)
    inputs = torch.rand(N_LEAKS, N_FEATURES, dtype=torch.float64) - 0.3
    labels = torch.randint(N_CLASSES, (N_LEAKS,))
    delta = torch.softmax(inputs @ weight.T, dim=1) - nn.functional.one_hot(labels, N_CLASSES)
    return weight, inputs, labels, delta


def noisy(leaks, relative):
    _, inputs, _, delta = leaks
    torch.manual_seed(1)
    gradient = delta.unsqueeze(2) * inputs.unsqueeze(1)
    noise = relative * gradient.flatten(1).square().mean(dim=1).sqrt()
    return gradient + noise[:, None, None] * torch.randn_like(gradient), noise


def test_the_factor_is_right_up_to_a_scale_that_the_label_bounds(leaks):
    _, inputs, labels, delta = leaks
    found = rank_one_factor(noisy(leaks, 0)[0])
    assert torch.equal(found.labels, labels)
    share = -delta.gather(1, labels.unsqueeze(1))
    torch.testing.assert_close(found.delta * share, delta, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.inputs / share, inputs, rtol=1e-11, atol=1e-13)


def test_of_noisy_gradients_the_label_is_read_all_the_same(leaks):
    assert torch.equal(rank_one_factor(noisy(leaks, 0.01)[0]).labels, leaks[2])


def test_the_weight_tells_the_scale(leaks):
    weight, inputs, _, delta = leaks
    gradient, _ = noisy(leaks, 0)
    row = torch.randn(N_FEATURES, dtype=torch.float64)  # common to all classes: no fit sees it
    head = solve_factor(gradient, 1e-15 * gradient.flatten(1).norm(dim=1), weight + row)
    torch.testing.assert_close(head.delta, delta, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.inputs, inputs, rtol=1e-9, atol=1e-11)


def test_the_scale_stays_a_guess_where_the_weight_is_not_known(leaks):
    weight, gradient = leaks[0], noisy(leaks, 0)[0]
    gradient[:100, :, 7] = 0  # of a unit that is off
    seen = torch.arange(N_FEATURES) != 7
    noise = 1e-15 * gradient.flatten(1).norm(dim=1)
    head = solve_factor(gradient, noise, torch.where(seen, weight, 1e3), seen)
    torch.testing.assert_close(head.inputs[100:], rank_one_factor(gradient).inputs[100:])
    assert bool((head.scale_variance[100:] == 1 / N_CLASSES**2).all())
    # The others' logits are not quite those of their δ, as the unit was on when it was made.
    assert bool((head.scale_variance[:100] < 1e-12).all())


@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2])
def test_errors_are_of_the_size_that_is_stated(leaks, relative):
    weight, inputs, _, _ = leaks
    head = solve_factor(*noisy(leaks, relative), weight)
    ratio = ((head.inputs - inputs).square() / head.inputs_variance).mean(dim=1).median()
    assert 0.3 < ratio < 3


def test_a_gradient_of_zero_leaves_finite_numbers(leaks):
    zero = torch.zeros(1, N_CLASSES, N_FEATURES, dtype=torch.float64)
    head = solve_factor(zero, torch.full((1,), 1e-12, dtype=torch.float64), leaks[0])
    assert bool(torch.isfinite(head.inputs).all() & torch.isfinite(head.delta).all())


@pytest.mark.parametrize(
    ("last", "allowed"),
    [
        (nn.Linear(12, 5, bias=False), True),
        (nn.Linear(12, 5), False),
        (nn.Linear(12, 2, bias=False), False),
    ],
)
def test_it_takes_a_last_layer_without_bias_and_more_than_two_classes(last, allowed):
    architecture = Architecture.of(nn.Sequential(nn.Flatten(), last), (3, 2, 2), last.out_features)
    rules = rules_of(architecture, strict=False)
    allow_factor(architecture, rules)
    assert rules[architecture.output].by_factor is allowed
