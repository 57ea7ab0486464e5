"""What every leaked model must do, at its smallest."""

import copy

import pytest
import torch
from plain_autograd import plain_gradients, relative_error
from torch import nn

from gitlight.config import (
    CustomConfig,
    FullyConnectedConfig,
    GradientsConfig,
    LeNetConfig,
    ResNet18Config,
    ResNetConfig,
    TorchvisionResNet18Config,
    TorchvisionResNet50Config,
    ViTB16Config,
    ViTConfig,
)
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked import LEAKED_MODELS
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 16, 16)


def small_network(channels):
    stem = (nn.Conv2d(3, channels, 3, stride=4), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, nn.Flatten(), nn.Dropout(), nn.Linear(16 * channels, 10))


TINY_VIT = {"hidden_size": 6, "depth": 2, "heads": 2, "mlp_size": 10}
SMALL = {
    "lenet": (LeNetConfig, {"width": 3}),
    "mlp": (FullyConnectedConfig, {"hidden_sizes": [8]}),
    "resnet20": (ResNetConfig, {"width": 2}),
    "resnet18": (ResNet18Config, {"width": 2}),
    "vit": (ViTConfig, TINY_VIT),
    "custom": (CustomConfig, {"target": f"{__name__}:small_network", "arguments": {"channels": 4}}),
}
LARGE = {
    "torchvision_resnet18": (TorchvisionResNet18Config, {}),
    "torchvision_resnet50": (TorchvisionResNet50Config, {}),
    "vit_b_16": (ViTB16Config, {}),
}
ACTIVATIONS = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU)


def build(name, **settings):
    config, own = (SMALL | LARGE)[name]
    return LeakedModel(config(**own, **settings), SHAPE, 10)


def test_every_registered_model_is_tested():
    assert {*SMALL, *LARGE, "given"} == set(LEAKED_MODELS.names())


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_its_architecture_is_traced_and_it_maps_images_to_logits(name):
    leaked = build(name)
    assert leaked(torch.rand(2, *SHAPE)).shape == (2, 10)
    assert leaked.architecture[leaked.architecture.output].output_shape == (10,)
    assert list(leaked.architecture.parameter_shapes) == [n for n, _ in leaked.network.named_parameters()]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("init", ["default", "uniform"])
def test_its_seed_fixes_its_initial_weights(name, init):
    torch.manual_seed(1)
    first = build(name, init=init)
    torch.manual_seed(2)
    assert build(name, init=init).fingerprint() == first.fingerprint()
    assert build(name, init=init, seed=1).fingerprint() != first.fingerprint()
    largest = max(parameter.abs().max() for parameter in first.network.parameters())
    if init == "uniform":
        assert 0.45 < largest <= 0.5


@pytest.mark.parametrize("name", SMALL)
def test_trained_weights_take_the_place_of_initial_ones(name, tmp_path):
    source = build(name, seed=3)
    torch.save(source.network.state_dict(), tmp_path / "weights.pt")
    assert build(name, weights=str(tmp_path / "weights.pt")).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("name", [*SMALL, "torchvision_resnet18"])
@pytest.mark.parametrize("wanted", ["tanh", "silu"])
def test_its_activations_are_the_one_asked_for(name, wanted):
    found = {type(m) for m in build(name, activation=wanted).network.modules() if isinstance(m, ACTIVATIONS)}
    assert found == {{"tanh": nn.Tanh, "silu": nn.SiLU}[wanted]}


@pytest.mark.parametrize(("name", "method"), [*((name, "vmap") for name in SMALL), ("resnet18", "loop")])
def test_its_gradients_equal_those_of_plain_autograd(name, method):
    torch.manual_seed(0)
    leaked = build(name, activation="tanh")  # of few channels ReLU may leave none alive
    images, labels = torch.rand(2, 2, *SHAPE), torch.randint(10, (2, 2))
    settings = GradientsConfig(method=method, dtype="float64")
    found = GradientEngine(leaked.network, leaked.architecture, settings)(images, labels)
    reference = copy.deepcopy(leaked.network).double().requires_grad_(True)
    assert relative_error(found, plain_gradients(reference, images, labels)) < 1e-10


@pytest.mark.parametrize("name", ["torchvision_resnet18", "torchvision_resnet50"])
def test_gradients_of_torchvisions_networks_equal_those_of_plain_autograd(name):
    leaked = build(name)
    images, labels = torch.rand(2, 1, *SHAPE), torch.randint(10, (2, 1))
    settings = GradientsConfig(dtype="float64", memory_limit_gb=8)
    found = GradientEngine(leaked.network, leaked.architecture, settings)(images, labels)
    reference = copy.deepcopy(leaked.network).double().requires_grad_(True)
    assert relative_error(found, plain_gradients(reference, images, labels)) < 1e-10
