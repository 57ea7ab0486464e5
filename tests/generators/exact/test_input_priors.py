"""What is known of a layer's input beforehand, against the textbook's linear estimate from the samples themselves."""

import dataclasses

import pytest
import torch
from dense import layer_of
from torch import nn

from gitlight.config import LeNetConfig
from gitlight.generators.exact import Estimate, rule_for
from gitlight.generators.exact.features import LEVELS
from gitlight.generators.exact.input_prior_fits import RegressionFit
from gitlight.generators.exact.input_priors import InputPrior
from gitlight.generators.exact.separated import SeparatedFeatures

N = 4000


@pytest.fixture
def fitted():
    """A prior of a linear layer's input, its samples, and the outputs of these with and without noise."""
    torch.manual_seed(0)
    module = nn.Linear(6, 4).double()
    mixing = torch.randn(6, 6, dtype=torch.float64)
    inputs = 2 + torch.randn(N, 6, dtype=torch.float64) @ mixing
    outputs = module(inputs).detach()
    prior = InputPrior(rule_for(layer_of(module, (6,))), with_output=True)
    prior.add(outputs, inputs, torch.arange(N))
    prior.solve()
    left = inputs - prior(Estimate(outputs, outputs.new_zeros(())), N).mean
    # Of one column of one unknown, the mean over all features.
    prior.factor.copy_(left.square().mean().sqrt().view(1, 1, 1))
    return prior, inputs, outputs


def wiener(inputs, outputs, variance):
    """The estimate of least mean square error from outputs with independent errors of these variances."""
    a, b = inputs - inputs.mean(dim=0), outputs - outputs.mean(dim=0)
    covariance = b.T @ b / N + torch.diag(variance)
    gain = torch.linalg.solve(covariance, b.T @ a / N)
    left = (a.T @ a / N - gain.T @ (b.T @ a / N)).diagonal().mean()
    return gain, left


@pytest.mark.parametrize("relative", [0.0, 0.3, 3.0])
def test_it_is_the_linear_estimate_of_least_error_for_each_images_own_noise(fitted, relative):
    prior, inputs, outputs = fitted
    variance = (relative * outputs.std(dim=0)).square()
    # The regression's own strength, chosen on held-out pairs, is as much noise again.
    strength = prior._regression.strength * outputs.var(dim=0)
    gain, left = wiener(inputs, outputs, variance + strength)
    expected = prior(Estimate(outputs, variance.expand_as(outputs)), N)
    wanted = (outputs - outputs.mean(dim=0)) @ gain + inputs.mean(dim=0)
    torch.testing.assert_close(expected.mean, wanted, rtol=1e-3, atol=1e-3)
    stated = (expected.size * prior.factor.squeeze()).square()
    torch.testing.assert_close(stated, left.expand(N), rtol=5e-3, atol=0)


def test_images_of_one_batch_have_each_their_own_noise(fitted):
    prior, _, outputs = fitted
    variance = torch.zeros_like(outputs)
    variance[1] = 100 * outputs.var(dim=0)
    both = prior(Estimate(outputs[:2], variance[:2]), 2)
    alone = prior(Estimate(outputs[:1], variance[:1]), 1)
    torch.testing.assert_close(both.mean[:1], alone.mean)
    assert both.size[1] > 1.5 * both.size[0]


def test_without_an_output_it_is_the_mean_of_public_images(fitted):
    prior, inputs, outputs = fitted
    blind = InputPrior(prior.rule, with_output=False)
    blind.add(outputs, inputs, torch.arange(N))
    blind.solve()
    expected = blind(None, 3)
    torch.testing.assert_close(expected.mean, inputs.mean(dim=0).expand(3, -1), rtol=1e-5, atol=1e-5)
    assert (expected.size == 1).all()
    estimate = Estimate(outputs, torch.ones_like(outputs))
    assert blind.trusted(estimate) is estimate


def test_entries_that_are_not_known_are_the_mean_and_those_at_a_bound_stay(fitted):
    prior, _, outputs = fitted
    value, variance = outputs[:1].clone(), torch.zeros(1, 4, dtype=torch.float64)
    value[0, 1], variance[0, 1] = 1e6, torch.inf
    variance[0, 2] = outputs[:, 2].var()
    variance[0, 3] = torch.inf
    at_most = torch.tensor([[False, False, False, True]])
    found = prior.trusted(Estimate(value, variance, at_most))
    mean = outputs.mean(dim=0)
    wanted = torch.stack([value[0, 0], mean[1], (value[0, 2] + mean[2]) / 2, value[0, 3]])
    torch.testing.assert_close(found.value[0], wanted, rtol=1e-3, atol=1e-6)
    left = torch.stack([mean[0] * 0, outputs[:, 1].var(), outputs[:, 2].var() / 2, mean[0] + torch.inf])
    torch.testing.assert_close(found.variance[0], left, rtol=1e-3, atol=1e-9)
    # Of public images, too, the regression saw the bound for the value.
    sure = prior(Estimate(found.value, found.variance.nan_to_num(posinf=0.0)), 1)
    assert torch.equal(prior(found, 1).mean, sure.mean)
    assert torch.equal(prior(found, 1).size, sure.size)


def test_an_output_that_never_varied_is_what_it_was():
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    inputs = torch.randn(200, 3, dtype=torch.float64)
    outputs = torch.stack([module(inputs).detach()[:, 0], torch.full((200,), 5.0, dtype=torch.float64)], dim=1)
    prior = InputPrior(rule_for(layer_of(module, (3,))), with_output=True)
    prior.add(outputs, inputs, torch.arange(200))
    prior.solve()
    prior.factor.fill_(1.0)
    found = prior.trusted(Estimate(torch.tensor([[0.0, 7.0]], dtype=torch.float64), torch.full((1, 2), 0.1)))
    assert found.value[0, 1] == 5
    assert found.variance[0, 1] == 0
    expected = prior(found, 1)
    assert torch.isfinite(expected.mean).all()
    assert torch.isfinite(expected.size).all()


@pytest.fixture
def small(make_pairs):
    """Features for client batches of two of a small LeNet, weights fitted; and the pairs of single images."""
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=240)
    features = SeparatedFeatures(leaked.architecture, None, 2)
    fits = list(features.fits())
    for fit in fits[:-2]:
        fit.update(pair.gradients, pair.images, pair.indices[:, 0])
        fit.finish()
    return features, fits[-2:], pair, leaked


def make_priors(fits, pair, numbers):
    for fit in fits:
        fit.update(pair.gradients, pair.images, numbers)
        fit.sums()
        fit.finish()


def test_what_is_stated_of_new_images_is_what_they_miss(small, make_pairs):
    """With half as many outputs as images, those that the regression was made from are met far better."""
    features, fits, pair, leaked = small
    make_priors(fits, pair, torch.arange(240))
    prior = features.priors["prior1"]
    assert prior.usable
    _, new = make_pairs(LeNetConfig(width=4), n=200, seed=7)
    network = leaked.network.double()
    images = new.images.flatten(0, 1).double()
    inputs, outputs = network[:2](images), network[:3](images)
    expected = prior(Estimate(outputs, outputs.new_zeros(())), len(images))
    missing = (expected.mean - inputs).square().mean().sqrt()
    stated = prior.factor.square().sum(dim=2).mean().sqrt()
    assert 0.7 < missing / stated < 1.4


def test_batches_without_a_usable_image_add_nothing(small):
    features, fits, pair, _ = small
    nothing = {name: torch.zeros_like(gradient[:16]) for name, gradient in pair.gradients.items()}
    for fit in fits:
        fit.update(pair.gradients, pair.images, torch.arange(240))
        before = [total.clone() for total in fit.sums()]
        fit.update(nothing, pair.images[:16], torch.arange(16))
        assert all(map(torch.equal, before, fit.sums()))
        fit.finish()
    assert features.priors["prior1"].usable


@pytest.mark.parametrize("numbers", [torch.full((240,), 8), torch.full((240,), 1)])
def test_without_images_for_a_prior_the_walk_ends_above_its_layer(small, caplog, numbers):
    """All are among those that regressions are made from, or none is."""
    features, fits, pair, _ = small
    make_priors(fits, pair, numbers)
    assert not features.priors["prior1"].usable
    assert "nothing is made of the gradient of conv2d 'conv2'" in caplog.text
    two = {name: gradient[:6].unflatten(0, (3, 2)).mean(dim=1) for name, gradient in pair.gradients.items()}
    values, levels, _ = features(two)
    assert values[0].any()
    assert not values[1].any()
    assert (levels[:, 2:] == LEVELS[1]).all()


def test_equations_that_public_images_do_not_meet_are_left_out(small, caplog):
    features, fits, pair, _ = small
    torch.manual_seed(0)
    other = {**pair.gradients, "conv2.weight": torch.randn_like(pair.gradients["conv2.weight"])}
    make_priors(fits, dataclasses.replace(pair, gradients=other), torch.arange(240))
    assert features.priors["prior0"].usable
    assert not features.priors["prior1"].usable
    assert "of public images that could be used" in caplog.text


def test_a_share_without_images_has_sums_of_its_own(small):
    features, fits, pair, _ = small
    fits[0].update(pair.gradients, pair.images, torch.arange(240))
    shapes = [total.shape for total in fits[0].sums()]
    fresh = {name: InputPrior(prior.rule, prior.uses_output) for name, prior in features.priors.items()}
    other = RegressionFit(features.inversion, fresh)
    assert [total.shape for total in other.sums()] == shapes
    assert not any(total.any() for total in other.sums())
