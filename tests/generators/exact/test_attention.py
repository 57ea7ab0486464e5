"""Attention: δ by the chain rule where queries, keys and values are known."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from gitlight.architecture import Architecture
from gitlight.generators.exact import Estimate, rule_for


class Attention(nn.Module):
    """Of the image's three channels, with two heads of five tokens."""

    def forward(self, x):
        heads = x.view(1, 3, 2, 5, 4)
        return scaled_dot_product_attention(*(heads[:, number] for number in range(3)))


def attention_rule():
    return rule_for(Architecture.of(Attention(), (3, 10, 4), 1).layers[-1])


@pytest.mark.parametrize("position", [0, 1, 2])
def test_delta_passes_known_queries_keys_and_values(position):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    delta = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    query, key, value = inputs
    output = (query @ key.transpose(-1, -2) / 2).softmax(dim=-1) @ value
    (wanted,) = torch.autograd.grad(output, inputs[position], delta)
    known = [Estimate(one.detach(), torch.zeros_like(delta)) for one in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns of operations for which it computes one example at a time
        found = attention_rule().carry(delta, position, known, None, {})
    torch.testing.assert_close(found, wanted)


def test_no_input_follows_from_the_output():
    rule = attention_rule()
    assert rule.inverts == "no"
    assert "three unknown matrices" in rule.loses
