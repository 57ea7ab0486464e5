"""Hybrid-GIT where the closed form reaches the image, and leaks are not what its equations say."""

import pytest
import torch
from closed_form import run_fits
from small_generators import build

from gitlight.config import FullyConnectedConfig, GaussianNoiseConfig, ViTConfig
from gitlight.data.pair import GradientPair
from gitlight.generators import hybrid
from gitlight.generators.hybrid_fits import AsItIsOrRegression
from gitlight.generators.width import n_trainable
from gitlight.gradients.channel import GaussianNoise

VIT = ViTConfig(patch_size=4, hidden_size=48, depth=1, heads=2, mlp_size=48)
SETTINGS = {"closed_form_alone": False, "averages_of_inverted_layers": True}


def noisy(pair, level):
    channel = GaussianNoise(GaussianNoiseConfig(relative_std=level))
    return GradientPair(channel(pair.gradients, torch.arange(len(pair))), pair.images, pair.labels, pair.indices)


def error(images, pair):
    return float((images - pair.images).square().mean())


def test_a_regression_takes_the_place_of_what_noise_has_spoilt(make_pairs):
    leaked, pair = make_pairs(VIT, n=300)
    pair = noisy(pair, 0.1)
    alone = build("hybrid", leaked.architecture)
    assert alone.walk.reaches_the_image
    assert n_trainable(alone) == 0
    weighed = build("hybrid", leaked.architecture, **SETTINGS)
    assert n_trainable(weighed) > 0
    for generator in (alone, weighed):
        run_fits(generator, [pair])
    assert weighed.ridge.is_regression
    mean_image = error(pair.images.mean(dim=0, keepdim=True), pair)
    assert error(alone(pair.gradients), pair) > mean_image
    assert error(weighed(pair.gradients), pair) < mean_image


def test_what_is_exact_stays_as_it_is(make_pairs):
    leaked, pair = make_pairs(FullyConnectedConfig(hidden_sizes=[12]), n=60)
    generator = run_fits(build("hybrid", leaked.architecture, **SETTINGS), [pair])
    assert not generator.ridge.is_regression
    torch.testing.assert_close(generator(pair.gradients), pair.images, rtol=0, atol=1e-5)


def test_each_band_of_noise_chooses_for_itself(make_pairs):
    leaked, pair = make_pairs(VIT, n=300)
    generator = build("hybrid", leaked.architecture, noise_range=[0.0, 0.1], **SETTINGS)
    bands = generator.ridge.regressions
    assert all(isinstance(one, AsItIsOrRegression) for one in bands)
    for fit in generator.fits():
        fit.update(
            (pair if fit.pairs.noise in (None, (0.0, 0.0)) else noisy(pair, fit.pairs.noise[1])).gradients,
            pair.images,
            pair.indices[:, 0],
        )
        fit.finish()
    assert [bool(one.is_regression) for one in bands][:: len(bands) - 1] == [False, True]
    for level in (0.0, 0.1):
        leak = noisy(pair, level) if level else pair
        assert error(generator(leak.gradients), leak) < error(leak.images.mean(dim=0, keepdim=True), leak)


@pytest.mark.parametrize("most", [1 << 27, 200_000])
def test_a_linear_start_has_a_bounded_number_of_coefficients(make_pairs, monkeypatch, most):
    monkeypatch.setattr(hybrid, "MOST_COEFFICIENTS", most)
    leaked, _ = make_pairs(VIT, n=1)
    generator = build("hybrid", leaked.architecture, **SETTINGS)
    assert generator.ridge.ridge.coefficients.numel() <= most
    assert (generator.ridge.ridge.coefficients.shape[0] > 300) == (most > 1e6)
