import copy

import pytest
import torch
from plain_autograd import plain_gradients, relative_error
from torch import nn

from gitlight.config import (
    Config,
    DataConfig,
    GivenConfig,
    GradientsConfig,
    LeNetConfig,
    OptimizerConfig,
    ResNetConfig,
    UpdatesConfig,
)
from gitlight.config import TorchvisionResNet18Config as TorchvisionConfig
from gitlight.errors import ArchitectureError, ConfigError
from gitlight.generators.exact import rule_for
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.batch_norm import ClientBatchNorm
from gitlight.leaked.model import LeakedModel
from gitlight.training import build_pairs

SHAPE = (3, 8, 8)


class TwoNorms(nn.Module):
    """Batch norm over pixels and over vectors; the first is used at two places."""

    def __init__(self):
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.same_norm = self.norm
        self.hidden, self.vector_norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 10)

    def forward(self, images):
        maps = self.same_norm(self.again(torch.tanh(self.norm(self.conv(images)))))
        return self.head(self.vector_norm(self.hidden(maps.square().mean((2, 3)))))


class Synchronised(TwoNorms):
    """The same, whose first is synchronised between processes; parameters keep their names."""

    def __init__(self):
        super().__init__()
        self.norm = self.same_norm = nn.SyncBatchNorm(4)


@pytest.fixture(params=["resnet20", "two norms", "synchronised"])
def models(request):
    """The leaked model with batch statistics, and the plain network in training mode."""
    torch.manual_seed(0)
    network = {"resnet20": lambda: None, "two norms": TwoNorms, "synchronised": Synchronised}[request.param]()
    settings = {"init": "uniform", "batch_norm": "batch"}
    config = ResNetConfig(width=2, activation="tanh", **settings) if network is None else GivenConfig(**settings)
    leaked = LeakedModel(config, SHAPE, 10, network=network)
    config.batch_norm = "running"
    plain = LeakedModel(config, SHAPE, 10, network=network).network
    return leaked, plain.double().requires_grad_(True).train()


def engine_of(leaked, method="vmap"):
    return GradientEngine(leaked.network, leaked.architecture, GradientsConfig(method=method, dtype="float64"))


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_gradients_are_those_of_a_client_in_training_mode(models, method):
    leaked, plain = models
    images, labels = torch.rand(2, 3, *SHAPE), torch.randint(10, (2, 3))
    before = leaked.fingerprint()
    found = engine_of(leaked, method)(images, labels)
    assert leaked.fingerprint() == before
    wanted = plain_gradients(plain, images, labels)
    # Batch norm cancels a bias before it: that gradient is zero, up to rounding.
    zero = [name for name, gradient in wanted.items() if gradient.abs().max() < 1e-12]
    assert set(zero) <= {"conv.bias", "again.bias", "hidden.bias"}
    assert all(found.pop(name).abs().max() < 1e-12 and wanted.pop(name) is not None for name in zero)
    assert relative_error(found, wanted) < 1e-10


def test_there_are_no_running_statistics_left_to_change(models):
    leaked, _ = models
    assert list(leaked.network.buffers()) == []


def test_client_batches_do_not_mix(models):
    leaked, _ = models
    images, labels = torch.rand(2, 2, *SHAPE), torch.randint(10, (2, 2))
    together = engine_of(leaked)(images, labels)
    for number in range(2):
        alone = engine_of(leaked)(images[number : number + 1], labels[number : number + 1])
        for name, gradient in together.items():
            assert torch.allclose(gradient[number], alone[name][0], rtol=1e-9, atol=1e-12)


def test_a_layer_used_twice_stays_one_layer():
    leaked = LeakedModel(GivenConfig(batch_norm="batch"), SHAPE, 10, network=TwoNorms())
    assert leaked.network.norm is leaked.network.same_norm
    assert [name for name, _ in leaked.network.named_parameters()] == [
        name for name, _ in TwoNorms().named_parameters()
    ]


def test_the_architecture_says_that_statistics_are_the_batchs():
    leaked = LeakedModel(ResNetConfig(width=2, batch_norm="batch"), SHAPE, 10)
    norms = [layer for layer in leaked.architecture.layers if layer.kind == "batch_norm"]
    assert len(norms) == 21
    assert all(layer.arguments["training"] and not layer.constants for layer in norms)
    with pytest.raises(ArchitectureError, match="normalises by the batch"):
        rule_for(norms[0])


def test_weights_with_running_statistics_load_all_the_same(tmp_path):
    source = LeakedModel(ResNetConfig(width=2, seed=5), SHAPE, 10)
    torch.save(source.network.state_dict(), tmp_path / "weights.pt")
    settings = ResNetConfig(width=2, batch_norm="batch", weights=str(tmp_path / "weights.pt"))
    loaded = LeakedModel(settings, SHAPE, 10)
    for one, other in zip(loaded.network.parameters(), source.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_in_training_keeps_its_running_statistics():
    leaked = LeakedModel(ResNetConfig(width=2, batch_norm="batch"), SHAPE, 10, optimizer=OptimizerConfig())
    assert not any(isinstance(module, ClientBatchNorm) for module in leaked.network.modules())


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, maps):
        return torch.tanh(super().forward(maps))


class FunctionalNorm(nn.Module):
    def __init__(self, training):
        super().__init__()
        self.always = training
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, maps):
        if self.always:
            return nn.functional.batch_norm(maps, None, None, training=True)
        return nn.functional.batch_norm(maps, self.mean, self.variance, training=self.training)


def with_norm(norm):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    return LeakedModel(
        GivenConfig(batch_norm="batch"),
        SHAPE,
        10,
        network=nn.Sequential(conv, nn.BatchNorm2d(4), norm, nn.Flatten(), nn.Linear(256, 10)),
    )


@pytest.mark.parametrize("norm", [NormAndActivation(4), FunctionalNorm(training=False)], ids=["subclass", "function"])
def test_a_norm_that_cannot_be_replaced_is_named(norm):
    with pytest.raises(
        ConfigError, match=r"^leaked.batch_norm: batch: batch_norm '2.*' of the leaked model goes on .*=running\.$"
    ):
        with_norm(norm)


def test_a_norm_of_the_users_own_that_uses_the_batchs_statistics_stays():
    assert isinstance(with_norm(FunctionalNorm(training=True)).network[2], FunctionalNorm)


def test_a_model_without_batch_norm_has_no_statistics_of_batches():
    with pytest.raises(ConfigError, match=r"leaked.batch_norm: batch: the leaked model has no batch norm .*=running"):
        LeakedModel(LeNetConfig(batch_norm="batch"), SHAPE, 10)


def pairs_of(n_images, **updates):
    data = DataConfig(client_batch_size=n_images, image_size=32, n_public_images=600)
    gradients = GradientsConfig(updates=UpdatesConfig(**updates))
    return build_pairs(Config(data=data, leaked=TorchvisionConfig(batch_norm="batch"), gradients=gradients))


@pytest.mark.parametrize(("n_images", "updates"), [(1, {}), (4, {"batch_size": 1}), (5, {"batch_size": 2})])
def test_a_single_value_per_channel_is_an_error_before_anything_runs(n_images, updates):
    with pytest.raises(ConfigError, match=r"leaked.batch_norm: batch: batch_norm 'layer4.0.bn1' .* one value per"):
        pairs_of(n_images, **updates)


def test_a_single_value_per_channel_is_an_error_in_the_engine_too():
    leaked = LeakedModel(TorchvisionConfig(batch_norm="batch"), (3, 32, 32), 10)
    with pytest.raises(ConfigError, match=r"leaked.batch_norm: batch: .* one value per channel"):
        engine_of(leaked)(torch.rand(1, 1, 3, 32, 32), torch.zeros(1, 1, dtype=torch.int64))


def test_several_images_are_enough_for_maps_of_one_pixel():
    pairs_of(4, batch_size=2)


def test_the_given_network_is_not_touched():
    network = TwoNorms()
    before = copy.deepcopy(network.state_dict())
    LeakedModel(GivenConfig(batch_norm="batch", init="uniform"), SHAPE, 10, network=network)
    assert isinstance(network.norm, nn.BatchNorm2d)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
