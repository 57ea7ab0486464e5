import pytest
import torch

from gitlight.config import FullyConnectedConfig, LeakedConfig, LeNetConfig, OptimizerConfig, ResNetConfig
from gitlight.errors import ConfigError
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 32, 32)


def test_lenet_is_that_of_the_literature():
    network = LeakedModel(LeNetConfig(), SHAPE, 10).network
    convolutions = [module for module in network if isinstance(module, torch.nn.Conv2d)]
    assert [conv.stride for conv in convolutions] == [(2, 2), (2, 2), (1, 1)]
    assert all((conv.kernel_size, conv.padding, conv.out_channels) == ((5, 5), (2, 2), 12) for conv in convolutions)
    assert network.linear.weight.shape == (10, 768)


@pytest.mark.parametrize("size", [8, 31, 32, 50, 64])
def test_lenet_takes_images_of_any_size(size):
    assert LeakedModel(LeNetConfig(), (1, size, size), 7)(torch.rand(2, 1, size, size)).shape == (2, 7)


def test_fully_connected_networks_have_the_layers_asked_for():
    settings = FullyConnectedConfig(hidden_sizes=[30, 20], activation="relu")
    network = LeakedModel(settings, (1, 4, 4), 3).network
    assert [tuple(p.shape) for p in network.parameters()] == [(30, 16), (30,), (20, 30), (20,), (3, 20), (3,)]
    assert sum(isinstance(module, torch.nn.ReLU) for module in network) == 2


def test_it_is_frozen():
    model = LeakedModel(LeNetConfig(), SHAPE, 10)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_frozen_model_stays_in_evaluation_mode_and_a_trained_one_does_not():
    frozen = LeakedModel(ResNetConfig(width=2), SHAPE, 10)
    assert not any(module.training for module in frozen.train().modules())
    frozen.unfreeze()
    assert not any(module.training for module in frozen.modules())
    trained = LeakedModel(ResNetConfig(width=2), SHAPE, 10, optimizer=OptimizerConfig())
    assert all(module.training for module in trained.eval().train().modules())


def test_its_seed_alone_fixes_its_weights():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = LeakedModel(LeNetConfig(), SHAPE, 10).fingerprint()
    assert torch.equal(torch.get_rng_state(), before), "building it must not disturb the run's random numbers"
    torch.manual_seed(2)
    assert LeakedModel(LeNetConfig(), SHAPE, 10).fingerprint() == first
    assert LeakedModel(LeNetConfig(seed=1), SHAPE, 10).fingerprint() != first


def test_uniform_weights_fill_their_range():
    weights = torch.cat([p.flatten() for p in LeakedModel(LeNetConfig(init_range=0.3), SHAPE, 10).parameters()])
    assert 0.299 < weights.max() <= 0.3
    assert -0.3 <= weights.min() < -0.299


def test_default_weights_are_pytorchs():
    torch.manual_seed(5)
    wanted = torch.nn.Conv2d(3, 12, 5, 2, 2).weight
    found = LeakedModel(LeNetConfig(init="default", seed=5), SHAPE, 10).network.conv1.weight
    assert torch.equal(found, wanted)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"leaked.name: 'lent'.*Did you mean lenet\?.*lenet, mlp, resnet20, .*vit, vit_b_16"
    ):
        LeakedModel(LeakedConfig(name="lent"), SHAPE, 10)
