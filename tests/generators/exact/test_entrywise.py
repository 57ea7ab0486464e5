"""Scaling, differences and negation by numbers, buffers and parameters, against autograd."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact import Estimate, rule_for
from gitlight.generators.exact.entrywise import EntrywiseAffineRule

SHAPE = (3, 4, 2)


class Of(nn.Module):
    """An operation on the input and something of the model's own."""

    def __init__(self, function, other):
        super().__init__()
        self.function = function
        if isinstance(other, nn.Parameter) or not isinstance(other, torch.Tensor):
            self.other = other
        else:
            self.register_buffer("other", other)

    def forward(self, x):
        return self.function(x, self.other)


def rule_of(model):
    return rule_for(Architecture.of(model, SHAPE, 2).layers[-1])


def others():
    torch.manual_seed(0)
    return [1.7, 3, torch.rand(1, 3, 1, 1) + 0.5, nn.Parameter(torch.rand(3, 4, 2) - 2), torch.rand(2) + 1]


FUNCTIONS = {
    "c x": lambda x, c: c * x,
    "x c": lambda x, c: x * c,
    "x / c": lambda x, c: x / c,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x - 2 c": lambda x, c: torch.sub(x, c, alpha=2),
    "rsub": lambda x, c: torch.rsub(x, c),
    "-x": lambda x, c: -x,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("other", others(), ids=lambda other: type(other).__name__)
def test_input_error_and_delta_follow(function, other):
    model = Of(function, other).requires_grad_(False)
    rule = rule_of(model)
    assert isinstance(rule, EntrywiseAffineRule)
    inputs = torch.randn(5, *SHAPE, dtype=torch.float64, requires_grad=True)
    outputs = model.double()(inputs)
    delta = torch.randn_like(outputs)
    (wanted,) = torch.autograd.grad(outputs, inputs, delta)
    weights = {"other": other.double()} if isinstance(other, torch.Tensor) else {}
    at_most = torch.rand_like(delta) < 0.5
    found = rule.invert(Estimate(outputs.detach(), torch.full_like(delta, 1e-4), at_most), 0, [None], weights)
    torch.testing.assert_close(found.value, inputs.detach())
    slopes = wanted / delta
    torch.testing.assert_close(found.variance, 1e-4 / slopes.square())
    assert torch.equal(found.at_most, at_most & (slopes > 0)), "of what falls, an upper bound is a lower one"
    known = {} if rule.carries_without_weights else weights
    torch.testing.assert_close(rule.carry(delta, 0, [None], None, known), wanted)
    assert rule.carries_without_weights == (rule.layer.kind in ("sub", "rsub"))


def test_an_entry_that_is_multiplied_by_zero_is_unknown():
    factor = torch.tensor([0.0, 2.0])
    found = rule_of(Of(FUNCTIONS["x c"], factor)).invert(
        Estimate(torch.ones(1, *SHAPE), torch.zeros(1, *SHAPE)), 0, [None], {"other": factor}
    )
    assert torch.isinf(found.variance[..., 0]).all()
    assert (found.value[..., 1] == 0.5).all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, c: torch.sigmoid(x) * x, "takes 2 results"),
        (lambda x, c: torch.sigmoid(x) - x, "takes 2 results"),
        (lambda x, c: x[:, :1] * c, "repeats its input"),
        (lambda x, c: c / x, "divides by its input"),
        (lambda x, c: torch.div(x, c, rounding_mode="floor"), "or rounds"),
    ],
)
def test_what_has_no_rule_is_named(function, message):
    with pytest.raises(ArchitectureError, match=message):
        rule_of(Of(function, torch.rand(1, 3, 1, 1)))
