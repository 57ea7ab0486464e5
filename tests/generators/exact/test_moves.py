"""Operations that move entries, against the operations themselves and autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick
from torch import nn
from torch.nn import functional as F

from gitlight.architecture import MOVES, Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact import Estimate, rule_for


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def rules_of(function, shape):
    return [rule_for(layer) for layer in Architecture.of(Model(function), shape, 1).layers]


def with_variance(values):
    return Estimate(values, torch.rand_like(values))


# One example as it is traced, with a batch of one in front.
WHOLE = {
    "flatten": lambda x: x.flatten(1),
    "flatten of some": lambda x: x.flatten(2),
    "view": lambda x: x.view(1, 6, 4),
    "reshape of a transposed": lambda x: x.transpose(1, 3).reshape(1, -1),
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, 2),
    "unflatten": lambda x: x.unflatten(3, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "feature dropout": lambda x: F.dropout2d(x, 0.5, training=False),
}
DROPPING = {
    "select": lambda x: x[:, 1],
    "select of the last": lambda x: x.select(2, -1),
    "slice": lambda x: x[:, :, 1:],
    "every other": lambda x: x[..., ::2],
    "narrow": lambda x: x.narrow(3, 1, 2),
}
# The batch of one is not in front, as inside PyTorch's attention.
MOVED_BATCH = {
    "batch in the middle": lambda x: x.transpose(0, 1),
    "heads": lambda x: x.transpose(0, 1).reshape(2, 6, 2).transpose(0, 1),
    "one of three": lambda x: x.unsqueeze(0).transpose(0, -2).squeeze(-2).select(0, 1),
    "the first of several": lambda x: x.transpose(0, 1).select(0, 0),
    "there and back": lambda x: x.transpose(0, 2).transpose(0, 2),
}


def check_against_autograd(function, shape, n=3):
    """Every step of a chain of moves: inverted, and δ carried."""
    inputs = torch.rand(n, *shape, dtype=torch.float64)
    rules = rules_of(function, shape)
    outputs = torch.cat([function(one.unsqueeze(0)).reshape(1, *rules[-1].layer.output_shape) for one in inputs])
    delta = torch.randn_like(outputs)
    estimate, carried = with_variance(outputs), delta
    for rule in reversed(rules):
        estimate, carried = rule.invert(estimate, 0, [None], {}), rule.carry(carried, 0, [None], None, {})
    for number, one in enumerate(inputs):
        leaf = one.clone().requires_grad_()
        result = function(leaf.unsqueeze(0))
        (wanted,) = torch.autograd.grad(result, leaf, delta[number].reshape(result.shape))
        torch.testing.assert_close(carried[number], wanted)
    found = torch.isfinite(estimate.variance)
    torch.testing.assert_close(estimate.value[found], inputs[found])
    return rules, found


@pytest.mark.parametrize("name", [*WHOLE, *MOVED_BATCH])
def test_moves_are_undone_and_delta_follows(name):
    rules, found = check_against_autograd((WHOLE | MOVED_BATCH)[name], (2, 3, 4))
    dropping = any(rule.layer.kind == "select" for rule in rules)
    assert dropping != bool(found.all())


@pytest.mark.parametrize("name", DROPPING)
def test_entries_that_are_dropped_are_unknown(name):
    rules, found = check_against_autograd(DROPPING[name], (2, 3, 4))
    kept = DROPPING[name](torch.ones(1, 2, 3, 4)).numel()
    assert found[0].sum() == kept
    dropping = next(rule for rule in rules if not rule.complete)
    assert dropping.loses == f"{24 - kept} of 24 entries of its input are dropped"


@quick
@given(st.permutations([1, 2, 3]), st.integers(0, 100))
def test_any_permutation_is_undone(order, seed):
    torch.manual_seed(seed)
    check_against_autograd(lambda x: x.permute(0, *order), (2, 3, 4), n=2)


def test_delta_of_repeated_entries_adds_up():
    _, found = check_against_autograd(lambda x: x.unsqueeze(2).expand(-1, -1, 5, -1, -1), (2, 3, 4))
    assert found.all()


def test_variances_and_bounds_move_along():
    (rule,) = rules_of(lambda x: x.permute(0, 2, 1), (2, 3))
    inputs, variance = torch.rand(4, 2, 3), torch.rand(4, 2, 3)
    at_most = torch.rand(4, 2, 3) > 0.5
    output = Estimate(*(tensor.transpose(1, 2) for tensor in (inputs, variance, at_most)))
    found = rule.invert(output, 0, [None], {})
    assert torch.equal(found.variance, variance)
    assert torch.equal(found.at_most, at_most)


def test_nothing_flows_back_through_detach():
    (rule,) = rules_of(lambda x: x.detach(), (2, 3))
    assert (rule.carry(torch.rand(4, 2, 3), 0, [None], None, {}) == 0).all()
    assert not rule.homogeneous
    values = torch.rand(4, 2, 3)
    assert torch.equal(rule.invert(with_variance(values), 0, [None], {}).value, values)


def test_dropout_that_stays_on_is_named():
    with pytest.raises(ArchitectureError, match=r"dropout .*at random in evaluation mode"):
        rules_of(lambda x: F.dropout(x, 0.5), (2, 3))


def test_a_parameter_that_is_moved_has_a_rule_and_no_input():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 3))

        def forward(self, x):
            return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)

    expand = Architecture.of(Token(), (2, 3), 1).layers[0]
    assert expand.kind in MOVES
    assert rule_for(expand).complete
