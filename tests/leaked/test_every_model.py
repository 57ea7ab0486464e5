"""What every leaked model must do, at its smallest."""

import pytest
import torch
from small_models import LARGE, SHAPE, SMALL, build
from torch import nn

from gitlight.leaked import LEAKED_MODELS

ACTIVATIONS = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU)


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
