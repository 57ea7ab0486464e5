"""Layer normalisation: δ by the chain rule, nothing more."""

import pytest
import torch
from dense import layer_of
from torch import nn

from gitlight.generators.exact import Estimate, rule_for


@pytest.mark.parametrize("shape", [(6,), (5, 6), (5, 1, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_delta_passes_a_known_input(shape, affine):
    torch.manual_seed(0)
    module = nn.LayerNorm(6, elementwise_affine=affine).double()
    weights = {name: parameter.data.uniform_(0.5, 2) for name, parameter in module.named_parameters()}
    inputs = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(3, *shape, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(module(inputs), inputs, delta)
    known = Estimate(inputs.detach(), torch.zeros_like(delta))
    found = rule_for(layer_of(module, shape)).carry(delta, 0, [known], None, weights)
    torch.testing.assert_close(found, wanted)


def test_the_input_does_not_follow_and_what_is_lost_is_said():
    rule = rule_for(layer_of(nn.LayerNorm(6), (5, 6)))
    assert "mean and scale" in rule.loses
    with pytest.raises(NotImplementedError, match=r"layer_norm .*does not follow"):
        rule.invert(Estimate(torch.rand(1, 5, 6), torch.zeros(1, 5, 6)), 0, [None], {})
