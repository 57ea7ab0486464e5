import itertools

import pytest
import torch
from tied import Tied
from torch import nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.config import LeNetConfig, ResNetConfig, ViTConfig
from gitlight.errors import ArchitectureError, ConfigError
from gitlight.generators.modules import divide
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 16, 16)
RESNET, VIT = ResNetConfig(width=4), ViTConfig(patch_size=4, hidden_size=12, depth=2, heads=2, mlp_size=16)


def architecture_of(settings):
    return LeakedModel(settings, SHAPE, 5).architecture


@pytest.mark.parametrize("settings", [LeNetConfig(width=4), RESNET, VIT])
def test_modules_hold_every_layer_and_parameter_once_and_follow_one_another(settings):
    architecture = architecture_of(settings)
    modules = divide(architecture)
    assert [layer for module in modules for layer in module.layers] == list(architecture.layers)
    names = [name for module in modules for name in module.parameters]
    assert sorted(names) == sorted(architecture.parameter_shapes)
    assert all(module.parameters for module in modules)
    before = architecture.image_shape
    for module in modules:
        assert module.input_shape == tuple(before)
        before = module.output_shape
    assert before == (5,)


@pytest.mark.parametrize("settings", [LeNetConfig(width=4), RESNET, VIT])
def test_a_module_takes_nothing_but_the_result_of_the_module_before(settings):
    modules = divide(architecture_of(settings))
    before = IMAGE
    for module in modules:
        own = {layer.name for layer in module.layers}
        taken = {name for layer in module.layers for name in layer.inputs} - own
        assert taken == {before}
        before = module.layers[-1].name


def test_a_residual_block_is_one_module_with_its_norms_and_activations():
    modules = divide(architecture_of(RESNET))
    assert len(modules) == 1 + 9 + 1
    kinds = [layer.kind for layer in modules[4].layers]
    assert kinds.count("conv2d") == 3, "both convolutions and the shortcut's"
    assert kinds[-2:] == ["add", "relu"]


def test_attention_and_perceptron_of_a_transformer_are_modules_of_their_own():
    modules = divide(architecture_of(VIT))
    with_attention = [any("attention" in layer.kind for layer in module.layers) for module in modules]
    assert with_attention.count(True) == 2
    assert not any(a and b for a, b in itertools.pairwise(with_attention))


def test_a_model_that_splits_channels_is_cut_where_they_are_together_again():
    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 1), nn.Linear(64, 2)

        def forward(self, x):
            left, right = self.first(x).chunk(2, dim=1)
            return self.last(torch.cat([left, self.branch(right)], dim=1).flatten(1))

    modules = divide(Architecture.of(Shuffle(), (3, 4, 4), 2))
    assert [module.input_shape for module in modules] == [(3, 4, 4), (4, 4, 4), (4, 4, 4)]


def test_patterns_join_neighbours():
    architecture = architecture_of(RESNET)
    modules = divide(architecture, ["stage1_*", "stage2_*"])
    assert [module.layers[0].name.split(".")[0] for module in modules] == [
        *("conv", "stage1_block1", "stage2_block1", "stage3_block1", "stage3_block2", "stage3_block3", "flatten"),
    ]
    assert len(divide(architecture, ["*"])) == 1


def test_a_pattern_that_fits_nothing_is_named():
    with pytest.raises(ConfigError, match=r"generator.modules: 'layer9\*' fits no layer.*conv1"):
        divide(architecture_of(LeNetConfig(width=4)), ["layer9*"])


def test_a_parameter_of_two_modules_is_the_first_ones():
    modules = divide(Architecture.of(Tied(), (3, 2, 2), 2))
    assert [module.parameters for module in modules] == [
        ("inner.weight", "inner.bias"),
        (),
        ("last.weight", "last.bias"),
    ]


def test_a_model_without_parameters_has_no_gradient_to_invert():
    architecture = Architecture.of(nn.Sequential(nn.Flatten(), nn.ReLU()), (3, 2, 2), 12)
    with pytest.raises(ArchitectureError, match="no layer with parameters"):
        divide(architecture)
