"""What changes in a model between calls of the engine, and what its runs change in it."""

import pytest
import torch
from exactness import N_CLASSES, Reversed, assert_are_autograds, assert_exact, autograd_loop, engine_of, pairs
from torch import nn


def test_a_hook_that_changes_values_changes_the_gradients():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Sigmoid(), nn.Linear(6, N_CLASSES))
    engine, (images, labels) = engine_of(network), pairs()
    plain = engine(images, labels)
    handle = network[1].register_forward_hook(lambda module, inputs, output: output * 3)
    assert_exact(network)
    assert not torch.allclose(engine(images, labels)["1.weight"], plain["1.weight"])
    handle.remove()
    assert torch.equal(engine(images, labels)["1.weight"], plain["1.weight"])


def test_a_replaced_module_is_followed():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Sigmoid(), nn.Linear(6, N_CLASSES)).double()
    engine, (images, labels) = engine_of(network), pairs()
    engine(images, labels)
    network[2] = nn.Tanh()
    found = engine(images, labels)
    assert_are_autograds(found, network, images, labels)


def test_hooks_and_modules_that_take_each_others_place_are_told_apart():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Sigmoid(), nn.Linear(6, N_CLASSES)).double()
    engine, (images, labels) = engine_of(network), pairs()
    seen = []
    watching = network[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    engine(images, labels)
    watching.remove()
    changing = network[1].register_forward_hook(lambda module, inputs, output: output * 3)

    def check():
        found = engine(images, labels)
        assert_are_autograds(found, network, images, labels)

    check()
    changing.remove()
    for other in (nn.Tanh, nn.Softplus, nn.ELU, nn.SiLU):  # memory of one may be the next one's
        network[2] = other()
        check()


class Counting(nn.Module):
    """Counts its runs in a buffer, which its output depends on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, N_CLASSES)
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(48))

    def forward(self, images):
        self.runs += 1
        self.seen.mul_(0.9).add_(1)
        return self.layer(images.flatten(1) * self.seen) * (1 + 0.1 * self.runs)


@pytest.mark.parametrize("method", ["auto", "captured", "vmap", "loop"])
def test_buffers_that_a_model_overwrites_are_not_the_models_own(method):
    torch.manual_seed(0)
    network = Counting()
    engine, (images, labels) = engine_of(network, method), pairs()
    first = engine(images, labels)
    again = {name: gradient.clone() for name, gradient in first.items()}
    assert network.runs == 0
    assert not network.seen.any()
    for name, gradient in engine(images, labels).items():
        assert torch.equal(gradient, again[name]), name
    for name, wanted in autograd_loop(network, images[:1], labels[:1]).items():
        assert torch.allclose(again[name][:1], wanted, rtol=1e-10, atol=1e-13), name


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.temperature, self.between = nn.Linear(48, N_CLASSES), 1.0, ("tanh", 2)

    def forward(self, images):
        return getattr(torch, self.between[0])(self.layer(images.flatten(1)) / self.temperature)


@pytest.mark.parametrize("method", ["captured", "vmap", "loop"])
def test_a_modules_attributes_are_followed(method):
    torch.manual_seed(0)
    network = nn.Sequential(nn.LeakyReLU(0.1), Tempered())
    engine, (images, labels) = engine_of(network, method), pairs()
    images = images - 0.5
    for change in (
        lambda: None,
        lambda: setattr(network[1], "temperature", 3.0),
        lambda: setattr(network[0], "negative_slope", 0.5),
        lambda: setattr(network[1], "between", ("sin", 2)),
    ):
        change()
        found = engine(images, labels)
        assert_are_autograds(found, network, images, labels)


class CountsInPython(nn.Module):
    """Cannot be captured, and changes an attribute whenever it runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.runs = nn.Linear(48, N_CLASSES), 0

    def forward(self, images):
        self.runs += 1
        return Reversed.apply(self.layer(images.flatten(1)))


def test_what_is_refused_is_not_tried_again_for_what_its_runs_change(caplog):
    caplog.set_level("INFO", logger="gitlight")
    network = CountsInPython()
    engine = engine_of(network)
    for _ in range(3):
        engine(*pairs())
    assert network.runs > 1
    assert len([record for record in caplog.records if "Gradients are made by vmap" in record.getMessage()]) == 1


def assert_right_after_changes(network, method):
    """Gradients are autograd's of each leak by a fresh copy, before and after the weights change."""
    engine, (images, labels) = engine_of(network, method), pairs()
    for _ in range(2):
        found = engine(images, labels)
        for number in range(len(images)):
            part = slice(number, number + 1)
            for name, wanted in autograd_loop(network, images[part], labels[part]).items():
                assert torch.allclose(found[name][part], wanted, rtol=1e-10, atol=1e-13), name
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(0.9)


class Caching(nn.Module):
    """Computes from its parameters once, in evaluation mode, and keeps the results: in a dict, bare, and in a tuple."""

    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Linear(48, N_CLASSES), nn.Parameter(torch.rand(3, N_CLASSES))
        self.kept, self.scale, self.runs = {"one": torch.ones(())}, None, 0

    def forward(self, images):
        self.runs += 1
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[[0, 2]].sum(0)
            self.scale, self.pair = self.bias[1].exp(), (self.bias[2].tanh(), 1)
        return (self.layer(images.flatten(1)) * self.scale + self.kept["bias"] * self.kept["one"]).tanh() * self.pair[0]


@pytest.mark.parametrize("method", ["auto", "captured", "vmap", "loop"])
def test_what_a_model_keeps_of_a_run_is_not_used_in_the_next(method):
    torch.manual_seed(0)
    network = Caching().eval()
    assert_right_after_changes(network, method)
    assert network.scale is None
    assert set(network.kept) == {"one"}
    assert network.runs == 0


class Sized(nn.Module):
    """Keeps a table with the size that it was made for, a list with what the sizes were, and a gain in a dict."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(48, N_CLASSES), nn.Parameter(torch.rand(N_CLASSES))
        self.size, self.sizes = None, []

    def forward(self, images):
        if self.size != images.shape[1:] or self.table.device != images.device:
            self.size = images.shape[1:]
            self.table = torch.arange(N_CLASSES, dtype=images.dtype).cos()
            self.kept = {"gains": [self.gain.exp()]}
            self.sizes.append((self.size, self.gain.square()))
        return self.layer(images.flatten(1)) * self.table * self.kept["gains"][0] * self.sizes[-1][1]


@pytest.mark.parametrize("method", ["auto", "captured", "vmap", "loop"])
def test_sizes_beside_what_a_model_keeps_go_with_it(method):
    torch.manual_seed(0)
    network = Sized().eval()
    assert_right_after_changes(network, method)
    assert (network.size, network.sizes) == (None, [])
