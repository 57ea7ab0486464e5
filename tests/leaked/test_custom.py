import copy
import sys

import pytest
import torch
from plain_autograd import plain_gradients, relative_error
from torch import nn

from gitlight.config import CustomConfig, GivenConfig, GradientsConfig
from gitlight.errors import ArchitectureError, ConfigError
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 8, 8)

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, n_classes=10):
        super().__init__()
        self.hidden, self.act = nn.Linear(192, width), nn.ReLU()
        self.head = nn.Linear(width, n_classes)

    def forward(self, images):
        return self.head(self.act(self.hidden(images.flatten(1))))

def deep(widths):
    return Net(width=sum(widths))

def broken():
    raise RuntimeError("no such preset")

def text():
    return "a model"

ready = Net()
constant = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module ``nets_of_mine.models`` in the current folder."""
    (tmp_path / "nets_of_mine").mkdir()
    (tmp_path / "nets_of_mine" / "models.py").write_text(SOURCE)
    (tmp_path / "nets_of_mine" / "needs_more.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "nets_of_mine.models"
    for name in [name for name in sys.modules if name.startswith("nets_of_mine")]:
        del sys.modules[name]


def build(target, **settings):
    return LeakedModel(CustomConfig(target=target, **settings), SHAPE, 10)


@pytest.mark.parametrize("separator", [".", ":"])
def test_a_class_is_found_by_its_path_from_the_current_folder(package, separator):
    leaked = build(f"{package}{separator}Net", arguments={"width": 7})
    assert leaked.network.hidden.weight.shape == (7, 192)
    assert isinstance(leaked.network.act, nn.ReLU)
    assert not any(parameter.requires_grad for parameter in leaked.parameters())


def test_a_function_may_build_it(package):
    assert build(f"{package}.deep", arguments={"widths": [2, 3]}).network.head.in_features == 5


def test_its_own_initial_weights_are_seeded(package):
    torch.manual_seed(4)
    wanted = nn.Linear(192, 4).weight
    assert torch.equal(build(f"{package}.Net", seed=4).network.hidden.weight, wanted)


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        (None, {}, r"leaked.target: None: .*package.module:Class"),
        ("Net", {}, r"leaked.target: 'Net': .*package.module:Class"),
        ("nets_of_mine.modles.Net", {}, r"there is no module 'nets_of_mine.modles', neither installed nor in the cur"),
        ("nowhere_at_all:Net", {}, r"there is no module 'nowhere_at_all'"),
        (
            "nets_of_mine.needs_more:Net",
            {},
            r"importing nets_of_mine.needs_more fails with ModuleNotFoundError.*nobody",
        ),
        ("nets_of_mine.models:Nett", {}, r"nets_of_mine.models has no 'Nett'\. Did you mean Net\?"),
        ("nets_of_mine.models:constant", {}, r"constant is int, not a class or a function"),
        ("nets_of_mine.models:ready", {}, r"ready is Net, not a class or a function"),
        ("nets_of_mine.models:Net", {"depth": 3}, r"Net\(depth=3\) fails with TypeError: .*'depth'.*leaked.arguments"),
        ("nets_of_mine.models:broken", {}, r"broken\(\) fails with RuntimeError: no such preset"),
        ("nets_of_mine.models:text", {}, r"text\(\) returns str, not a torch.nn.Module"),
    ],
)
def test_a_mistake_is_one_message(package, target, arguments, words):
    with pytest.raises(ConfigError, match=words):
        build(target, arguments=arguments)


def test_another_number_of_classes_is_named(package):
    with pytest.raises(ArchitectureError, match=r"Net puts out 7 values per image.* 10 classes.*\(B, 10\)"):
        build(f"{package}.Net", arguments={"n_classes": 7})


def test_a_model_that_loses_the_batch_is_named():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, images):
            return self.linear(images.flatten(1)).squeeze()

    with pytest.raises(ArchitectureError, match=r"Squeezed ends in a squeeze .* drops the batch dimension"):
        LeakedModel(GivenConfig(), SHAPE, 10, network=Squeezed())


def test_an_activation_that_cannot_be_replaced_is_named():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(ConfigError, match=r"leaked.activation: Sequential has no activation module that tanh"):
        LeakedModel(GivenConfig(activation="tanh"), SHAPE, 10, network=network)


class Dropping(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.functional = functional
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(192, 10)

    def forward(self, images):
        values = images.flatten(1)
        return self.linear(nn.functional.dropout(values) if self.functional else self.dropout(values))


def test_dropout_is_inactive():
    leaked = LeakedModel(GivenConfig(), SHAPE, 10, network=Dropping(functional=False).train())
    engine = GradientEngine(leaked.network, leaked.architecture, GradientsConfig())
    images, labels = torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64)
    first, second = engine(images, labels), engine(images, labels)
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())


def test_dropout_that_no_mode_switches_off_is_named():
    with pytest.raises(ArchitectureError, match=r"dropout .* drops values at random in evaluation mode.*self.training"):
        LeakedModel(GivenConfig(), SHAPE, 10, network=Dropping(functional=True))


class Computing(nn.Module):
    """Computes something with its image on the way."""

    def __init__(self, compute):
        super().__init__()
        self.compute, self.linear = compute, nn.Linear(192, 10)

    def forward(self, images):
        return self.linear(self.compute(images.flatten(1)))


def attention(dropout):
    def compute(values):
        maps = values.unflatten(1, (1, 8, 24))
        return nn.functional.scaled_dot_product_attention(maps, maps, maps, dropout_p=dropout).flatten(1)

    return compute


def with_random_mask(values):
    return values * torch.empty_like(values).bernoulli_(torch.sigmoid(values))


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (lambda values: values + torch.randn_like(values), "randn_like"),
        (lambda values: values + torch.rand(192, device=values.device), "rand"),
        (lambda values: values[:, torch.randperm(192, device=values.device)], "randperm"),
        (lambda values: values * torch.bernoulli(torch.sigmoid(values)), "bernoulli"),
        (with_random_mask, "bernoulli"),
        (lambda values: nn.functional.rrelu(values, training=True), "rrelu"),
        (nn.functional.gumbel_softmax, "exponential"),
    ],
    ids=["noise", "made alone", "order", "bernoulli", "in place", "rrelu", "gumbel"],
)
def test_random_numbers_that_no_mode_switches_off_are_named(compute, named):
    with pytest.raises(ArchitectureError, match=rf"^{named} '.*' of the leaked model draws random .*self.training"):
        LeakedModel(GivenConfig(), SHAPE, 10, network=Computing(compute))


@pytest.mark.parametrize(
    "compute",
    [
        lambda values: nn.functional.dropout(values, training=False),
        lambda values: nn.functional.dropout(values, 0.0),
        lambda values: nn.functional.rrelu(values, training=False),
        attention(0.0),
    ],
    ids=["dropout off", "dropout of nothing", "rrelu", "attention"],
)
def test_what_could_draw_random_numbers_and_does_not_is_let_through(compute):
    LeakedModel(GivenConfig(), SHAPE, 10, network=Computing(compute))


def test_attention_that_drops_values_is_named_as_dropout():
    with pytest.raises(ArchitectureError, match=r"scaled_dot_product_attention .* drops values at random in"):
        LeakedModel(GivenConfig(), SHAPE, 10, network=Computing(attention(0.2)))


class Tied(nn.Module):
    """One matrix used twice, once transposed, as two modules' weight; and one module used three times."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(192, 6, bias=False), nn.Linear(6, 192)
        self.tied = nn.Linear(192, 6)
        self.tied.weight = self.enter.weight
        self.repeated, self.head = nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, images):
        hidden = torch.tanh(self.enter(images.flatten(1)))
        hidden = torch.tanh(self.tied(self.leave(hidden) + hidden @ self.enter.weight))
        for _ in range(3):
            hidden = torch.tanh(self.repeated(hidden))
        return self.head(hidden)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_shared_parameters_and_repeated_modules_have_their_gradients_summed(method):
    torch.manual_seed(0)
    leaked = LeakedModel(GivenConfig(), SHAPE, 10, network=Tied())
    images, labels = torch.rand(4, 2, *SHAPE), torch.randint(10, (4, 2))
    settings = GradientsConfig(method=method, dtype="float64")
    found = GradientEngine(leaked.network, leaked.architecture, settings)(images, labels)
    reference = copy.deepcopy(leaked.network).double().requires_grad_(True)
    assert "tied.weight" not in found
    assert relative_error(found, plain_gradients(reference, images, labels)) < 1e-10


def test_parameters_that_the_user_froze_do_not_leak():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Tanh(), nn.Linear(5, 10))
    network[1].requires_grad_(False)
    leaked = LeakedModel(GivenConfig(), SHAPE, 10, network=network.double())
    assert list(leaked.architecture.parameter_shapes) == ["3.weight", "3.bias"]
    assert leaked(torch.rand(2, *SHAPE)).dtype == torch.float32


def test_a_network_without_parameters_leaks_nothing():
    with pytest.raises(ArchitectureError, match="Sequential has no parameters, so no gradient leaks"):
        LeakedModel(GivenConfig(), SHAPE, 192, network=nn.Sequential(nn.Flatten()))


@pytest.mark.parametrize("zeros", [True, False])
def test_a_last_layer_of_zeros_is_pointed_out(zeros, caplog):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 5))
    if zeros:
        nn.init.zeros_(network[3].weight)
    LeakedModel(GivenConfig(), (3, 4, 4), 5, network=network)
    told = "3.weight of the leaked model's last layer is all zeros" in caplog.text
    assert told == zeros


@pytest.mark.parametrize(("factor", "told"), [(2, True), (None, False)])
def test_hooks_that_change_values_are_pointed_out(factor, told, caplog):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 5))
    network[1].register_forward_hook(lambda _module, _inputs, output: output * factor if factor else None)
    LeakedModel(GivenConfig(), (3, 4, 4), 5, network=network)
    assert ("change what it puts out (hooks of 1)" in caplog.text) == told
