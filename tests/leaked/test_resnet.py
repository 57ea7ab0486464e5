from math import sqrt

import pytest
import torch
import torchvision
from torch import fx, nn
from torchvision.models.resnet import BasicBlock

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, ResNet18Config, ResNetConfig
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.model import LeakedModel
from gitlight.leaked.resnet import ResidualBlock, resnet18, resnet20

SHAPE = (3, 8, 8)


@pytest.fixture
def network():
    """A narrow ResNet-20 whose batch norms are not the identity that they start as, in evaluation mode."""
    torch.manual_seed(0)
    network = resnet20(ResNetConfig(width=3), SHAPE, 10).eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    return network


def test_it_is_that_of_he_et_al_but_for_its_shortcuts():
    network = resnet20(ResNetConfig(), (3, 32, 32), 10)
    main_path = {name: p.numel() for name, p in network.named_parameters() if "shortcut" not in name}
    assert sum(main_path.values()) == 269_722  # the 0.27 M of their Table 6
    layers = [
        m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(layers) == 20
    projections = [m for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" in name]
    assert [p.weight.shape for p in projections] == [(32, 16, 1, 1), (64, 32, 1, 1)]


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_a_block_is_torchvisions(inputs, outputs, stride):
    block = ResidualBlock(inputs, outputs, stride, "relu")
    projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    reference = BasicBlock(inputs, outputs, stride, projection if stride > 1 else None)
    reference.load_state_dict(dict(zip(reference.state_dict(), block.state_dict().values(), strict=True)))
    images = torch.rand(2, inputs, 7, 7)
    assert torch.allclose(block(images), reference(images), atol=1e-6)


def test_its_stages_halve_the_image_and_double_the_channels():
    sizes = []
    network = resnet20(ResNetConfig(width=3), (3, 32, 32), 10)
    for block in (module for module in network if isinstance(module, ResidualBlock)):
        block.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape[1:])))
    network(torch.rand(1, 3, 32, 32))
    assert sizes == [(3, 32, 32)] * 3 + [(6, 16, 16)] * 3 + [(12, 8, 8)] * 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 31, 31), (3, 32, 64)])
def test_it_takes_images_of_any_shape(shape):
    assert LeakedModel(ResNetConfig(width=2), shape, 7)(torch.rand(2, *shape)).shape == (2, 7)


def test_its_own_initial_weights_are_kaimings():
    settings = ResNetConfig()
    assert settings.init == "default"
    for name, parameter in LeakedModel(settings, (3, 32, 32), 10).network.named_parameters():
        if parameter.dim() == 4:
            fan_out = parameter.shape[0] * parameter[0, 0].numel()
            assert parameter.detach().std() == pytest.approx(sqrt(2 / fan_out), rel=0.15), name


def test_its_activation_is_the_one_asked_for():
    assert ResNetConfig().activation == "relu"
    network = resnet20(ResNetConfig(width=2, activation="tanh"), SHAPE, 10)
    assert sum(isinstance(module, nn.Tanh) for module in network.modules()) == 19
    assert not any(isinstance(module, nn.ReLU) for module in network.modules())


def test_both_tracers_follow_it(network):
    images = torch.rand(1, *SHAPE)
    wanted = network(images)
    assert torch.allclose(fx.symbolic_trace(network)(images), wanted)
    assert torch.allclose(torch.export.export(network, (images,)).module()(images), wanted)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_the_images_of_a_leak_do_not_meet_in_its_batch_norms(method):
    leaked = LeakedModel(ResNetConfig(width=2), SHAPE, 10)
    leaked.train()  # as a trainer would
    before = leaked.fingerprint()
    engine = GradientEngine(leaked.network, leaked.architecture, GradientsConfig(method=method, dtype="float64"))
    images, labels = torch.rand(1, 3, *SHAPE), torch.randint(10, (1, 3))
    together, alone = engine(images, labels), engine(images.view(3, 1, *SHAPE), labels.view(3, 1))
    for name, gradient in together.items():
        assert torch.allclose(gradient[0], alone[name].mean(dim=0), rtol=1e-9, atol=1e-12)
    assert leaked.fingerprint() == before, "running statistics must not move"


def test_its_architecture_holds_the_parameters_and_no_running_statistics(network):
    shapes = Architecture.of(network, SHAPE, 10).parameter_shapes
    assert list(shapes) == [name for name, _ in network.named_parameters()]


def test_resnet18_is_torchvisions_with_a_stem_for_small_images():
    torch.manual_seed(0)
    network = resnet18(ResNet18Config(), SHAPE, 10).eval()
    reference = torchvision.models.resnet18(num_classes=10).eval()
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    assert len(reference.state_dict()) == len(network.state_dict())
    # torchvision puts a block's shortcut last, as here, so that the order of all weights is the same.
    reference.load_state_dict(dict(zip(reference.state_dict(), network.state_dict().values(), strict=True)))
    images = torch.rand(2, *SHAPE)
    assert torch.allclose(network(images), reference(images), atol=1e-5)
