import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gitlight.config import GivenConfig, GradientsConfig, LeNetConfig
from gitlight.errors import ArchitectureError, ConfigError
from gitlight.exported import export_bare
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.lenet import lenet
from gitlight.leaked.model import LeakedModel


def test_the_model_itself_is_left_alone():
    model = lenet(LeNetConfig(), (3, 32, 32), 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_bare(model, (3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_hooks_on_the_model_do_not_fire_and_stay():
    model, fired = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), []
    model.register_forward_hook(lambda *_: fired.append("forward"))
    model[1].register_forward_pre_hook(lambda *_: fired.append("before"))
    model[1].register_full_backward_hook(lambda *_: fired.append("backward"))
    export_bare(model, (3, 2, 2))
    assert not fired
    model(torch.rand(1, 3, 2, 2, requires_grad=True)).sum().backward()
    assert fired == ["before", "forward", "backward"]


def test_an_image_that_does_not_fit_is_named():
    with pytest.raises(ArchitectureError, match=r"Sequential .*\(3, 2, 2\)"):
        export_bare(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), (3, 2, 2))


def test_a_model_that_returns_several_tensors_is_named():
    class Several(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ArchitectureError, match=r"Several returns tuple, not one tensor of logits\. Wrap it"):
        export_bare(Several(), (3, 2, 2))


class Doing(nn.Module):
    """Does something with its input on the way."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(12, 2), what

    def forward(self, x):
        self.what(x)
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: 1 if x.sum() > 0 else 2,
        lambda x: f"{x.mean():.3f}",
        lambda x: x[x > 0],
        lambda x: x.data_ptr(),
    ],
    ids=["numpy", "asarray", "tolist", "item", "branch", "format", "mask", "pointer"],
)
def test_a_model_that_needs_values_is_named_with_the_line_and_what_to_do(what):
    line = what.__code__.co_firstlineno
    with pytest.raises(ArchitectureError) as raised:
        export_bare(Doing(what), (3, 2, 2))
    message = str(raised.value)
    assert message.startswith("Doing cannot be traced by torch.export: ")
    assert f"(test_exported.py, line {line}). A model whose control flow depends on values" in message
    assert message.endswith("Compute with tensors alone, as torch.where does.")
    assert "meta_nonzero" not in message


class Normalised(nn.Module):
    """Holds a tensor that is no buffer, and makes one on no device in particular."""

    def __init__(self):
        super().__init__()
        self.layer, self.mean = nn.Linear(12, 2), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)

    def forward(self, x):
        return self.layer(((x - self.mean) * torch.arange(1, 3)).flatten(1))


def test_tensors_that_do_not_follow_the_model_to_another_device_are_traced():
    leaked = LeakedModel(GivenConfig(), (3, 2, 2), 2, network=Normalised())
    assert [layer.kind for layer in leaked.architecture.layers] == ["sub", "arange", "mul", "flatten", "linear"]
    images, labels = torch.rand(2, 2, 3, 2, 2), torch.tensor([[0, 1], [1, 1]])
    for method in ("captured", "vmap", "loop"):
        engine = GradientEngine(leaked.network, leaked.architecture, GradientsConfig(method=method))
        error = (leaked(images[0]).softmax(1) - torch.eye(2)).mean(0)
        torch.testing.assert_close(engine(images, labels)["layer.bias"][0], error)


class Autocasting(nn.Module):
    """A region that autocasts, or is kept from it, on whatever device the images are."""

    def __init__(self, enabled):
        super().__init__()
        self.first, self.last, self.enabled = nn.Linear(12, 4), nn.Linear(4, 2), enabled

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.enabled):
            hidden = self.first(x.flatten(1)).tanh()
        return self.last(hidden.to(x.dtype))


@pytest.mark.parametrize("enabled", [False, True])
def test_regions_of_autocast_are_traced_and_captured_where_they_switch_it_off(enabled):
    torch.manual_seed(0)
    leaked = LeakedModel(GivenConfig(), (3, 2, 2), 2, network=Autocasting(enabled))
    assert [layer.kind for layer in leaked.architecture.layers if layer.kind != "to"] == [
        "flatten", "linear", "tanh", "linear",
    ]  # fmt: skip
    images, labels = torch.rand(2, 2, 3, 2, 2), torch.tensor([[0, 1], [1, 1]])

    def gradients(method):
        engine = GradientEngine(leaked.network, leaked.architecture, GradientsConfig(method=method))
        return engine(images, labels)["first.weight"]

    if enabled:
        torch.testing.assert_close(gradients("auto"), gradients("loop"), rtol=0.05, atol=0.01)
        with pytest.raises(ConfigError, match="captured does not fit"):
            gradients("captured")
    else:
        torch.testing.assert_close(gradients("captured"), gradients("loop"))
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == torch.bfloat16


class Plain:
    def __init__(self, *held):
        self.held = held


def held_otherwise():
    layer = nn.Linear(2, 2)
    return {
        "list": [layer],
        "dict": {"a": layer},
        "list of lists": [[layer]],
        "set": {layer},
        "object": Plain(layer),
    }


@pytest.mark.parametrize("how", held_otherwise())
def test_layers_that_pytorch_does_not_see_are_named_with_what_to_do(how):
    class Listed(Normalised):
        def forward(self, x):
            return super().forward(first_layer(self.held)(x))

    model = nn.Sequential(Listed())
    model[0].held = held_otherwise()[how]
    with pytest.raises(ArchitectureError, match=r"^0\.held of Sequential is a \w+ with layers .*ModuleList"):
        export_bare(model, (3, 2, 2))


def first_layer(held):
    if isinstance(held, nn.Module):
        return held
    held = held.held if isinstance(held, Plain) else held.values() if isinstance(held, dict) else held
    return first_layer(next(iter(held)))


def test_layers_that_are_held_and_not_used_are_none_of_its_business():
    model = Normalised()
    model.teacher, model.owner = (nn.Linear(2, 2),), [nn.Sequential(model)]
    assert export_bare(model, (3, 2, 2)).graph.nodes


@pytest.mark.parametrize("moved", [False, True])
def test_a_tensor_that_is_trained_and_no_parameter_is_named(moved):
    class Loose(Normalised):
        def forward(self, x):
            return super().forward(x @ (self.mixed.to(x.device) if moved else self.mixed))

    model = nn.Sequential(Loose())
    model[0].mixed = torch.rand(2, 2, requires_grad=True)
    with pytest.raises(ArchitectureError, match=r"^0\.mixed of Sequential has requires_grad and is no parameter: "):
        export_bare(model, (3, 2, 2))


class TakingOut(Normalised):
    def forward(self, x):
        return super().forward(x * self.mean.sum().item())


def test_values_taken_out_beside_tensors_of_the_models_own_are_named_with_the_line():
    line = TakingOut.forward.__code__.co_firstlineno + 1
    with pytest.raises(ArchitectureError, match=rf"takes a value out of a tensor \(test_exported.py, line {line}\)\."):
        export_bare(TakingOut(), (3, 2, 2))


class OfTwo(Normalised):
    def forward(self, x):
        return super().forward(x), x


def test_a_model_that_makes_tensors_of_its_own_and_returns_several_is_named():
    with pytest.raises(ArchitectureError, match="OfTwo returns tuple, not one tensor of logits"):
        export_bare(OfTwo(), (3, 2, 2))


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        (lambda x: x.nothing, "AttributeError: 'Tensor' object has no attribute 'nothing'"),
        (lambda x: {}[3], "KeyError: 3"),
        (lambda x: x @ torch.zeros(5, 5, device=x.device), "mat1 and mat2|same reduction dim"),
    ],
    ids=["attribute", "key", "shape"],
)
def test_a_model_that_fails_on_every_image_is_told_how(what, cause):
    with pytest.raises(ArchitectureError) as raised:
        export_bare(Doing(what), (3, 2, 2))
    message = str(raised.value)
    assert message.startswith("Doing does not accept an image of shape (3, 2, 2) (channels, height, width): ")
    assert re.search(cause, message)
    assert message.endswith(f"(test_exported.py, line {what.__code__.co_firstlineno}).")


class WithParameter(nn.Module):
    def __init__(self, parameter):
        super().__init__()
        self.layer, self.given = nn.Linear(12, 2), parameter

    def forward(self, x):
        return self.layer(x.flatten(1)) * self.given.abs()


def with_weight_from(reparametrise):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    reparametrise(model[1])
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WithParameter(nn.Parameter(torch.ones(2, dtype=torch.complex64))), "'given' of WithParameter is complex"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), r"'1\.weight' of Sequential has no shape yet"),
        (with_weight_from(nn.utils.weight_norm), r"module '1' of Sequential .*parametrizations\.weight_norm"),
        (with_weight_from(nn.utils.spectral_norm), r"module '1' of Sequential .*parametrizations\.spectral_norm"),
        (with_weight_from(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), r"'1' .*prune\.remove"),
        (torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)), r"compiled by torch\.jit"),
        (WithParameter(2 * torch.ones(2, requires_grad=True)), "WithParameter cannot be copied: Only Tensors"),
    ],
    ids=["complex", "lazy", "weight norm", "spectral norm", "pruned", "jit", "computed"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Lazy modules")
def test_what_cannot_be_traced_is_named_with_what_to_do(model, message):
    with pytest.raises(ArchitectureError, match=message):
        export_bare(model, (3, 2, 2))
    with pytest.raises(ArchitectureError, match=message):
        LeakedModel(GivenConfig(), (3, 2, 2), 2, network=model)


def test_a_pruned_model_is_traced_once_its_masks_are_permanent():
    model = with_weight_from(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))
    prune.remove(model[1], "weight")
    assert set(export_bare(model, (3, 2, 2)).state_dict) == {"1.weight", "1.bias"}
