"""Gradients of small models against the reference: one ordinary backward pass per leak, in float64."""

import copy

import torch
from torch.nn import functional as F

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.gradients.engine import GradientEngine

SHAPE, N_CLASSES = (3, 4, 4), 5


def autograd_loop(network, images, labels):
    """The reference, of a copy of the network; zero for parameters without use."""
    twin = copy.deepcopy(network).double()
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    leaks = []
    for client_images, client_labels in zip(images.double(), labels, strict=True):
        twin.zero_grad()
        F.cross_entropy(twin(client_images.clone()), client_labels).backward()
        leaks.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()])
    return {name: torch.stack(parts) for name, parts in zip(parameters, zip(*leaks, strict=True), strict=True)}


def pairs(client_batch_size=2):
    torch.manual_seed(1)
    return torch.rand(3, client_batch_size, *SHAPE), torch.randint(N_CLASSES, (3, client_batch_size))


def engine_of(network, method="auto"):
    settings = GradientsConfig(method=method, dtype="float64")
    return GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), settings)


def assert_are_autograds(found, network, images, labels):
    for name, wanted in autograd_loop(network, images, labels).items():
        assert torch.allclose(found[name], wanted, rtol=1e-10, atol=1e-13), name


def assert_exact(network, client_batch_size=2, method="auto"):
    images, labels = pairs(client_batch_size)
    before = images.clone()
    found = engine_of(network, method)(images, labels)
    assert torch.equal(images, before)
    assert_are_autograds(found, network, images, labels)


class Reversed(torch.autograd.Function):
    """The identity, backward with the sign changed: a gradient reversal layer (Ganin et al. 2016)."""

    @staticmethod
    def forward(context, x):
        return x * 1

    @staticmethod
    def backward(context, delta):
        return -delta
