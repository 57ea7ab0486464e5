"""Pooling, against autograd."""

import pytest
import torch
from dense import layer_of
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick
from torch import nn

from gitlight.architecture import Architecture
from gitlight.generators.exact import Estimate, rule_for

SHAPE = (2, 6, 6)


class Mean(nn.Module):
    def __init__(self, dimensions, keepdim=False):
        super().__init__()
        self.dimensions, self.keepdim = dimensions, keepdim

    def forward(self, x):
        return x.mean(self.dimensions, self.keepdim)


def assert_delta_passes(module, known_input):
    torch.manual_seed(0)
    inputs = torch.randn(3, *SHAPE, dtype=torch.float64, requires_grad=True)
    outputs = module(inputs)
    delta = torch.randn_like(outputs)
    (wanted,) = torch.autograd.grad(outputs, inputs, delta)
    known = Estimate(inputs.detach(), torch.zeros_like(wanted)) if known_input else None
    rule = rule_for(layer_of(module, SHAPE))
    torch.testing.assert_close(rule.carry(delta, 0, [known], None, {}), wanted)


windows = st.integers(1, 3).flatmap(
    lambda size: st.fixed_dictionaries(
        {"kernel_size": st.just(size), "stride": st.integers(1, 3), "padding": st.integers(0, size // 2)}
    )
)


@quick
@given(windows, st.booleans())
def test_delta_is_spread_over_the_windows_of_an_average(window, count_padding):
    assert_delta_passes(nn.AvgPool2d(**window, count_include_pad=count_padding), known_input=False)


@quick
@given(windows)
def test_delta_goes_to_the_largest_of_each_window_of_a_known_input(window):
    assert_delta_passes(nn.MaxPool2d(**window), known_input=True)


@pytest.mark.parametrize(
    "module", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, 3)), Mean((2, 3)), Mean((2, 3), True), Mean(1)]
)
def test_delta_is_spread_by_averages_of_other_kinds(module):
    assert_delta_passes(module, known_input=False)


def test_delta_does_not_pass_a_largest_entry_that_is_not_known():
    rule = rule_for(layer_of(nn.MaxPool2d(2), SHAPE))
    with pytest.raises(ValueError, match=r"max_pool2d .*largest entries of an input that is not known"):
        rule.carry(torch.zeros(1, 2, 3, 3), 0, [None], None, {})


@pytest.mark.parametrize(
    ("module", "inverts"),
    [
        (nn.AvgPool2d(1), "yes"),
        (nn.AdaptiveAvgPool2d(6), "yes"),
        (nn.AvgPool2d(2), "no"),
        (nn.AvgPool2d(3, 1, 1), "no"),
        (nn.AvgPool2d(1, divisor_override=2), "no"),
        (Mean((2, 3)), "no"),
        (nn.MaxPool2d(2), "no"),
    ],
)
def test_only_windows_of_one_entry_are_inverted(module, inverts):
    (layer,) = Architecture.of(module, SHAPE, 1).layers
    rule = rule_for(layer)
    assert rule.inverts == inverts
    assert bool(rule.loses) == (inverts == "no")
    output = Estimate(torch.rand(1, *layer.output_shape), torch.rand(1, *layer.output_shape))
    if inverts == "yes":
        assert torch.equal(rule.invert(output, 0, [None], {}).value, module(output.value))
    else:
        with pytest.raises(NotImplementedError, match="does not follow"):
            rule.invert(output, 0, [None], {})


def test_what_is_lost_is_counted():
    assert rule_for(layer_of(nn.AvgPool2d(2), SHAPE)).loses == "all but the averages: 18 numbers for 72 entries"
    assert "18 numbers for 72 entries" in rule_for(layer_of(nn.MaxPool2d(2), SHAPE)).loses


class OverTokens(nn.Module):
    """The mean of tokens that the batch is behind, as in attention without ``batch_first``."""

    def forward(self, x):
        return x.flatten(2).permute(2, 0, 1).mean(0)


def test_delta_is_spread_by_an_average_that_has_the_batch_within():
    torch.manual_seed(0)
    delta = torch.randn(3, 2, dtype=torch.float64)
    rule = rule_for(Architecture.of(OverTokens(), SHAPE, 2).layers[-1])
    wanted = (delta / 36).view(3, 1, 1, 2).expand(3, 36, 1, 2)
    torch.testing.assert_close(rule.carry(delta, 0, [None], None, {}), wanted)
