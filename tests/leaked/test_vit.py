import math
import warnings

import pytest
import torch
import torchvision
from plain_autograd import relative_error_of_the_engine
from torch import fx, nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, ViTB16Config, ViTConfig
from gitlight.errors import ConfigError
from gitlight.generators.exact.features import ClosedFormFeatures
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.model import LeakedModel
from gitlight.leaked.vit import vit, vit_b_16

SHAPE = (3, 8, 8)
TINY = {"hidden_size": 6, "depth": 2, "heads": 2, "mlp_size": 10}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return vit(ViTConfig(**TINY), SHAPE, 10).eval()


def n_parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_sizes_are_those_of_the_literature():
    with torch.device("meta"):
        assert n_parameters(vit_b_16(ViTB16Config(), (3, 224, 224), 1000)) == 86_567_656
        tiny = ViTConfig(patch_size=16, depth=12)  # DeiT-Ti of Touvron et al. 2021
        assert n_parameters(vit(tiny, (3, 224, 224), 1000)) == 5_717_416


def test_published_weights_fit():
    with torch.device("meta"):
        published = torchvision.models.vit_b_16().state_dict()
        found = vit_b_16(ViTB16Config(), (3, 224, 224), 1000).state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in published.items()}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (3, 64, 64)])
def test_it_takes_square_images_of_any_size_that_patches_fill(shape):
    leaked = LeakedModel(ViTConfig(**TINY), shape, 7)
    assert leaked(torch.rand(2, *shape)).shape == (2, 7)
    positions = leaked.network.encoder.pos_embedding
    assert positions.shape == (1, 1 + (shape[1] // 4) ** 2, 6)  # one for the class token


def test_positions_that_are_not_learned_do_not_leak():
    torch.manual_seed(0)
    network = vit(ViTConfig(**TINY, learned_positions=False), SHAPE, 10).eval()
    assert "encoder.pos_embedding" not in dict(network.named_parameters())
    positions = network.encoder.pos_embedding[0]
    assert (positions[0] == 0).all()
    assert (positions[:, 4:] == 0).all(), "four does not divide six"
    # Two rows and columns of patches; the only frequency is 1.
    wanted = [[math.sin(x), math.cos(x), math.sin(y), math.cos(y)] for y in (0, 1) for x in (0, 1)]
    torch.testing.assert_close(positions[1:, :4], torch.tensor(wanted))
    images, labels = torch.rand(2, 1, *SHAPE), torch.tensor([[1], [2]])
    assert relative_error_of_the_engine(network, "captured", images, labels) < 1e-10
    with pytest.raises(ConfigError, match=r"leaked.hidden_size: 2 is too narrow.*leaked.learned_positions=true"):
        vit(ViTConfig(hidden_size=2, heads=1, depth=1, learned_positions=False), SHAPE, 10)


def test_without_them_a_generator_gets_the_class_token_and_not_a_sequence_of_zeros():
    with torch.device("meta"):
        network = vit(ViTConfig(**TINY, learned_positions=False), SHAPE, 10).eval()
    (feature,) = ClosedFormFeatures(Architecture.of(network, SHAPE, 10), None, None, 1).features
    assert (feature.shape, feature.exact) == ((6,), True)


def test_grey_images_meet_the_initial_weights_that_colour_ones_do():
    torch.manual_seed(0)
    weight = vit(ViTConfig(), (1, 32, 32), 10).conv_proj.weight.detach()
    assert weight.shape == (192, 1, 4, 4)
    # A normal distribution of standard deviation √(1 / 16), hardly touched by truncation at 2.
    assert weight.std() == pytest.approx(0.25, rel=0.05)


def test_its_activation_is_the_one_asked_for():
    for settings, wanted in ((ViTConfig(**TINY), nn.GELU), (ViTConfig(activation="tanh", **TINY), nn.Tanh)):
        found = [module for module in vit(settings, SHAPE, 10).modules() if isinstance(module, nn.GELU | nn.Tanh)]
        assert [type(module) for module in found] == [wanted] * 2


def test_every_parameter_leaks_from_initial_weights():
    settings = ViTConfig(**TINY)
    assert settings.init == "default"
    leaked = LeakedModel(settings, SHAPE, 10)
    engine = GradientEngine(leaked.network, leaked.architecture, GradientsConfig())
    gradients = engine(torch.rand(1, 1, *SHAPE), torch.zeros(1, 1, dtype=torch.int64))
    assert all(gradient.norm() > 1e-6 for gradient in gradients.values())


def test_both_tracers_follow_it(network):
    images = torch.rand(1, *SHAPE)
    wanted = network(images)
    assert torch.allclose(fx.symbolic_trace(network)(images), wanted, atol=1e-6)
    assert torch.allclose(torch.export.export(network, (images,)).module()(images), wanted, atol=1e-6)
    shapes = Architecture.of(network, SHAPE, 10).parameter_shapes
    assert list(shapes) == [name for name, _ in network.named_parameters()]


def test_vmap_has_a_rule_for_each_of_its_operations(network):
    images, labels = torch.rand(4, 3, *SHAPE), torch.randint(10, (4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it has none, and loops
        assert relative_error_of_the_engine(network, "vmap", images, labels) < 1e-10


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_its_head_alone_are_made_too(network):
    images, labels = torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64)
    whole = GradientEngine(network, Architecture.of(network, SHAPE, 10), GradientsConfig())(images, labels)
    network.requires_grad_(False).heads.requires_grad_(True)  # the attention module takes another path then
    head = GradientEngine(network, Architecture.of(network, SHAPE, 10), GradientsConfig())(images, labels)
    assert list(head) == ["heads.head.weight", "heads.head.bias"]
    assert all(torch.allclose(head[name], whole[name], atol=1e-6) for name in head)


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        (ViTConfig(patch_size=5), (3, 32, 32), r"leaked.patch_size: .* 5 pixels .* 32×32; .* data.image_size"),
        (ViTConfig(heads=5), (3, 32, 32), r"leaked.heads: 5 .* leaked.hidden_size: 192 .* divisor of 192"),
        (ViTConfig(), (3, 32, 64), r"leaked.name: 'vit' takes square images.*32×64"),
        (ViTB16Config(), (3, 40, 40), r"data.image_size: 40 is not a multiple of 16.*leaked.name=vit"),
        (ViTB16Config(), (3, 32, 64), r"leaked.name: 'vit_b_16' takes square images.*32×64"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, shape, words):
    with pytest.raises(ConfigError, match=words):
        LeakedModel(settings, shape, 10)
