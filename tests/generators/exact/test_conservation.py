"""Σ δ·z is the same on both sides of a homogeneous operation: against values and δ seen by hooks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick
from torch import nn

from gitlight.architecture import Architecture
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.conservation import conserved, layer_above, share_of
from gitlight.generators.exact.plan import rules_of

SHAPE = (2, 8, 8)


class Mean(nn.Module):
    def __init__(self, *dimensions, keepdim=False):
        super().__init__()
        self.dimensions, self.keepdim = dimensions, keepdim

    def forward(self, x):
        return x.mean(self.dimensions, keepdim=self.keepdim)


class Select(nn.Module):
    def forward(self, x):
        return x[:, 1]


def sequential(*modules, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*modules).double()


def structure(network):
    architecture = Architecture.of(network, SHAPE, 3)
    return architecture, rules_of(architecture, strict=True)


def by_channel(product):
    """Sums over all but the channels: the second dimension of images, the last of vectors and tokens."""
    return product.sum(dim=(0, 2, 3)) if product.dim() == 4 else product.flatten(0, -2).sum(dim=0)


def backward(network, n=3):
    """Parameter gradients of each example, and ``Σ_p δ(p) z(p)`` of each channel of each layer with a weight."""
    outputs, gradients, shares = {}, [], []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    parameters = dict(network.named_parameters())
    for _ in range(n):
        loss = nn.functional.cross_entropy(network(torch.rand(1, *SHAPE).double()), torch.randint(3, (1,)))
        found = torch.autograd.grad(loss, [*parameters.values(), *outputs.values()])
        gradients.append(dict(zip(parameters, found, strict=False)))
        deltas = zip(outputs.items(), found[len(parameters) :], strict=True)
        shares.append({name: by_channel(z * delta).detach() for (name, z), delta in deltas})
    for hook in hooks:
        hook.remove()
    return tuple({name: torch.stack([one[name] for one in many]) for name in many[0]} for many in (gradients, shares))


def assert_shares_are_those_of_the_hooks(network):
    architecture, rules = structure(network)
    assert conserved(architecture, rules)
    gradients, shares = backward(network)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    affine = [layer for layer in architecture.layers if isinstance(rules[layer.name], AffineRule)]
    for layer, above in itertools.pairwise(affine):
        assert layer_above(architecture, rules, layer) is above
        wanted = shares[layer.name]
        found = share_of(architecture, rules, layer, gradients, weights)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        # The other side of the law, from the layer's own weight and bias.
        own = (weights[layer.parameters["weight"]] * gradients[layer.parameters["weight"]]).flatten(2).sum(dim=2)
        if "bias" in layer.parameters:
            own = own + weights[layer.parameters["bias"]] * gradients[layer.parameters["bias"]]
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-12)


activations = st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU(inplace=True)])
pools = st.sampled_from(
    [
        [],
        [nn.MaxPool2d(2)],
        [nn.AvgPool2d(2)],
        [nn.AvgPool2d(3, 1, 1)],
        [nn.MaxPool2d(3, 1, 1)],
        [nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)],
    ]
)
ends = st.sampled_from(
    [
        [nn.Flatten()],
        [nn.AdaptiveAvgPool2d(2), nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        [nn.Dropout(), nn.Flatten()],
        [Mean(2, 3)],
        [Mean(-1, -2, keepdim=True), nn.Flatten()],
        [Mean(3), nn.Flatten()],
    ]
)


@quick
@given(activations, pools, ends, st.integers(1, 2), st.booleans(), st.integers(0, 99))
def test_the_law_holds_in_networks_of_relus_and_pooling(activation, pool, end, stride, bias, seed):
    convolutions = [nn.Conv2d(2, 4, 3, stride, 1, bias=bias), activation, *pool, nn.Conv2d(4, 5, 3, 1, 2), activation]
    torch.manual_seed(seed)
    features = nn.Sequential(*convolutions, *end)(torch.zeros(1, *SHAPE)).shape[1]
    head = [nn.Linear(features, 6, bias=bias), activation, nn.Linear(6, 3)]
    assert_shares_are_those_of_the_hooks(sequential(*convolutions, *end, *head, seed=seed).eval())


@pytest.mark.parametrize(
    "middle",
    [
        [nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)],
        [nn.Linear(64, 5), nn.ReLU(), Mean(1), nn.Linear(5, 3)],
        [nn.Linear(64, 5), nn.ReLU(), Select(), nn.Linear(5, 3)],
        [nn.Linear(64, 8), nn.ReLU(), nn.Unflatten(2, (2, 4)), nn.Flatten(), nn.Linear(16, 3)],
    ],
    ids=["flattened", "averaged", "selected", "reshaped"],
)
def test_the_law_holds_feature_by_feature_on_tokens(middle):
    assert_shares_are_those_of_the_hooks(sequential(nn.Flatten(2), *middle))


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(2, 4, 3), nn.ReLU(), Mean(1), nn.Flatten(), nn.Linear(36, 3)],
        [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 1), nn.Flatten(), nn.Linear(4, 3)],
        [nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 3, 4), nn.Flatten()],
        [nn.Flatten(), nn.Linear(128, 32), nn.Unflatten(1, (2, 4, 4)), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)],
    ],
    ids=["sigmoid", "batch norm", "groups", "mean of channels", "mixed channels", "pixels", "pooled units"],
)
def test_it_is_not_claimed_where_channels_cannot_be_told_apart_or_operations_are_not_homogeneous(modules):
    network = sequential(*modules).eval()
    network(torch.rand(2, *SHAPE).double())
    assert not conserved(*structure(network))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_it_is_not_claimed_where_a_gradient_does_not_leak(name):
    network = sequential(nn.Flatten(), nn.Linear(128, 4), nn.ReLU(), nn.Linear(4, 3))
    getattr(network[1], name).requires_grad_(False)
    assert not conserved(*structure(network))
