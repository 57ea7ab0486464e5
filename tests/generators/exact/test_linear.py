"""The linear layer on one vector and on tokens."""

import pytest
import torch
from dense import backward, layer_of, relative
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick
from torch import nn

from gitlight.architecture import Architecture
from gitlight.generators.exact import rule_for


def rule_of(*shape, outputs=4, bias=True):
    return rule_for(layer_of(nn.Linear(shape[-1], outputs, bias=bias), shape))


@quick
@given(st.integers(1, 40), st.integers(1, 6), st.integers(-150, 150), st.integers(0, 100))
def test_one_vector_is_recovered_at_any_width_and_any_size_of_delta(features, outputs, exponent, seed):
    torch.manual_seed(seed)
    module = nn.Linear(features, outputs).double()
    inputs = torch.randn(3, features, dtype=torch.float64)
    delta = torch.randn(3, outputs, dtype=torch.float64) * 10.0**exponent
    rule = rule_of(features, outputs=outputs)
    gradient, _ = backward(module, inputs, delta)
    found, _, solved = rule.solve(delta, gradient, torch.zeros(3))
    assert solved.all()
    assert relative(found, inputs) < 1e-12


@pytest.mark.parametrize(("tokens", "exact"), [(1, True), (4, True), (5, False)])
def test_as_many_tokens_are_exact_as_there_are_outputs(tokens, exact):
    rule = rule_of(tokens, 7, outputs=4)
    assert rule.exact == exact
    assert rule.loses == ("" if exact else "rank 4 of 5 unknowns per feature")


def test_a_bias_added_to_one_vector_reveals_delta():
    assert rule_of(6).reveals_delta() == "bias"
    assert rule_of(1, 6).reveals_delta() == "bias"


def test_a_bias_summed_over_tokens_or_absent_does_not():
    assert rule_of(3, 6).reveals_delta() is None
    assert rule_of(6, bias=False).reveals_delta() is None


def test_tokens_whose_batch_dimension_is_in_the_middle_are_solved():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 8).double()

        def forward(self, x):
            return self.layer(x.transpose(0, 1))

    torch.manual_seed(0)
    model = SequenceFirst()
    _, layer = Architecture.of(model, (5, 6), 1).layers
    assert layer.input_shape == (5, 1, 6)
    inputs, delta = torch.rand(2, 5, 1, 6, dtype=torch.float64), torch.randn(2, 5, 1, 8, dtype=torch.float64)
    gradient, carried = backward(model.layer, inputs, delta)
    rule = rule_for(layer)
    found, _, _ = rule.solve(delta, gradient, torch.full((2,), 1e-15))
    assert relative(found, inputs) < 1e-10
    torch.testing.assert_close(rule.adjoint(delta, model.layer.weight), carried)
