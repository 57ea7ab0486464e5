"""Gradients through batch and instance norm, where PyTorch's own are wrong on CPUs."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from exactness import N_CLASSES, SHAPE, autograd_loop
from torch import nn

import gitlight.gradients.functional_gradients
from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, UpdatesConfig
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.updates import LocalUpdates

NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class OverTokens(nn.Module):
    """A norm, and weights of tokens that have the batch within: δ then has its channels innermost."""

    def __init__(self, norm):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 6, 2, 2), norm(6, affine=True)
        self.weights, self.last = nn.Parameter(torch.randn(4, 1, 6)), nn.Linear(6, N_CLASSES)

    def forward(self, images):
        tokens = self.norm(self.convolution(images).sigmoid()).flatten(2).permute(2, 0, 1)
        return self.last((self.weights * tokens).tanh().mean(0))


class TokensFirst(OverTokens):
    """The norm's input has its channels innermost, too, and the batch within; its δ then has to have them there."""

    def forward(self, images):
        tokens = self.convolution(images).sigmoid().flatten(2).permute(2, 0, 1).contiguous()
        normed = self.norm(tokens.permute(1, 2, 0).unflatten(2, (2, 2)))
        return self.last((self.weights * normed.flatten(2).permute(2, 0, 1)).tanh().mean(0))


class InOrder(OverTokens):
    """The same, computed so that δ has the images' order."""

    def forward(self, images):
        tokens = self.norm(self.convolution(images).sigmoid()).flatten(2)
        return self.last((self.weights.permute(1, 2, 0).contiguous() * tokens).tanh().mean(2))


@pytest.fixture(params=itertools.product(NORMS, [1, 2], [OverTokens, TokensFirst]), ids=str)
def leaked(request):
    norm, n_images, kind = request.param
    torch.manual_seed(0)
    network, twin = (kind(NORMS[norm]).eval() for kind in (kind, InOrder))
    twin.load_state_dict(network.state_dict())
    images, labels = torch.rand(3, n_images, *SHAPE), torch.randint(N_CLASSES, (3, n_images))
    return network, images, labels, autograd_loop(twin, images, labels)


def misses(found, wanted):
    return max(float((found[name] - right).norm() / right.norm().clamp_min(1e-9)) for name, right in wanted.items())


@pytest.mark.parametrize("n_leaks", [1, 3])
@pytest.mark.parametrize("method", ["loop", "vmap", "captured"])
def test_they_are_those_of_another_order(leaked, method, n_leaks):
    network, images, labels, wanted = leaked
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    engine = GradientEngine(network, architecture, GradientsConfig(method=method, dtype="float64"))
    found = engine(images[:n_leaks], labels[:n_leaks])
    assert misses(found, {name: right[:n_leaks] for name, right in wanted.items()}) < 1e-10


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_updates_are_too(leaked, method):
    network, images, labels, wanted = leaked
    settings = GradientsConfig(method=method, dtype="float64", updates=UpdatesConfig(epochs=2, learning_rate=1e-9))
    found = LocalUpdates(network, Architecture.of(network, SHAPE, N_CLASSES), settings)(images, labels, torch.arange(3))
    assert misses(found, wanted) < 1e-6


@pytest.mark.parametrize(("norm", "n_images"), [("batch", 1), ("instance", 1), ("instance", 2)])
def test_pytorch_needs_it(norm, n_images, monkeypatch):
    """Where this fails, PyTorch is mended, and `gitlight.gradients.delta_in_order` can go."""
    torch.manual_seed(0)
    network = OverTokens(NORMS[norm]).eval()
    images, labels = torch.rand(3, n_images, *SHAPE), torch.randint(N_CLASSES, (3, n_images))
    engine = GradientEngine(
        network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig(method="loop", dtype="float64")
    )
    right = engine(images, labels)
    monkeypatch.setattr(gitlight.gradients.functional_gradients, "delta_in_order", lambda device_type: nullcontext())
    assert misses(engine(images, labels), right) > 0.1
