"""The gradient rule of each kind of layer, and contributions to one parameter."""

import hypothesis
import pytest
import torch
from captured_checks import N_CLASSES, check, randomise_norms
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.data())
def test_convolutions_of_any_stride_padding_dilation_and_groups(data):
    torch.manual_seed(0)
    pairs = {
        name: st.tuples(st.integers(1, high), st.integers(1, high)) for name, high in (("k", 4), ("s", 3), ("d", 2))
    }
    kernel, stride, dilation = (data.draw(pairs[name], name) for name in ("k", "s", "d"))
    padding = data.draw(st.one_of(st.sampled_from(["valid", "same"]), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    if padding == "same":
        stride = (1, 1)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    bias, norm = data.draw(st.booleans()), data.draw(st.booleans())
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias)
    layers = [nn.Conv2d(3, 4, 3), nn.Tanh(), conv, nn.BatchNorm2d(8) if norm else nn.Tanh(), nn.Flatten()]
    n_features = nn.Sequential(*layers).eval()(torch.zeros(1, 3, 12, 11)).shape[1]
    network = nn.Sequential(*layers, nn.Linear(n_features, N_CLASSES))
    randomise_norms(network)
    check(network.eval(), data.draw(st.integers(1, 3)), shape=(3, 12, 11))


class Shared(nn.Module):
    """One layer used twice, one weight under two names, and a parameter without use."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 6)
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.twice.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(6, N_CLASSES)

    def forward(self, images):
        x = self.first(images.flatten(1)).tanh()
        return self.head(self.tied(self.twice(self.twice(x).tanh()).tanh()))


@pytest.mark.parametrize("client_batch_size", [1, 2])
def test_contributions_to_shared_parameters_are_summed_and_unused_ones_are_zero(client_batch_size):
    torch.manual_seed(0)
    check(Shared(), client_batch_size, shape=(3, 2, 2))


class Transformed(nn.Module):
    """Parameters that are computed with, added, multiplied and repeated before an image meets them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 12))
        self.scale = nn.Parameter(torch.randn(6, 1))
        self.shift = nn.Parameter(torch.randn(6))
        self.gain = nn.Parameter(torch.randn(1, 6))
        self.token = nn.Parameter(torch.randn(1, 2))
        self.matrix = nn.Parameter(torch.randn(8, N_CLASSES))

    def forward(self, images):
        x = F.linear(images.flatten(1), self.weight[0] * self.scale + self.weight[1])
        x = (x - self.shift).tanh() * self.gain
        return torch.cat([self.token.expand(x.shape[0], -1), x], dim=1) @ self.matrix


@pytest.mark.parametrize("client_batch_size", [1, 2])
def test_parameters_that_are_computed_with(client_batch_size):
    torch.manual_seed(0)
    check(Transformed(), client_batch_size, shape=(3, 2, 2))


def test_frozen_parameters_have_no_gradient():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(784, 4)
    )
    randomise_norms(network)
    network[0].requires_grad_(False)
    network[4].weight.requires_grad_(False)
    check(network.eval(), 2)


@pytest.mark.parametrize("norm", [nn.LayerNorm([4, 14, 14]), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)])
def test_norms_after_an_activation(norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), norm, nn.Flatten(), nn.Linear(784, N_CLASSES))
    randomise_norms(network)
    check(network.eval(), 2)
