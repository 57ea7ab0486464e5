"""Captured gradients of small networks against the reference of exactness.py, in both precisions."""

import torch
from exactness import autograd_loop
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.gradients.engine import GradientEngine

SHAPE, N_CLASSES = (3, 16, 16), 4


def randomise_norms(network):
    """Statistics and scales that no shortcut gets right by chance."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if getattr(module, "weight", None) is not None and "Norm" in type(module).__name__:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)


def check(network, client_batch_size=1, n_leaks=3, method="captured", shape=SHAPE):
    torch.manual_seed(1)
    images = torch.rand(n_leaks, client_batch_size, *shape)
    labels = torch.randint(N_CLASSES, (n_leaks, client_batch_size))
    wanted = autograd_loop(network, images, labels)
    architecture = Architecture.of(network, shape, N_CLASSES)
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        settings = GradientsConfig(method=method, dtype=dtype)
        found = GradientEngine(network, architecture, settings)(images, labels)
        assert list(found) == list(wanted)
        for name, gradient in wanted.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
            assert error < tolerance, (name, dtype, error)
