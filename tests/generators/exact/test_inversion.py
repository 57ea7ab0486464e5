import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from closed_form import add
from torch import nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.config import FullyConnectedConfig, LeNetConfig
from gitlight.errors import ArchitectureError
from gitlight.generators.base import FitOn
from gitlight.generators.exact.fits import Way
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.exact.posterior import Prior
from gitlight.generators.exact.prior_fit import PriorFit
from gitlight.generators.exact.solvability import Known
from gitlight.generators.exact.status import Status


def fitted(leaked, pair, **changed):
    inversion = Inversion(leaked.architecture, **{"noise": None, "client_batch_size": 1, **changed})
    for fit in inversion.fits():
        add(fit, pair)
        fit.finish()
    return inversion


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def worst_distance(inversion, leaked):
    truth = {name: value.detach().double() for name, value in leaked.network.named_parameters()}
    found = []
    for name, estimate in inversion.estimated_parameters().items():
        value, wanted = estimate.value, truth[name]
        if estimate.up_to_common_row:
            value, wanted = value - value.mean(dim=0), wanted - wanted.mean(dim=0)
        found.append(relative(value, wanted))
    return max(found)


def images_of(inversion, pair):
    return inversion.find(inversion.usable(pair.gradients)).values[IMAGE].value


@pytest.mark.parametrize(("scale", "is_kept"), [(0.0, False), (1.0, True)])
def test_what_fitted_weights_make_constant_has_no_prior(make_pairs, scale, is_kept):
    """Few pairs leave weights at zero. Of a constant's covariance only rounding would be inverted."""
    leaked, pair = make_pairs(LeNetConfig(width=4), n=20)
    weights = {name: scale * value.detach().double() for name, value in leaked.network.named_parameters()}
    kept = {}
    inversion = SimpleNamespace(
        architecture=leaked.architecture,
        weights=lambda: weights,
        keep_prior=lambda name, mean, precision: kept.update({name: Prior(mean, precision)}),
    )
    fit = PriorFit(inversion, ["activation1"])
    fit.update(pair.gradients, pair.images, torch.arange(20))
    fit.finish()
    assert list(kept) == (["activation1"] if is_kept else [])
    assert all(torch.isfinite(prior.deviations).all() for prior in kept.values())


@pytest.mark.parametrize(
    ("activation", "init", "way"),
    [
        ("sigmoid", "uniform", Way.FROM_ABOVE),
        ("tanh", "default", Way.FROM_ABOVE),
        ("leaky_relu", "default", Way.CONSERVED),
    ],
)
def test_weights_and_private_images_come_back_from_pairs_alone(make_pairs, activation, init, way):
    settings = LeNetConfig(width=6, activation=activation, init=init)
    leaked, pair = make_pairs(settings, n=400)
    inversion = fitted(leaked, pair)
    assert inversion.steps[1].way is way
    assert worst_distance(inversion, leaked) < 1e-8
    _, private = make_pairs(settings, n=3, seed=1)
    found = inversion.find(inversion.usable(private.gradients))
    assert relative(found.values[IMAGE].value, private.images[:, 0].double()) < 1e-6
    assert found.status.tolist() == [Status.EXACT] * 3


def test_weights_of_another_inversion_are_loaded(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=200)
    inversion, again = fitted(leaked, pair), Inversion(leaked.architecture, None, 1)
    assert again.weights() == {}
    of_an_earlier_run = {**inversion.state_dict(), "noise_factor": torch.ones((), dtype=torch.float64)}
    again.load_state_dict(of_an_earlier_run)
    assert all(torch.equal(value, again.weights()[name]) for name, value in inversion.weights().items())
    assert torch.equal(images_of(again, pair), images_of(inversion, pair))


def test_noise_costs_quality_and_no_setting(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=6), n=400)
    inversion = fitted(leaked, pair)
    errors = []
    for level in (1e-6, 1e-4, 1e-2):
        noisy = {}
        for name, gradient in pair.gradients.items():
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
            noisy[name] = gradient[:4] + level * pair.gradients["conv2.weight"].std() * noise[:4]
        found = inversion.find(inversion.usable(noisy)).values[IMAGE].value
        errors.append(relative(found, pair.images[:4, 0].double()))
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 1e-3
    spread = relative(pair.images[:4, 0].double(), pair.images[:, 0].double().mean(dim=0).expand(4, -1, -1, -1))
    assert errors[2] < spread, "better than the mean image"


def test_relu_weights_are_exact_and_images_are_called_exact_only_if_they_are(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=6, activation="relu", init="default"), n=500)
    inversion = fitted(leaked, pair)
    _, private = make_pairs(LeNetConfig(width=6, activation="relu", init="default"), n=4, seed=1)
    leaks = inversion.usable(private.gradients)
    found = inversion.find(leaks)
    for image, truth, status in zip(
        found.values[IMAGE].value, private.images[:, 0].double(), found.status, strict=True
    ):
        if status == Status.EXACT:
            assert relative(image, truth) < 1e-3


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "gelu"])
def test_fully_connected_networks_need_no_weight(make_pairs, activation):
    leaked, pair = make_pairs(FullyConnectedConfig(hidden_sizes=[20, 10], activation=activation))
    inversion = fitted(leaked, pair)
    assert inversion.steps == ()
    assert inversion.plan.known[IMAGE] is Known.EXACT
    assert relative(images_of(inversion, pair), pair.images[:, 0].double()) < 1e-9


def test_a_residual_sum_ends_the_walk_and_is_named():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Conv2d(3, 3, 3, padding=1)
            self.inner = nn.Conv2d(3, 3, 3, padding=1)
            self.activation = nn.ReLU()
            self.head = nn.Linear(3, 2)

        def forward(self, image):
            hidden = self.activation(self.enter(image))
            return self.head(self.activation(hidden + self.inner(hidden)).mean(dim=(2, 3)))

    plan = Inversion(Architecture.of(Residual(), (3, 8, 8), 2), None, 1).plan
    assert IMAGE not in plan.known
    assert "relu" in plan.obstacles["inner"]


def test_an_operation_without_a_rule_is_an_error_or_the_end():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink(), nn.Flatten(), nn.Linear(144, 2))
    architecture = Architecture.of(model, (3, 8, 8), 2)
    with pytest.raises(ArchitectureError, match=r"no inverse rule for hardshrink '1'.*register_rule"):
        Inversion(architecture, None, 1)
    plan = Inversion(architecture, None, 1, strict=False).plan
    assert plan.obstacles == {"0": "there is no inverse rule for hardshrink '1'"}


def test_weights_that_nothing_reaches_are_matched_with_a_warning(make_pairs, caplog):
    leaked, pair = make_pairs(LeNetConfig(width=2, activation="silu", init="default"), n=40)
    inversion = Inversion(leaked.architecture, None, 1)
    assert inversion.unreachable == ("conv1", "conv2", "conv3")
    unusable = replace(pair, gradients={name: 0 * gradient for name, gradient in pair.gradients.items()})
    everywhere = []
    with caplog.at_level(logging.INFO):
        for fit in inversion.fits(matching_epochs=3):
            for batch in (pair, unusable, pair, pair):
                add(fit, batch)
            everywhere.append(isinstance(fit, FitOn) and fit.pairs.everywhere)
            fit.finish()
    assert everywhere[-3:] == [True] * 3
    assert "they are fitted by gradient matching, 3 passes" in caplog.text
    distances = [float(text.split()[-1]) for text in caplog.messages if "mean relative squared distance" in text]
    assert len(distances) == 3
    assert distances[-1] < distances[0]
    assert set(inversion.weights()) == set(leaked.architecture.parameter_shapes)


def test_matching_from_the_leaked_weights_stays_there(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=2, activation="silu", init="default"), n=40)
    truth = {name: value.detach().double() for name, value in leaked.network.named_parameters()}
    inversion = Inversion(leaked.architecture, None, 1)
    for fit in inversion.fits(matching_epochs=1, start=truth):
        add(fit, pair)
        if hasattr(fit, "_loss"):
            # The last layer's weight is fitted, not started from; all else begins at the truth.
            assert fit._loss / fit._count < 1e-6
        fit.finish()
