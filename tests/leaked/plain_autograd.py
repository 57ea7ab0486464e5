import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.gradients.engine import GradientEngine


def relative_error_of_the_engine(network, method, images, labels):
    """The largest, over parameters, of the engine's distance to one ordinary backward pass per leak, in float64."""
    architecture = Architecture.of(network, images.shape[2:], 10)
    found = GradientEngine(network, architecture, GradientsConfig(method=method, dtype="float64"))(images, labels)
    network.double()
    return relative_error(found, plain_gradients(network, images, labels))


def plain_gradients(network, images, labels):
    """Parameter name to ``(B, *shape)``: one ordinary backward pass per leak, in the mode that the network is in."""
    leaks = []
    for client_images, client_labels in zip(images.double(), labels, strict=True):
        loss = nn.functional.cross_entropy(network(client_images), client_labels)
        leaks.append(torch.autograd.grad(loss, list(network.parameters())))
    names = [name for name, _ in network.named_parameters()]
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*leaks, strict=True), strict=True)}


def relative_error(found, wanted):
    """The largest over parameters."""
    assert list(found) == list(wanted)
    assert all(gradient.norm() > 0 for gradient in wanted.values()), "a comparison of zeros shows nothing"
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)
