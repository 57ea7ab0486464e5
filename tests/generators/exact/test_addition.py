"""Sums of branches, parameters, buffers and numbers, against autograd."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact import Estimate, rule_for


class Sum(nn.Module):
    """``σ(x) + tanh(x)``, the second averaged over rows if it is to be repeated."""

    def __init__(self, repeated=False):
        super().__init__()
        self.repeated = repeated

    def branches(self, x):
        return torch.sigmoid(x), torch.tanh(x).mean(1, keepdim=self.repeated) if self.repeated else torch.tanh(x)

    def forward(self, x):
        first, second = self.branches(x)
        return first + second


class Plus(nn.Module):
    def __init__(self, added):
        super().__init__()
        if isinstance(added, nn.Parameter | float):
            self.added = added
        else:
            self.register_buffer("added", added)

    def forward(self, x):
        return x + self.added


def rule_of(model, shape=(3, 4)):
    return rule_for(Architecture.of(model, shape, 1).layers[-1])


def exactly(value):
    return Estimate(value, torch.zeros_like(value))


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("position", [0, 1])
def test_one_branch_follows_from_the_sum_and_the_other(repeated, position):
    torch.manual_seed(0)
    model = Sum(repeated)
    inputs = torch.randn(2, 3, 4, dtype=torch.float64)
    branches = [branch.requires_grad_() for branch in model.branches(inputs)]
    total = branches[0] + branches[1]
    delta = torch.randn_like(total)
    wanted = torch.autograd.grad(total, branches, delta)
    others = [None if number == position else exactly(branch.detach()) for number, branch in enumerate(branches)]
    rule = rule_of(model)
    found = rule.invert(Estimate(total.detach(), torch.full_like(delta, 0.5)), position, others, {})
    torch.testing.assert_close(found.value, branches[position].detach())
    assert found.variance.shape == found.value.shape
    assert (found.variance <= 0.5).all()
    torch.testing.assert_close(rule.carry(delta, position, [None, None], None, {}), wanted[position])


def test_the_errors_of_sum_and_branch_add_up():
    shape = (1, 3, 4)
    sum_, other = Estimate(torch.rand(shape), torch.full(shape, 0.5)), Estimate(torch.rand(shape), torch.rand(shape))
    found = rule_of(Sum()).invert(sum_, 0, [None, other], {})
    torch.testing.assert_close(found.variance, 0.5 + other.variance)


def test_no_branch_follows_from_the_sum_alone():
    with pytest.raises(ValueError, match="neither branch is known"):
        rule_of(Sum()).invert(exactly(torch.rand(1, 3, 4)), 0, [None, None], {})


@pytest.mark.parametrize("added", [nn.Parameter(torch.rand(1, 3, 4)), torch.rand(1, 3, 4), 1.5], ids=type)
def test_what_is_not_a_branch_is_subtracted(added):
    inputs, delta = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    rule = rule_of(Plus(added))
    weights = {} if isinstance(added, float) else {"added": added.detach()}
    found = rule.invert(exactly(Plus(added)(inputs).detach()), 0, [None], weights)
    torch.testing.assert_close(found.value, inputs)
    assert torch.equal(rule.carry(delta, 0, [None], None, {}), delta)
    assert not rule.homogeneous, "what is added does not grow with the input"


def test_a_bound_on_the_sum_is_one_on_the_input():
    at_most = torch.tensor([[[True, False]]])
    rule = rule_of(Plus(1.0), (1, 2))
    assert torch.equal(
        rule.invert(Estimate(torch.rand(1, 1, 2), torch.rand(1, 1, 2), at_most), 0, [None], {}).at_most, at_most
    )


def test_an_added_parameter_reveals_delta():
    assert rule_of(Plus(nn.Parameter(torch.rand(1, 3, 4)))).reveals_delta() == "added"


@pytest.mark.parametrize("model", [Sum(), Plus(torch.rand(1, 3, 4)), Plus(1.0)])
def test_nothing_else_does(model):
    assert rule_of(model).reveals_delta() is None


def test_a_multiple_is_named():
    class Multiple(nn.Module):
        def forward(self, x):
            return torch.add(x, torch.sigmoid(x), alpha=2)

    with pytest.raises(ArchitectureError, match=r"add .*alpha=2"):
        rule_of(Multiple())
