"""The registry of inverse rules, and what a rule gets from the base class."""

import pytest
import torch
from dense import layer_of
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick
from torch import nn

from gitlight.architecture import ELEMENTWISE, MOVES, Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact import Estimate, InverseRule, known_kinds, register_rule, rule, rule_for


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(rule, "_RULES", dict(rule._RULES))


class Asinh(nn.Module):
    def forward(self, x):
        return torch.asinh(x)


def test_a_users_rule_is_one_class_with_a_decorator():
    @register_rule("asinh")
    class AsinhRule(InverseRule):
        inverts = "yes"

        def invert(self, output, position, others, weights):
            return Estimate(torch.sinh(output.value), output.variance)

    asinh = rule_for(layer_of(Asinh(), (3, 2, 2)))
    assert isinstance(asinh, AsinhRule)
    assert "asinh" in known_kinds()
    inputs = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    outputs = Asinh()(inputs)
    delta = torch.randn_like(outputs)
    (wanted,) = torch.autograd.grad(outputs, inputs, delta)
    found = asinh.invert(Estimate(outputs.detach(), torch.zeros_like(delta)), 0, [None], {})
    torch.testing.assert_close(found.value, inputs.detach())
    torch.testing.assert_close(asinh.carry(delta, 0, [found], None, {}), wanted)


def test_a_kind_has_one_rule_only():
    with pytest.raises(ValueError, match="'conv2d' already: ConvolutionRule"):
        register_rule("conv2d")(InverseRule)


def test_an_unknown_operation_is_named_with_its_place_and_what_there_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(), nn.Flatten(), nn.Linear(16, 2))
    layer = Architecture.of(model, (3, 2, 2), 2)["1"]
    with pytest.raises(
        ArchitectureError, match=r"no inverse rule for \w*relu\w* '1'.*Did you mean.*conv2d.*register_rule"
    ):
        rule_for(layer)


def test_activations_moves_and_layers_with_weights_have_rules():
    assert {*ELEMENTWISE, *MOVES, "conv2d", "linear", "batch_norm", "add", "cat"} <= set(known_kinds())


def test_nothing_can_be_inverted_without_a_rule_that_says_how():
    with pytest.raises(NotImplementedError, match="sigmoid 'sigmoid': the input does not follow"):
        InverseRule(layer_of(nn.Sigmoid(), (3,))).invert(Estimate(torch.rand(1, 3), torch.zeros(1, 3)), 0, [None], {})


class Product(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x) * torch.tanh(x)


@pytest.mark.parametrize("position", [0, 1])
def test_delta_passes_operations_of_several_known_inputs(position):
    layer = Architecture.of(Product(), (3, 4), 1).layers[-1]
    inputs = [torch.rand(2, 3, 4, dtype=torch.float64) for _ in range(2)]
    delta = torch.randn(2, 3, 4, dtype=torch.float64)
    known = [Estimate(one, torch.zeros_like(one)) for one in inputs]
    found = InverseRule(layer).carry(delta, position, known, None, {})
    torch.testing.assert_close(found, delta * inputs[1 - position])


def test_delta_passes_operations_in_place_and_leaves_their_inputs_alone():
    module = nn.Hardtanh(inplace=True)
    inputs = torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
    known, before = Estimate(inputs, torch.zeros(1, 4)), inputs.clone()
    found = InverseRule(layer_of(module, (4,))).carry(torch.ones(1, 4), 0, [known], None, {})
    assert found.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert torch.equal(inputs, before)


def test_delta_passes_a_layer_with_known_weights():
    module = nn.GroupNorm(1, 2).double()
    weights = {name: parameter.data.uniform_(0.5, 2) for name, parameter in module.named_parameters()}
    inputs, delta = torch.rand(4, 2, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 2, 3).double()
    (wanted,) = torch.autograd.grad(module(inputs), inputs, delta)
    known = Estimate(inputs.detach(), torch.zeros(4, 2, 3))
    torch.testing.assert_close(InverseRule(layer_of(module, (2, 3))).carry(delta, 0, [known], None, weights), wanted)


HOMOGENEOUS = [
    nn.ReLU(),
    nn.LeakyReLU(0.3),
    nn.AvgPool2d(2, padding=1),
    nn.MaxPool2d(3, 1, 1),
    nn.AdaptiveAvgPool2d(2),
    nn.Flatten(),
    nn.Dropout(),
]
OTHERS = [nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.BatchNorm2d(2).eval(), nn.LayerNorm(4)]


@quick
@given(st.sampled_from([*HOMOGENEOUS, *OTHERS]), st.floats(0.1, 10), st.integers(0, 100))
def test_homogeneous_rules_are_those_of_homogeneous_functions(module, factor, seed):
    inputs = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    module.eval()
    grows = torch.allclose(module(factor * inputs), factor * module(inputs), atol=1e-5)
    assert grows or not rule_for(layer_of(module, (2, 4, 4))).homogeneous
    assert rule_for(layer_of(module, (2, 4, 4))).homogeneous == (module in HOMOGENEOUS)


def test_an_estimate_in_another_shape_is_the_same():
    values, at_most = torch.rand(2, 3, 4), torch.rand(2, 3, 4) > 0.5
    found = Estimate(values, torch.tensor(0.5), at_most).reshaped((12,))
    assert torch.equal(found.value, values.flatten(1))
    assert found.variance.shape == (2, 12)
    assert torch.equal(found.at_most, at_most.flatten(1))
    assert Estimate(values, values).reshaped((4, 3)).at_most is None
