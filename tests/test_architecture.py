import pytest
import torch
from torch import nn

from gitlight.architecture import ELEMENTWISE, RESHAPES, Architecture
from gitlight.config import LeNetConfig
from gitlight.errors import ArchitectureError
from gitlight.leaked.lenet import lenet


def test_no_weight_survives():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))
    graph = Architecture.of(model, (3, 8, 8), 10).graph
    tensors = [*graph.parameters(), *graph.buffers()]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)


def test_the_model_itself_is_left_alone():
    model = lenet(LeNetConfig(), (3, 32, 32), 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Architecture.of(model, (3, 32, 32), 10)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_names_shapes_and_order_are_those_of_the_parameters():
    model = lenet(LeNetConfig(), (3, 32, 32), 10)
    architecture = Architecture.of(model, (3, 32, 32), 10)
    assert list(architecture.parameter_shapes.items()) == [(name, p.shape) for name, p in model.named_parameters()]
    assert architecture.n_parameters == 15826


def test_parameters_that_are_not_trained_leak_no_gradient():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    assert list(Architecture.of(nn.Sequential(nn.Flatten(), *model), (1, 2, 2), 2).parameter_shapes) == [
        "2.weight",
        "2.bias",
    ]


def test_the_chain_of_lenet_has_the_shapes_of_a_forward_pass():
    model = lenet(LeNetConfig(), (3, 32, 32), 10)
    value = torch.rand(1, 3, 32, 32)
    for layer, module in zip(Architecture.of(model, (3, 32, 32), 10).chain(), model, strict=True):
        assert layer.input_shape == value.shape[1:]
        value = module(value)
        assert layer.output_shape == value.shape[1:]
        assert layer.kind == type(module).__name__


def test_functions_and_methods_are_part_of_the_chain():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 2)

        def forward(self, x):
            return self.layer(torch.flatten(x, 1).view(-1, 12))

    flatten, view, linear = Architecture.of(Model(), (3, 2, 2), 2).chain()
    assert flatten.is_one_of(RESHAPES)
    assert view.is_one_of(RESHAPES)
    assert not linear.is_one_of((*RESHAPES, *ELEMENTWISE))


def test_a_residual_sum_is_named_with_its_place():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(48, 2)

        def forward(self, x):
            return self.head((x + self.conv(x)).flatten(1))

    with pytest.raises(ArchitectureError, match=r"add.*step 2.*generator.name=mlp"):
        Architecture.of(Residual(), (3, 4, 4), 2).chain()


def test_an_image_that_does_not_fit_is_named():
    with pytest.raises(ArchitectureError, match=r"Linear.*\(3, 2, 2\)|Sequential.*\(3, 2, 2\)"):
        Architecture.of(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), (3, 2, 2), 2)


def test_control_flow_on_values_is_named():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ArchitectureError, match=r"Branching cannot be traced"):
        Architecture.of(Branching(), (3, 2, 2), 2)
