"""A leaked model with a parameter that is one number, such as a learned scale: every stage takes its gradient."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.iterative import IterativeAttack
from gitlight.config import GaussianNoiseConfig, GradientsConfig, MatchingConfig, PruningConfig, SketchConfig
from gitlight.generators import GENERATORS
from gitlight.gradients.channel import build_channel
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shift, self.last = nn.Linear(12, 8), nn.Parameter(torch.tensor(0.5)), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.sigmoid(self.first(x.flatten(1))) + self.shift)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Shifted()


@pytest.fixture
def architecture(network):
    return Architecture.of(network, (3, 2, 2), 4)


@pytest.fixture
def pair(network, architecture):
    images, labels = torch.rand(60, 1, 3, 2, 2), torch.randint(4, (60, 1))
    return GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels), images


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("mlp", {"hidden_size": 8}),
        ("mlp", {"hidden_size": 8, "scale_inputs": False}),
        ("coarse", {"hidden_size": 8}),
        ("hybrid", {"channels": 4, "blocks": 1}),
        ("exact", {}),
    ],
)
def test_generators(architecture, pair, name, changed):
    gradients, images = pair
    generator = GENERATORS[name].load()(architecture, GENERATORS[name].settings(**changed))
    for fit in generator.fits():
        fit.update(gradients, images, torch.arange(len(images)))
        fit.finish()
    found = generator.reconstruct(gradients).images
    assert found.shape == images.shape
    assert torch.isfinite(found).all()
    if name == "exact":
        torch.testing.assert_close(found, images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("stage", [GaussianNoiseConfig(relative_std=0.1), PruningConfig(fraction=0.5)])
def test_channels(pair, stage):
    gradients, images = pair
    (channel,) = build_channel([stage])
    changed = channel(gradients, torch.arange(len(images)))
    assert changed["shift"].shape == gradients["shift"].shape == (60,)


def test_sketches(architecture, pair):
    gradients, _ = pair
    sketched = Sketch(architecture, SketchConfig(name="count", size=4, keep_exact=[]))(gradients)
    assert torch.equal(sketched["shift"], gradients["shift"])


@pytest.mark.parametrize("weighting", ["size", "linear"])
def test_iterative_attacks(network, architecture, weighting):
    function = LeakedFunction(architecture, {key: value.detach() for key, value in network.named_parameters()})
    targets = one_hot(torch.randint(4, (3, 1)), 4).float()
    leaks = torch.func.vmap(function.gradient)(torch.rand(3, 1, 3, 2, 2), targets)
    attack = IterativeAttack(architecture, function, MatchingConfig(iterations=2, layer_weights=weighting), 1, 0)
    assert torch.isfinite(attack.search(leaks, torch.arange(3)).images).all()
