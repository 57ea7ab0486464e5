"""Torchvision's families, and operations without a rule of their own, are captured: exact, in one backward pass."""

import pytest
import torch
from exactness import autograd_loop
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.gradients import layer_gradients
from gitlight.gradients.engine import GradientEngine

N_CLASSES = 4


def check(network, shape, dtype="float64", tolerance=1e-9, client_batch_size=2):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    network.eval()
    torch.manual_seed(1)
    images, labels = torch.rand(3, client_batch_size, *shape), torch.randint(N_CLASSES, (3, client_batch_size))
    settings = GradientsConfig(method="captured", dtype=dtype)
    found = GradientEngine(network, Architecture.of(network, shape, N_CLASSES), settings)(images, labels)
    wanted = autograd_loop(network, images, labels)
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / (gradient.norm() + 1e-6 * largest)
        assert error < tolerance, (name, error)


FAMILIES = {
    "mobilenet_v2": lambda: models.MobileNetV2(N_CLASSES, 0.25, [[1, 8, 1, 1], [6, 12, 2, 2]]),
    "mobilenet_v3": lambda: models.MobileNetV3(
        [InvertedResidualConfig(16, 3, 24, 16, True, "HS", 1, 1, 1)], 32, N_CLASSES
    ),
    "squeezenet": lambda: models.squeezenet1_1(num_classes=N_CLASSES),
    "shufflenet": lambda: models.ShuffleNetV2([2, 1, 1], [8, 16, 16, 16, 32], N_CLASSES),
    "densenet": lambda: models.DenseNet(8, (2, 2), 8, num_classes=N_CLASSES),
    # Windows of 4×4 that are shifted: their mask and bias are added to windows that are merged with the images.
    "swin": lambda: models.SwinTransformer([2, 2], 12, [2, 2], [2, 2], [4, 4], num_classes=N_CLASSES),
    "convnext": lambda: models.ConvNeXt([models.convnext.CNBlockConfig(12, None, 2)], num_classes=N_CLASSES),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_torchvisions_families_have_the_gradients_of_the_float64_loop(family):
    torch.manual_seed(0)
    check(FAMILIES[family](), (3, 32, 32))


def parameter(*shape):
    return nn.Parameter(0.5 + torch.rand(shape))


class Between(nn.Module):
    """A convolution, an operation with parameters, and a linear layer."""

    def __init__(self, operation, **parameters):
        super().__init__()
        self.first, self.operation = nn.Conv2d(3, 6, 3, stride=2), operation
        for name, value in parameters.items():
            setattr(self, name, value)
        images = torch.zeros(2, 3, 9, 11)
        self.last = nn.Linear(operation(self, self.first(images)).flatten(1).shape[1], N_CLASSES)

    def forward(self, images):
        return self.last(self.operation(self, self.first(images).tanh()).flatten(1))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def windows(x):
    """Two windows of each map, as further examples behind the images'."""
    return x[..., :4].unflatten(3, (2, 2)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def overwritten(module, x):
    maps = (x + 2).mul_(module.a).add_(module.a, alpha=3)
    rows = F.dropout(tokens(maps), training=False)
    rows += module.b
    rows /= module.c
    return rows


OPERATIONS = {
    "prelu": lambda: Between(lambda m, x: m.many(m.one(x)), one=nn.PReLU(), many=nn.PReLU(6, 0.3)),
    "quotient": lambda: Between(lambda m, x: (x + 2) / m.b / m.t, b=parameter(6, 1, 1), t=parameter()),
    "numerator": lambda: Between(lambda m, x: m.a / (x + 2), a=parameter(6, 1, 1)),
    "power": lambda: Between(lambda m, x: (x + 2).pow(m.p).mean((2, 3)).pow(1 / m.p), p=parameter(1)),
    "choice": lambda: Between(lambda m, x: torch.where(x > 0, m.a, x).maximum(m.b), a=parameter(1), b=parameter(4, 5)),
    "repeat": lambda: Between(
        lambda m, x: torch.cat([m.a.repeat(x.shape[0], 1, 2, 1), m.b.repeat(x.shape[0], 3, 1, 1), x], 1),
        a=parameter(1, 2, 2, 5),
        b=parameter(1, 4, 5),
    ),
    "broadcast": lambda: Between(
        lambda m, x: torch.cat([torch.broadcast_to(m.a, (x.shape[0], 2, 4, 5)), m.b.expand_as(x), x], 1),
        a=parameter(2, 1, 5),
        b=parameter(6, 1, 1),
    ),
    "sum over windows": lambda: Between(
        lambda m, x: (windows(x) + m.a).tanh().unflatten(0, (-1, 2)) * m.b, a=parameter(6, 4, 2), b=parameter(2)
    ),
    "instance norm": lambda: Between(
        lambda m, x: m.n(m.t(x)),
        n=nn.InstanceNorm2d(6, affine=True),
        t=nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    ),
    "RMS norm": lambda: Between(lambda m, x: m.n(tokens(x)), n=nn.RMSNorm(6)),
    "convolution in one dimension": lambda: Between(lambda m, x: m.c(x.flatten(2)), c=nn.Conv1d(6, 4, 5, 2, groups=2)),
    "convolution of rows": lambda: Between(
        lambda m, x: m.c(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, 4)), c=nn.Conv1d(6, 4, 3)
    ),
    "convolution in three": lambda: Between(lambda m, x: m.c(x[:, None]), c=nn.Conv3d(1, 2, 3)),
    "transposed convolution": lambda: Between(
        lambda m, x: m.d(m.c(x)),
        c=nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2),
        d=nn.ConvTranspose2d(4, 3, 2, dilation=2),
    ),
    "products": lambda: Between(
        lambda m, x: torch.addmm(m.b, (m.left @ x @ m.batched).flatten(1), m.w),
        left=parameter(3, 4),
        batched=parameter(6, 5, 2),
        w=parameter(36, 4),
        b=parameter(4),
    ),
    "bilinear": lambda: Between(lambda m, x: m.f(x[:, :, 0], x[:, :, 1]), f=nn.Bilinear(5, 5, 3)),
    "recurrent cell": lambda: Between(
        lambda m, x: m.c(x[:, :, 1, 0], m.c(x[:, :, 0, 0], m.r(x[:, :, 2, 0]))), c=nn.GRUCell(6, 5), r=nn.RNNCell(6, 5)
    ),
    "products by name": lambda: Between(
        lambda m, x: torch.einsum("bchw,cd,bdw->bdh", x.tanh(), m.w, torch.einsum("dc,bchw->bdw", m.v, x)),
        w=parameter(6, 3),
        v=parameter(3, 6),
    ),
    "parts of a parameter": lambda: Between(lambda m, x: m.w[x.mean((2, 3)).topk(2).indices], w=parameter(6, 4)),
    "embedded pixels": lambda: Between(
        lambda m, x: m.e((x.tanh() * 4 + 4).long()) * x[..., None], e=nn.Embedding(9, 2)
    ),
    "complex filter": lambda: Between(
        lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.f), s=(4, 5)), f=parameter(4, 3, 2)
    ),
    "sums in place": lambda: Between(overwritten, a=parameter(6, 1, 1), b=parameter(1, 20, 6), c=parameter(6)),
    "learned mask": lambda: Between(
        lambda m, x: F.scaled_dot_product_attention(tokens(x), tokens(x), tokens(x), m.mask), mask=parameter(20, 20)
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("client_batch_size", [1, 2])
def test_operations_on_parameters_are_captured(operation, client_batch_size):
    torch.manual_seed(0)
    check(OPERATIONS[operation](), (3, 9, 11), client_batch_size=client_batch_size)


def test_an_operation_that_cannot_be_vectorised_is_differentiated_leak_by_leak(monkeypatch):
    def fails(function):
        def call(*arguments):
            raise RuntimeError("overwrites what is not a batch")

        return call

    monkeypatch.setattr(layer_gradients, "vmap", fails)
    torch.manual_seed(0)
    check(OPERATIONS["transposed convolution"](), (3, 9, 11))
