"""Graphs that rules take apart, with positions and overwritten activations, and what is left to vmap."""

import logging
import re

import pytest
import torch
from captured_checks import N_CLASSES, SHAPE, check, randomise_norms
from torch import nn
from torch.nn import functional as F

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.errors import ConfigError
from gitlight.gradients import selection
from gitlight.gradients.engine import GradientEngine


class Overwriting(nn.Module):
    """Positions, ahead of the images or behind them, whose activations are overwritten."""

    def __init__(self, ahead):
        super().__init__()
        self.patches, self.ahead = nn.Conv2d(3, 6, 4, 4), ahead
        self.inner, self.outer, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)
        self.gate, self.head = nn.Linear(6, 6), nn.Linear(6, N_CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x.transpose(0, 1) if self.ahead else x
        y = self.outer(F.relu(self.inner(x), inplace=True))
        y += x
        y = self.gate(self.norm(y.mul_(1.5))).tanh_()
        return self.head((y.transpose(0, 1) if self.ahead else y)[:, 0])


@pytest.mark.parametrize("ahead", [False, True])
def test_activations_that_are_overwritten(ahead):
    torch.manual_seed(0)
    check(Overwriting(ahead), 2)


@torch.library.custom_op("gitlight_tests::gelu", mutates_args=())
def another_gelu(x: torch.Tensor) -> torch.Tensor:
    """An operation of another library, by a name that PyTorch has too, which mixes positions."""
    return x - x.mean(1, keepdim=True)


another_gelu.register_fake(torch.empty_like)
another_gelu.register_autograd(lambda _, delta: delta - delta.mean(1, keepdim=True))


class OfPositions(nn.Module):
    """Patches as positions, something done to them, and a linear layer."""

    def __init__(self, operation):
        super().__init__()
        self.patches, self.first, self.second = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, kdim=8, vdim=8, batch_first=True)
        self.context, self.place = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 6))
        self.head, self.operation = nn.Linear(6, N_CLASSES), operation

    def forward(self, x):
        return self.head(self.operation(self, self.first(self.patches(x).flatten(2).transpose(1, 2))))


OPERATIONS = {
    "cross-attention": lambda m, x: m.attention(x, *[m.context(x.flip(1))] * 2, need_weights=False)[0][:, 1],
    "selected, then viewed": lambda m, x: (
        x.unflatten(1, (4, 4)).permute(0, 2, 3, 1).contiguous()[:, 0].view(-1, 24)[:, :6]
    ),
    "reinterpreted": lambda m, x: x[:, 0] * (x.detach().float().view(torch.int32)[:, 1] > 1056964608).to(x.dtype),
    "of another library": lambda m, x: another_gelu(x)[:, 0] + x[:, 1],
    "no positions": lambda m, x: F.gelu(x[:, :, :0]).flatten(2)[:, 1].sum(1, keepdim=True) + x[:, 0],
    "an alias of what positions are ahead in": lambda m, x: aliased(m.second(x.tanh().transpose(0, 1))),
}


def aliased(y):
    y.reshape(-1, 6).mul_(0.5)
    return (y**2).sum(0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_positions(operation):
    torch.manual_seed(0)
    network = OfPositions(OPERATIONS[operation])
    used = [
        name
        for name, _ in network.named_parameters()
        if operation == "cross-attention"
        or name.split(".")[0] in ("patches", "first", "head")
        or (name.startswith("second") and operation.startswith("an alias"))
    ]
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in used and name != "attention.in_proj_bias")
    check(network, 2)


def test_a_parameter_where_its_rule_does_not_look_is_named():
    network = OfPositions(lambda m, x: F.linear(m.place, x[:, 0]).t()[:, :1] + x[:, 0])
    settings = GradientsConfig(method="captured")
    with pytest.raises(ConfigError, match="takes a parameter as input"):
        GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), settings)(
            torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64)
        )


def test_a_graph_whose_selections_cannot_be_moved_is_left_to_vmap(monkeypatch, caplog):
    def fails(graph):
        raise RuntimeError("no such size")

    monkeypatch.setattr(selection, "select_early", fails)
    network = OfPositions(lambda m, x: x[:, 0])
    with caplog.at_level(logging.INFO):
        check(network, method="auto")
    assert "vmap: a selection of positions cannot be moved: no such size" in caplog.text


class Merged(nn.Module):
    """Merges the batch with positions, positions first, as torch's attention does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 5)
        self.head = nn.Linear(5, N_CLASSES)

    def forward(self, images):
        x = images.flatten(1, 2).transpose(0, 1)  # rows, images, columns
        x = self.inner(x.reshape(-1, 16)).tanh()
        return self.head(x.view(48, images.shape[0], 5).mean(0))


def test_batches_merged_with_another_dimension():
    torch.manual_seed(0)
    check(Merged(), 2)


class OneBufferTwice(nn.Module):
    """Has one buffer under two names, and uses the second alone."""

    def __init__(self):
        super().__init__()
        scale = torch.rand(768)
        self.register_buffer("scale", scale)
        self.register_buffer("same_scale", scale)
        self.head = nn.Linear(768, N_CLASSES)

    def forward(self, images):
        return self.head(images.flatten(1) * self.same_scale)


def test_buffers_that_have_several_names():
    torch.manual_seed(0)
    check(OneBufferTwice(), 2)
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(norm, nn.Tanh(), norm, nn.Flatten(), nn.Linear(768, N_CLASSES)).eval()
    randomise_norms(network)
    check(network, 2)


class TwoViews(nn.Module):
    """Puts two copies of the batch together, as siamese networks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 16)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, N_CLASSES)

    def forward(self, images):
        both = self.norm(self.conv(torch.cat([images, images.flip(3)])))
        views = both.view(2, images.shape[0], 4)
        return self.head(views[0].tanh() * views[1].sigmoid())


class Centred(nn.Module):
    """Ties the images of a batch together by an operation without parameters."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, N_CLASSES)

    def forward(self, images):
        logits = self.head(images.flatten(1))
        return logits - logits.mean(0)


@pytest.mark.parametrize(
    ("network", "problem"), [(TwoViews(), "not in its outermost dimension"), (Centred(), "ties images together")]
)
def test_batches_that_a_rule_would_take_apart_wrongly_are_left_to_vmap(network, problem):
    network.eval()
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, *SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.randint(N_CLASSES, (4, 2), generator=generator)

    def made(method):
        return GradientEngine(network, architecture, GradientsConfig(method=method, dtype="float64"))(images, labels)

    wanted = made("loop")
    for name, gradient in made("auto").items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-14)
    with pytest.raises(ConfigError, match=problem):
        made("captured")


class SeenTwice(nn.Module):
    """Adds a parameter to what another tensor is a view of."""

    def __init__(self):
        super().__init__()
        self.first, self.bias, self.head = nn.Linear(768, 6), nn.Parameter(torch.rand(6)), nn.Linear(6, N_CLASSES)

    def forward(self, images):
        hidden = self.first(images.flatten(1))
        halves = hidden.unflatten(1, (2, 3))
        hidden += self.bias
        return self.head(halves.tanh().flatten(1))


class Counting(nn.Sequential):
    """Takes the number of images for a plain one."""

    def forward(self, images):
        return super().forward(images.view(len(images), -1))


class Wrapper(nn.Module):
    """Hands on all that it is given, as DataParallel and many a decorator do."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *images, **more):
        return self.network(*images, **more)


def test_a_wrapped_network_is_captured():
    check(Wrapper(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(784, N_CLASSES))), 2)


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Dropout(0.5), nn.Linear(8, 4)), "dropout '2'"),
        (nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)), "batch_norm '1'"),
        (Counting(nn.Linear(768, 4)), r"a constant, as len\(images\) does, and images.shape\[0\] does not"),
        (SeenTwice(), "add_ 'add_' uses a parameter, and there is no rule for add_"),
    ],
)
def test_what_has_no_rule_is_named_and_left_to_vmap(network, named, caplog):
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    images, labels = torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64)
    network.train()
    with pytest.raises(ConfigError, match=rf"gradients.method: captured does not fit.*{named}"):
        GradientEngine(network, architecture, GradientsConfig(method="captured"))(images, labels)
    if "batch_norm" in named:
        return  # changes its statistics in place, which vmap refuses
    with caplog.at_level(logging.INFO, logger="gitlight.gradients.engine"):
        engine = GradientEngine(network, architecture, GradientsConfig())
        engine(images, labels)
        engine(images, labels)
    (message,) = [r.message for r in caplog.records if r.name == "gitlight.gradients.engine"]
    assert re.search(named, message)
