"""How many layers' inputs a walk gives, and what it fits for them."""

import pytest
import torch

from gitlight.config import LeNetConfig
from gitlight.generators.exact.features import ClosedFormFeatures, deviation_of
from gitlight.generators.exact.rule import Estimate


def fitted(leaked, pair, depth, forward_equations=False):
    features = ClosedFormFeatures(leaked.architecture, None, depth, 1, forward_equations)
    for fit in features.fits():
        fit.update(pair.gradients, pair.images, pair.indices[:, 0])
        fit.finish()
    return features


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "gelu"])
def test_the_last_layers_input_needs_no_fit(make_pairs, caplog, activation):
    leaked, pair = make_pairs(LeNetConfig(width=4, activation=activation), n=20)
    features = fitted(leaked, pair, depth=1)
    assert not features.inversion.steps
    assert not [record for record in caplog.records if record.name.startswith("gitlight")]
    assert [feature.layer for feature in features.features] == ["linear"]
    assert features.end == "generator.exact_depth is 1"


def test_forward_equations_match_no_weights_below_the_depth(make_pairs):
    leaked, _ = make_pairs(LeNetConfig(width=4, activation="gelu"), n=1)
    walk = ClosedFormFeatures(leaked.architecture, None, 1, 1, forward_equations=True)
    assert [step.layer.name for step in walk.inversion.steps] == ["linear"]
    assert not walk.inversion.unreachable


@pytest.mark.parametrize("forward_equations", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_depth_leaves_the_features_above_as_they_are(make_pairs, depth, forward_equations):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=300, shape=(3, 8, 8))
    first = {name: gradient[:5] for name, gradient in pair.gradients.items()}
    whole, cut = (fitted(leaked, pair, most, forward_equations) for most in (None, depth))
    assert cut.features == whole.features[:depth]
    for found, wanted in zip(cut(first).values, whole(first).values, strict=False):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_depth_that_is_not_reached_changes_nothing(make_pairs):
    leaked, _ = make_pairs(LeNetConfig(width=4), n=1)
    whole, deep = (ClosedFormFeatures(leaked.architecture, None, depth, 1) for depth in (None, 9))
    assert (deep.features, deep.end) == (whole.features, whole.end)
    assert deep.inversion.steps == whole.inversion.steps


def test_a_variance_that_all_entries_share_is_stated_as_it_is():
    """`torch.median` of an expanded tensor is wrong."""
    variance = torch.tensor([4.0, 9.0], dtype=torch.float64).view(2, 1, 1, 1)
    value = torch.zeros(2, 12, 16, 16, dtype=torch.float64)
    for shape in (variance, variance.expand_as(value)):
        assert deviation_of(Estimate(value, shape)).tolist() == [2, 3]
