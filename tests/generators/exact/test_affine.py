"""What all layers with a weight share, against matrices made by autograd column by column."""

import pytest
import torch
from dense import backward, forward_matrix, gradient_matrix, layer_of, null_space, relative
from hypothesis import assume, given
from small_layers import affine_layers, quick
from torch import nn

from gitlight.generators.exact import Estimate, rule_for

UNDAMPED = 1e-15


def case(module, shape, n=2):
    """The rule, random inputs and random δ."""
    inputs = torch.rand(n, *shape, dtype=torch.float64)
    delta = torch.randn_like(module(inputs)).detach()
    return rule_for(layer_of(module, shape)), inputs, delta


def whole_system(rule, blocks):
    """The normal matrix of all unknowns from that of each block."""
    numbers = torch.arange(rule.n_inputs, dtype=torch.float64).view(1, *rule.layer.input_shape)
    system = torch.zeros(rule.n_inputs, rule.n_inputs, dtype=torch.float64)
    for block, columns in zip(blocks, rule.columns(numbers)[0].long(), strict=True):
        for column in columns:
            system[column[:, None], column] += block
    return system


@quick
@given(affine_layers)
def test_gradients_are_those_of_autograd(small):
    rule, inputs, delta = case(*small)
    gradient, carried = backward(small[0], inputs, delta)
    torch.testing.assert_close(rule.weight_gradient(inputs, delta), gradient)
    torch.testing.assert_close(rule.adjoint(delta, small[0].weight), carried)
    torch.testing.assert_close(rule.carry(delta, 0, [None], None, {"weight": small[0].weight}), carried)


@quick
@given(affine_layers)
def test_normal_equations_are_those_of_the_dense_matrix(small):
    rule, _, delta = case(*small)
    gradient = torch.randn(2, *small[0].weight.shape, dtype=torch.float64)
    normal, right = rule.normal(delta), rule.right(delta, gradient)
    for number in (0, 1):
        matrix = gradient_matrix(small[0], delta[number], small[1])
        torch.testing.assert_close(whole_system(rule, normal[number]), matrix.T @ matrix)
        torch.testing.assert_close(right[number].flatten(), matrix.T @ gradient[number].flatten())


@quick
@given(affine_layers)
def test_forward_equations_are_those_of_the_dense_matrix(small):
    rule, _, delta = case(*small)
    weight, matrix = small[0].weight.detach(), forward_matrix(*small)
    torch.testing.assert_close(rule.forward_matrix(weight), matrix)
    precision = torch.rand_like(delta)
    wanted = torch.stack([matrix.T @ torch.diag(one.flatten()) @ matrix for one in precision])
    torch.testing.assert_close(rule.forward_normal(weight, precision), wanted)


@quick
@given(affine_layers)
def test_the_bias_adds_to_outputs(small):
    rule, inputs, _ = case(*small)
    without = (forward_matrix(*small) @ inputs.flatten(1).T).T.view(-1, *rule.layer.output_shape)
    torch.testing.assert_close(without + rule.bias_of({"bias": small[0].bias}), small[0](inputs))


@quick
@given(affine_layers)
def test_patches_make_the_layer_linear_in_its_weight(small):
    assume(getattr(small[0], "groups", 1) == 1)
    rule, inputs, _ = case(*small)
    found = rule.patches(inputs) @ small[0].weight.flatten(1).T + small[0].bias
    torch.testing.assert_close(found, rule.outputs(small[0](inputs)))


@quick
@given(affine_layers)
def test_rank_and_determined_entries_are_those_of_a_dense_svd(small):
    rule, _, delta = case(*small, n=1)
    matrix = gradient_matrix(small[0], delta[0], small[1])
    columns = rule.columns(torch.ones(1, *small[1], dtype=torch.float64))
    assert rule.rank * rule.groups * columns.shape[2] == torch.linalg.matrix_rank(matrix)
    determined = null_space(matrix).square().sum(dim=1) < 1e-12
    found = rule.from_columns(rule.determined.double().expand_as(columns)) > 0
    assert torch.equal(found.flatten(), determined)
    assert rule.exact == bool(determined.all())
    assert bool(rule.loses) == (not rule.exact)


@quick
@given(affine_layers)
def test_an_exact_layer_gives_its_input(small):
    rule, inputs, delta = case(*small)
    assume(rule.exact)
    condition = max(torch.linalg.cond(gradient_matrix(small[0], one, small[1])).item() for one in delta)
    assume(condition < 1e5)
    found, _, solved = rule.solve(delta, backward(small[0], inputs, delta)[0], torch.full((2,), UNDAMPED))
    assert solved.all()
    assert relative(found, inputs) < 1e-13 * condition


@quick
@given(affine_layers)
def test_an_undetermined_layer_gives_the_input_of_least_norm(small):
    rule, inputs, delta = case(*small, n=1)
    assume(not rule.exact)
    matrix = gradient_matrix(small[0], delta[0], small[1])
    values = torch.linalg.svdvals(matrix)
    assume(values[values > 1e-12 * values[0]][-1] > 1e-2 * values[0])
    gradient = backward(small[0], inputs, delta)[0]
    found, _, solved = rule.solve(delta, gradient, torch.full((1,), 1e-7))
    assert solved.all()
    assert relative(found.flatten(), torch.linalg.pinv(matrix) @ gradient.flatten()) < 1e-6


@quick
@given(affine_layers)
def test_variance_is_that_of_dense_least_squares(small):
    rule, inputs, delta = case(*small, n=1)
    assume(rule.exact)
    matrix = gradient_matrix(small[0], delta[0], small[1])
    assume(torch.linalg.cond(matrix) < 1e3)
    _, variance, _ = rule.solve(delta, backward(small[0], inputs, delta)[0], torch.full((1,), UNDAMPED))
    torch.testing.assert_close(variance.flatten(), torch.linalg.inv(matrix.T @ matrix).diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
@pytest.mark.parametrize("module", [nn.Conv2d(1, 5, 3, 2, 1), nn.Conv2d(2, 3, 2, 2), nn.Linear(6, 4)])
def test_damping_is_tikhonovs_three_times_over(module, damping):
    torch.manual_seed(0)
    module = module.double()
    shape = (6,) if isinstance(module, nn.Linear) else (module.in_channels, 6, 6)
    rule, inputs, delta = case(module, shape, n=1)
    gradient, _ = backward(module, inputs, delta)
    matrix = gradient_matrix(module, delta[0], shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    level = damping * delta.square().sum()
    filtered = 1 - (level / (values.square() + level)) ** 3
    wanted = right.T @ (filtered / values.clamp_min(1e-300) * (left.T @ gradient.flatten()))
    found, _, _ = rule.solve(delta, gradient, torch.tensor([damping]))
    torch.testing.assert_close(found.flatten(), wanted)


@pytest.mark.parametrize("module", [nn.Conv2d(2, 8, 3, 1, 1), nn.Conv2d(2, 9, 2, 2), nn.Linear(4, 9)])
def test_a_leak_that_is_zero_or_broken_is_alone(module):
    torch.manual_seed(0)
    module = module.double()
    rule, inputs, delta = case(module, (4,) if isinstance(module, nn.Linear) else (2, 4, 4), n=5)
    gradient, _ = backward(module, inputs, delta)
    delta[0], gradient[0] = 0, 0
    delta[1].flatten()[0] = torch.nan
    gradient[2].flatten()[0] = torch.inf
    found, _, solved = rule.solve(delta, gradient, torch.full((5,), UNDAMPED))
    assert solved.tolist() == [False, False, False, True, True]
    assert (found[:3] == 0).all()
    assert relative(found[3:], inputs[3:]) < 1e-9


def test_the_size_of_delta_does_not_matter():
    torch.manual_seed(0)
    module = nn.Conv2d(1, 8, 3, 1, 1).double()
    rule, inputs, delta = case(module, (1, 4, 4), n=3)
    delta *= torch.tensor([1e-60, 1.0, 1e60], dtype=torch.float64).view(-1, 1, 1, 1)
    found, variance, _ = rule.solve(delta, backward(module, inputs, delta)[0], torch.full((3,), UNDAMPED))
    assert relative(found, inputs) < 1e-9
    assert (variance[0] > 1e100 * variance[1]).all()


def test_the_weight_and_bias_of_a_layer_are_named():
    rule = rule_for(layer_of(nn.Linear(3, 2), (3,)))
    assert (rule.weight, rule.bias) == ("weight", "bias")
    assert rule_for(layer_of(nn.Linear(3, 2, bias=False), (3,))).bias_of({}) == 0


def test_a_known_input_is_not_needed_to_carry_delta():
    rule = rule_for(layer_of(nn.Linear(3, 2), (3,)))
    unknown = Estimate(torch.full((1, 3), torch.nan), torch.full((1, 3), torch.inf))
    delta, weight = torch.rand(1, 2), torch.rand(2, 3)
    torch.testing.assert_close(rule.carry(delta, 0, [unknown], None, {"weight": weight}), delta @ weight)


@quick
@given(affine_layers)
def test_the_matrices_of_all_blocks_are_the_equations(small):
    rule, inputs, delta = case(*small)
    assume(rule.groups == 1)
    gradient, columns = rule.weight_gradient(inputs, delta), rule.columns(inputs)
    torch.manual_seed(0)
    basis = torch.randn(rule.column_size, rule.column_size, dtype=torch.float64)
    rows = 0
    for block in range(rule.n_blocks):
        found = rule.matrix(block, delta, basis) @ torch.linalg.solve(basis, columns[:, block].mT)
        torch.testing.assert_close(found, rule.equations(block, gradient))
        rows += found.shape[1] * found.shape[2]
    entries_that_padding_alone_meets = gradient[0].numel() - rows
    assert entries_that_padding_alone_meets >= 0
    assert torch.count_nonzero(gradient[0]) <= rows
