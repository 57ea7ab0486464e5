import copy

import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.data.sampling import mixed_seed
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


def plain_updates(network, images, labels, seeds, settings):
    """What each client's local steps of `torch.optim.SGD` come to, over rate and steps, as `plain_gradients`."""
    updates = []
    for client_images, client_labels, seed in zip(images.double(), labels, seeds.tolist(), strict=True):
        client, n_steps = copy.deepcopy(network), 0
        optimizer = torch.optim.SGD(client.parameters(), settings.learning_rate)
        for epoch in range(settings.epochs):
            generator = torch.Generator().manual_seed(mixed_seed("local order", seed, epoch))
            for batch in torch.randperm(len(client_labels), generator=generator).split(settings.batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(client(client_images[batch]), client_labels[batch]).backward()
                optimizer.step()
                n_steps += 1
        pairs = zip(network.parameters(), client.parameters(), strict=True)
        updates.append([(b - a).detach() / (settings.learning_rate * n_steps) for b, a in pairs])
    names = [name for name, _ in network.named_parameters()]
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*updates, strict=True), strict=True)}


def relative_error(found, wanted):
    """The largest over parameters."""
    assert list(found) == list(wanted)
    assert all(gradient.norm() > 0 for gradient in wanted.values()), "a comparison of zeros shows nothing"
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)
