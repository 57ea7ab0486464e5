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
    leaks = []
    for client_images, client_labels in zip(images.double(), labels, strict=True):
        loss = nn.functional.cross_entropy(network(client_images), client_labels)
        leaks.append(torch.autograd.grad(loss, list(network.parameters())))
    wanted = [torch.stack(parts) for parts in zip(*leaks, strict=True)]
    assert list(found) == [name for name, _ in network.named_parameters()]
    assert all(gradient.norm() > 0 for gradient in wanted), "a comparison of zeros shows nothing"
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found.values(), wanted, strict=True))
