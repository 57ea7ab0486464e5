from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import pytest
import torch
import torchvision
from torch import fx, nn

from gitlight.architecture import ELEMENTWISE, IMAGE, MOVES, Architecture
from gitlight.config import LeNetConfig
from gitlight.leaked.lenet import lenet


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(48, 2)

    def forward(self, x):
        return self.head((x + self.conv(x)).flatten(1))


class Shared(nn.Module):
    """Two layers with one weight, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.sigmoid(self.first(x.flatten(1))))


def vision_transformer():
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12, "num_classes": 2}
    return torchvision.models.VisionTransformer(image_size=8, patch_size=4, **sizes)


def small_resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2)


def everything_in(value):
    """The value and, through dataclasses, mappings and sequences, all that it holds."""
    yield value
    if is_dataclass(value):
        held = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        held = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        held = value
    else:
        held = []
    for one in held:
        yield from everything_in(one)


@pytest.mark.parametrize(("make", "size"), [(vision_transformer, 8), (small_resnet, 32), (Residual, 4), (Shared, 2)])
def test_no_weight_survives(make, size):
    held = list(everything_in(Architecture.of(make(), (3, size, size), 2)))
    assert len(held) > 50
    assert not any(isinstance(one, torch.Tensor | nn.Module | fx.Node | fx.Graph) for one in held)


def test_names_shapes_and_order_are_those_of_the_parameters():
    model = lenet(LeNetConfig(), (3, 32, 32), 10)
    architecture = Architecture.of(model, (3, 32, 32), 10)
    assert list(architecture.parameter_shapes.items()) == [(name, p.shape) for name, p in model.named_parameters()]
    assert architecture.n_parameters == 15826


def test_parameters_that_are_not_trained_leak_no_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    architecture = Architecture.of(model, (1, 2, 2), 2)
    assert list(architecture.parameter_shapes) == ["2.weight", "2.bias"]
    assert dict(architecture["1"].parameters) == {}
    assert dict(architecture["1"].constants) == {"weight": "1.weight", "bias": "1.bias"}


def test_buffers_are_constants():
    layer = Architecture.of(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), (3, 2, 2), 2)["0"]
    assert dict(layer.parameters) == {"weight": "0.weight", "bias": "0.bias"}
    assert dict(layer.constants) == {"running_mean": "0.running_mean", "running_var": "0.running_var"}
    assert layer.arguments["training"] is False, "traced as it is attacked, in evaluation mode"


def test_the_chain_of_lenet_has_the_shapes_of_a_forward_pass():
    model = lenet(LeNetConfig(), (3, 32, 32), 10)
    kinds = {nn.Conv2d: "conv2d", nn.Sigmoid: "sigmoid", nn.Flatten: "flatten", nn.Linear: "linear"}
    value = torch.rand(1, 3, 32, 32)
    chain = Architecture.of(model, (3, 32, 32), 10).layers
    for layer, (name, module) in zip(chain, model.named_children(), strict=True):
        assert layer.name == name
        assert layer.input_shape == value.shape[1:]
        value = module(value)
        assert layer.output_shape == value.shape[1:]
        assert layer.kind == kinds[type(module)]


def test_functions_and_methods_are_part_of_the_chain():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 2)

        def forward(self, x):
            return self.layer(torch.flatten(x, 1).view(-1, 12))

    flatten, view, linear = Architecture.of(Model(), (3, 2, 2), 2).layers
    assert flatten.kind in MOVES
    assert view.kind in MOVES
    assert linear.kind not in (*MOVES, *ELEMENTWISE)


def test_arguments_have_names_and_defaults():
    layer = Architecture.of(nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 8, 8), 2).layers[0]
    wanted = {"stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "groups": 2}
    assert {name: layer.arguments[name] for name in wanted} == wanted
    assert layer.weight_shape == (6, 2, 3, 3)
    assert (layer.inputs, layer.roles) == ((IMAGE,), ("input",))


def test_a_residual_sum_is_named_with_its_place():
    architecture = Architecture.of(Residual(), (3, 4, 4), 2)
    assert architecture["add"].inputs == (IMAGE, "conv")
    assert architecture.chain_break is architecture["add"]
    assert architecture.chain_break.place == "add 'add'"


def test_operations_in_place_are_what_they_are_elsewhere():
    architecture = Architecture.of(small_resnet(), (3, 32, 32), 2)
    kinds = [layer.kind for layer in architecture.layers]
    assert (kinds.count("relu"), kinds.count("add")) == (9, 4)
    joined = next(layer for layer in architecture.layers if layer.kind == "add")
    assert [architecture[name].kind for name in joined.inputs] == ["batch_norm", "max_pool2d"]


def test_a_vision_transformer_is_traced_with_its_embeddings():
    architecture = Architecture.of(vision_transformer(), (3, 8, 8), 2)
    embedded = next(layer for layer in architecture.layers if layer.parameters.get("other"))
    assert (embedded.kind, embedded.output_shape) == ("add", (5, 8))
    assert dict(embedded.parameters) == {"other": "encoder.pos_embedding"}
    (attention,) = (layer for layer in architecture.layers if layer.kind == "scaled_dot_product_attention")
    assert attention.roles == ("query", "key", "value")
    assert attention.input_shapes == ((2, 5, 4),) * 3
    assert architecture.chain_break is not None
    used = {name for layer in architecture.layers for name in layer.parameters.values()}
    assert used == set(architecture.parameter_shapes)


def test_a_module_that_is_called_twice_is_two_layers_with_one_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(self.layer(x.flatten(1)))

    _, first, second = Architecture.of(Twice(), (3, 2, 2), 12).layers
    assert first.name != second.name
    assert first.name.startswith("layer.")
    assert second.name.startswith("layer.")
    assert second.inputs == (first.name,)
    assert dict(first.parameters) == dict(second.parameters) == {"weight": "layer.weight", "bias": "layer.bias"}


def test_a_weight_of_two_layers_leaks_one_gradient():
    architecture = Architecture.of(Shared(), (3, 2, 2), 12)
    assert list(architecture.parameter_shapes) == ["first.weight", "first.bias", "second.bias"]
    assert architecture["first"].parameters["weight"] == "first.weight"


def test_a_weight_of_two_layers_has_one_name():
    assert Architecture.of(Shared(), (3, 2, 2), 12)["second"].parameters["weight"] == "first.weight"


def test_activations_are_counted_where_they_are_computed():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 5))
    assert Architecture.of(model, (3, 2, 2), 5).n_activations == 12 + 8 + 8 + 5


def test_a_layer_gives_the_result_of_its_module_for_any_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6), nn.LeakyReLU(0.3)).eval()
    value = torch.rand(5, 4, 8, 8)
    for layer, module in zip(Architecture.of(model, (4, 8, 8), 2).layers, model, strict=True):
        before = value.clone()
        value = layer.apply([value], model.state_dict())
        torch.testing.assert_close(value, module(before))


def test_a_layer_of_many_inputs_takes_them_in_order():
    class Joined(nn.Module):
        def forward(self, x):
            return torch.cat([torch.sigmoid(x), x, torch.tanh(x)], dim=1)

    layer = Architecture.of(Joined(), (1, 2, 2), 2).layers[-1]
    inputs = [torch.rand(1, 1, 2, 2) for _ in range(3)]
    assert layer.inputs == ("sigmoid", IMAGE, "tanh")
    assert torch.equal(layer.apply(inputs, {}), torch.cat(inputs, dim=1))


def test_a_name_that_no_layer_has_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        Architecture.of(Residual(), (3, 4, 4), 2)["nothing"]


HEADS = {
    "log_softmax": [nn.LogSoftmax(dim=1)],
    "log_softmax of the last dimension": [nn.LogSoftmax(dim=-1)],
    "dropout": [nn.Dropout(0.5), nn.LogSoftmax(dim=1)],
    "moves": [nn.Unflatten(1, (5, 1, 1)), nn.Flatten()],
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_what_makes_no_difference_behind_the_logits_is_left_out(head):
    body = [nn.Flatten(), nn.Linear(12, 5)]
    with_head, without = (Architecture.of(nn.Sequential(*body, *rest), (3, 2, 2), 5) for rest in (head, []))
    assert [layer.kind for layer in with_head.layers] == ["flatten", "linear"]
    assert with_head.output == without.output == "1"


class Behind(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.linear = nn.Linear(12, 5)
        self.after = after

    def forward(self, x):
        return self.after(self.linear(x.flatten(1)))


@pytest.mark.parametrize(
    "after",
    [
        torch.relu,
        lambda z: z.log_softmax(0),
        lambda z: -z.log_softmax(1),
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1) + z,  # the logits are used once more
        lambda z: z.flip(1),
        lambda z: z[:, :4],
        lambda z: z.view(-1, 5, 1).expand(-1, 5, 5).flatten(1)[:, :5],
    ],
)
def test_what_changes_the_logits_is_not(after):
    n_classes = after(torch.zeros(1, 5)).shape[1]
    architecture = Architecture.of(Behind(after), (3, 2, 2), n_classes)
    assert len(architecture.layers) > 2
    assert architecture.output != "linear"


@pytest.mark.parametrize("after", [torch.squeeze, lambda z: z.squeeze().log_softmax(-1), lambda z: z.unsqueeze(0)])
def test_an_output_that_is_no_row_of_logits_stays_as_it_is(after):
    architecture = Architecture.of(Behind(after), (3, 2, 2), 5)
    assert architecture.output != "linear", "what drops the batch dimension is to be named"
