"""Generators for a range of noise."""

import itertools
import math

import pytest
import torch
from closed_form import add
from small_generators import build
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GaussianNoiseConfig, GradientsConfig
from gitlight.data.pair import GradientPair
from gitlight.errors import ConfigError
from gitlight.generators.noise_bands import BandedRegression, bands_of
from gitlight.generators.noise_level import NoiseLevel, check_noise_range
from gitlight.generators.ridge import RidgeRegression
from gitlight.gradients.channel import GaussianNoise
from gitlight.gradients.engine import GradientEngine


def test_bands_cover_the_range_without_a_gap():
    for noise_range in ([0, 0.1], [1e-6, 0.2], [1e-12, 0.1], [0.01, 0.01], [0, 1e-7], [1e-3, 3e-3]):
        bands = bands_of(noise_range)
        assert bands[0][0] == noise_range[0]
        assert bands[-1][1] == pytest.approx(noise_range[1])
        if noise_range[0] == 0:
            assert bands.pop(0) == (0.0, 0.0)
        for (_, highest), (lowest, _) in itertools.pairwise(bands):
            assert highest == lowest
        assert all(lowest <= highest for lowest, highest in bands)
        assert len(bands) <= 5, "none is of noise that does not show"


@pytest.mark.parametrize("noise_range", [[0.1], [0.1, 0.01], [-1, 0.1], [0, 0]])
def test_what_is_no_range_is_named(leaks, noise_range):
    architecture, _ = leaks
    with pytest.raises(ConfigError, match=r"generator.noise_range"):
        check_noise_range(noise_range, architecture, 1)


def test_each_leak_goes_through_the_regression_of_its_band():
    torch.manual_seed(0)
    bands = [(0.0, 0.0), (1e-4, 1e-2), (1e-2, 1.0)]
    banded = BandedRegression([RidgeRegression(3, 2) for _ in bands], bands)
    alone = [RidgeRegression(3, 2) for _ in bands]
    for number, regression in enumerate(alone):
        features, outputs = torch.randn(100, 3, dtype=torch.float64), torch.randn(100, 2)
        for one in (regression, banded.band(number)):
            one.add(features, outputs, torch.arange(100))
            one.solve()
    levels = torch.tensor([-16.0, 1.0, -3.0, -6.0, -2.1, -1.9], dtype=torch.float64)
    which = [0, 2, 1, 0, 1, 2]
    features = torch.randn(6, 3, dtype=torch.float64)
    wanted = torch.stack([alone[number](row.unsqueeze(0))[0] for number, row in zip(which, features, strict=True)])
    torch.testing.assert_close(banded(features, levels), wanted, rtol=1e-5, atol=1e-6)
    assert banded.errors(levels).tolist() == [alone[number].error.item() for number in which]


LEVELS = (0.0, 3e-4, 0.05)


@pytest.fixture(scope="module")
def leaks():
    """A small model, and a function that gives pairs of 400 smooth images of it, at any noise."""
    torch.manual_seed(4)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 6)
    ).requires_grad_(False)
    architecture = Architecture.of(network, (1, 8, 8), 6)
    coarse = torch.rand(500, 1, 4, 4)
    images = nn.functional.interpolate(coarse, size=8, mode="bilinear").unsqueeze(1)
    labels = torch.randint(6, (500, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig())(images, labels)

    def pair(noise, which):
        settings = GaussianNoiseConfig(lowest_std=noise[0], relative_std=noise[1])
        its = {name: gradient[which] for name, gradient in gradients.items()}
        numbers = torch.arange(500)[which]
        return GradientPair(
            GaussianNoise(settings)(its, numbers), images[which], torch.zeros(len(numbers), 1), numbers.view(-1, 1)
        )

    return architecture, pair


def fitted(architecture, pair, kind="hybrid", **settings):
    generator = build(kind, architecture, **settings)
    for fit in generator.fits():
        noise = getattr(fit, "pairs", None) and fit.pairs.noise
        add(fit, pair(noise or (0.0, 0.1), slice(400)))
        fit.finish()
    generator.fitted.fill_(True)
    return generator


def start_errors(generator, pair):
    # Before it is trained, coarse gives its start.
    start = getattr(generator, "start", generator)
    found = []
    for level in LEVELS:
        others = pair((level, level), slice(400, 500))
        found.append((start(others.gradients) - others.images).square().mean().item())
    return found


def band_with(level):
    (found,) = [band for band in bands_of([0.0, 0.1]) if band[0] < level <= band[1]]
    return found


def test_averages_of_inverted_layers_help_the_start_and_never_harm_it(leaks):
    architecture, pair = leaks
    without, with_them = (
        fitted(architecture, pair, noise_range=[0.0, 0.1], averages_of_inverted_layers=used) for used in (False, True)
    )
    errors, fewer = start_errors(without, pair), start_errors(with_them, pair)
    assert fewer[0] < errors[0]
    assert fewer[-1] < errors[-1]
    # In between, what a processor rounds decides whether they help; where they do not, none is used.
    regression = with_them.ridge.band(bands_of([0.0, 0.1]).index(band_with(LEVELS[1])))
    if regression.deviation[-with_them.averages.n_entries :].isinf().all():
        assert fewer[1] == pytest.approx(errors[1], rel=1e-6)
    else:
        assert fewer[1] < errors[1]


@pytest.mark.parametrize(("kind", "at_most"), [("hybrid", 1.0), ("coarse", 1.005)])
def test_one_start_for_each_band_is_better_at_every_level_than_one_for_all(leaks, kind, at_most):
    architecture, pair = leaks
    banded = fitted(architecture, pair, kind, noise_range=[0.0, 0.1])
    single = fitted(architecture, pair, kind)
    of_bands, of_one = start_errors(banded, pair), start_errors(single, pair)
    # Under the most noise coarse's one regression is as good: there most is to be gained, and it is fitted to that.
    assert all(mine < at_most * its for mine, its in zip(of_bands, of_one, strict=True)), (of_bands, of_one)
    assert of_bands[0] < 0.1 * of_one[0]
    assert of_bands == sorted(of_bands), "the more noise the worse"
    assert of_bands[0] < 0.2 * of_bands[-1]


def test_the_weights_are_fitted_from_the_least_noise(leaks):
    architecture, pair = leaks
    generator = build("hybrid", architecture, noise_range=[0.0, 0.1])
    noises = []
    for fit in generator.fits():
        noises.append(fit.pairs.noise)
        add(fit, pair(fit.pairs.noise, slice(400)))
        fit.finish()
    n_bands = len(bands_of([0.0, 0.1]))
    assert set(noises[:-n_bands]) == {(0.0, 0.0)}
    assert noises[-n_bands:] == bands_of([0.0, 0.1])


def test_every_level_counts_alike_in_training(leaks):
    architecture, pair = leaks
    generator = fitted(architecture, pair, noise_range=[0.0, 0.1])
    parts = [pair((level, level), slice(400, 500)) for level in LEVELS]
    losses = [generator.training_loss(part.gradients, part.images) for part in parts]
    errors = [(generator(part.gradients) - part.images).square().mean() for part in parts]
    assert max(losses) / min(losses) < 0.2 * max(errors) / min(errors)
    sum(losses).backward()
    assert any(parameter.grad is not None for parameter in generator.parameters())
    assert generator.has_own_loss
    assert not fitted(architecture, pair).has_own_loss


def test_a_given_noise_leaves_no_range(leaks):
    architecture, _ = leaks
    with pytest.raises(ConfigError, match=r"generator.noise_range: with generator.noise"):
        build("hybrid", architecture, noise_range=[0.0, 0.1], noise=0.01)


@pytest.mark.parametrize("kind", ["mlp", "coarse", "hybrid"])
def test_averages_leave_no_range(leaks, kind):
    architecture, _ = leaks
    with pytest.raises(ConfigError, match=r"generator.noise_range: only the whole gradient of one image"):
        build(kind, architecture, 2, noise_range=[0.0, 0.1])
    build(kind, architecture, 2, noise_range=[])


def test_the_noise_that_a_leak_has_is_read_off_it(leaks):
    architecture, pair = leaks
    level = NoiseLevel(architecture, [1e-4, 1e-2])
    for noise in (1e-4, 1e-3, 1e-2):
        gradients = pair((noise, noise), slice(100)).gradients
        found = 10 ** level.logarithms(gradients)
        # From some 600 entries of the last layer's weight, beside rounding.
        assert (found / noise - 1).abs().max() < 0.15
        assert level.seen(gradients).median().item() == pytest.approx(math.log10(noise) + 3, abs=0.02)
    gradients = pair((1e-3, 1e-3), slice(3)).gradients
    gradients["0.weight"][1] = float("nan")
    assert level.seen(gradients)[:, 0].isfinite().all()
    assert level.logarithms(gradients)[1] == 2.0


@pytest.mark.parametrize("kind", ["mlp", "coarse"])
def test_learned_generators_see_the_level(leaks, kind, monkeypatch):
    architecture, pair = leaks
    generator = fitted(architecture, pair, kind, noise_range=[0.0, 0.1])
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.1)
    gradients = pair((1e-3, 1e-3), slice(3)).gradients
    images = generator(gradients)
    monkeypatch.setattr(NoiseLevel, "seen", lambda *_: torch.ones(3, 1))
    assert (generator(gradients) - images).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-4


@pytest.mark.parametrize("kind", ["mlp", "coarse"])
def test_leaks_of_a_model_without_a_last_linear_layer_do_not_tell_their_noise(kind):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    architecture = Architecture.of(network, (1, 8, 8), 3)
    with_range, without = (build(kind, architecture, noise_range=given) for given in ([0, 0.1], None))
    assert not with_range.has_own_loss
    assert "does not tell" in with_range.describe()
    assert "does not tell" not in without.describe()
    for mine, other in zip(with_range.parameters(), without.parameters(), strict=True):
        assert mine.shape == other.shape
