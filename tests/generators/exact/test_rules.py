"""The inverse rules against autograd and dense solves, in float64."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gitlight.architecture import Architecture
from gitlight.generators.exact.activations import activation_rule
from gitlight.generators.exact.conv2d import Conv2dRule
from gitlight.generators.exact.linear import LinearRule


def weight_gradients(layer, inputs, delta):
    """∂L/∂W and ∂L/∂input of each example for a given ∂L/∂output, by autograd."""
    inputs = inputs.clone().requires_grad_()
    weights, carried = [], []
    for one, its_delta in zip(inputs, delta, strict=True):
        found = torch.autograd.grad((layer(one[None])[0] * its_delta).sum(), [layer.weight, one])
        weights.append(found[0])
        carried.append(found[1])
    return torch.stack(weights), torch.stack(carried)


def dense_matrix(conv, delta, shape, group=0):
    """K(δ): the linear map from one input channel of a group to ∂L/∂W, column by column."""
    channel = group * shape[0] // conv.groups
    outputs = slice(group * conv.out_channels // conv.groups, (group + 1) * conv.out_channels // conv.groups)
    columns = []
    for position in range(shape[1] * shape[2]):
        unit = torch.zeros(1, *shape, dtype=torch.float64)
        unit.view(shape[0], -1)[channel, position] = 1
        gradient, _ = weight_gradients(conv, unit, delta[None])
        columns.append(gradient[0, outputs, 0].flatten())
    return torch.stack(columns, dim=1)


def convolution(channels, n_out, kernel, stride, padding, dilation, groups, shape, damping=0.0):
    conv = nn.Conv2d(channels, n_out, kernel, stride, padding, dilation, groups).double()
    model = nn.Sequential(conv, nn.Flatten())
    layer = Architecture.of(model, shape, 2).chain()[0]
    return conv, Conv2dRule(layer, damping)


convolutions = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "groups": st.sampled_from([1, 2]),
        "n_out": st.sampled_from([2, 8, 24]),
        "size": st.tuples(st.integers(4, 8), st.integers(4, 8)),
        "seed": st.integers(0, 100),
    }
)


@settings(max_examples=40, deadline=None)
@given(convolutions)
def test_convolution_rule_agrees_with_dense_algebra(case):
    size, seed = case.pop("size"), case.pop("seed")
    for axis in (0, 1):
        assume(case["dilation"][axis] * (case["kernel"][axis] - 1) < size[axis] + 2 * case["padding"][axis])
    torch.manual_seed(seed)
    shape = (4, *size)
    conv, rule = convolution(4, shape=shape, damping=1e-13, **case)
    inputs = torch.rand(2, *shape, dtype=torch.float64)
    delta = torch.randn_like(conv(inputs))
    gradient, carried = weight_gradients(conv, inputs, delta)

    torch.testing.assert_close(rule.carry(delta, conv.weight), carried)
    matrix = dense_matrix(conv, delta[0], shape)
    assert rule.rank == torch.linalg.matrix_rank(matrix)
    found = rule.solve_input(delta, gradient)
    if rule.exact:
        matrices = [dense_matrix(conv, d, shape, group) for d in delta for group in range(case["groups"])]
        condition = max(torch.linalg.cond(matrix) for matrix in matrices)
        assert (found - inputs).norm() / inputs.norm() < 1e-12 * condition**2
    else:
        # Whatever is not determined, the equations that there are hold.
        residual = weight_gradients(conv, found, delta)[0] - gradient
        assert residual.norm() / gradient.norm() < 1e-4


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
def test_damping_is_tikhonovs(damping):
    torch.manual_seed(0)
    shape = (1, 6, 6)
    conv, rule = convolution(1, 5, (3, 3), (2, 2), (1, 1), (1, 1), 1, shape, damping)
    inputs = torch.rand(1, *shape, dtype=torch.float64)
    delta = torch.randn_like(conv(inputs))
    gradient, _ = weight_gradients(conv, inputs, delta)
    matrix = dense_matrix(conv, delta[0], shape) / delta.norm()
    normal = matrix.T @ matrix
    penalised = normal + damping * normal.diagonal().mean() * torch.eye(36, dtype=torch.float64)
    wanted = torch.linalg.solve(penalised, matrix.T @ gradient.flatten() / delta.norm())
    torch.testing.assert_close(rule.solve_input(delta, gradient).flatten(), wanted)


def test_the_first_layers_of_lenet_leave_what_counting_says():
    # Stride 2 splits the 16×16 input by parity: 5×5 kernels reach odd rows by 2 of 5 taps, so the 64 unknowns at odd
    # rows and odd columns meet 2 · 2 · 12 = 48 equations, all others at least 72: 240 of 256.
    _, rule = convolution(12, 12, (5, 5), (2, 2), (2, 2), (1, 1), 1, (12, 16, 16))
    assert (rule.rank, rule.exact) == (240, False)
    assert rule.reason == "rank 240 of 256 unknowns per channel"


def test_patches_and_outputs_make_the_convolution_linear_in_its_weight():
    torch.manual_seed(0)
    conv, rule = convolution(3, 5, (3, 2), (2, 1), (1, 0), (1, 2), 1, (3, 7, 6))
    inputs = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    found = rule.patches(inputs) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(found, rule.outputs(conv(inputs)))


def test_linear_rule_recovers_its_input_at_any_scale():
    torch.manual_seed(0)
    layer = nn.Linear(30, 4).double()
    inputs = torch.randn(5, 30, dtype=torch.float64)
    delta = torch.randn(5, 4, dtype=torch.float64) * torch.logspace(-20, 3, 5, dtype=torch.float64)[:, None]
    gradient, carried = weight_gradients(layer, inputs, delta)
    rule = LinearRule()
    torch.testing.assert_close(rule.solve_input(delta, gradient), inputs)
    torch.testing.assert_close(rule.carry(delta, layer.weight), carried)


def test_an_example_without_gradient_or_with_a_broken_one_is_alone():
    torch.manual_seed(0)
    conv, rule = convolution(2, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (2, 5, 5), 1e-10)
    inputs = torch.rand(3, 2, 5, 5, dtype=torch.float64)
    delta = torch.randn_like(conv(inputs))
    gradient, _ = weight_gradients(conv, inputs, delta)
    delta[0], gradient[0] = 0, 0
    delta[1, 0, 0, 0] = float("nan")
    found = rule.solve_input(delta, gradient)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[2], inputs[2], rtol=1e-6, atol=1e-6)
    linear = LinearRule().solve_input(torch.zeros(1, 3), torch.zeros(1, 3, 6))
    assert (linear == 0).all()


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.1), nn.ReLU()])
def test_activation_rules_against_autograd(module):
    rule = activation_rule(Architecture.of(nn.Sequential(module, nn.Flatten()), (1, 2, 2), 2).chain()[0])
    inputs = torch.linspace(-4, 4, 80, dtype=torch.float64, requires_grad=True)
    outputs = module(inputs)
    (derivative,) = torch.autograd.grad(outputs.sum(), inputs)
    torch.testing.assert_close(rule.derivative(outputs.detach()), derivative)
    if rule.inverse is not None:
        torch.testing.assert_close(rule.inverse(outputs.detach()), inputs.detach())


@pytest.mark.parametrize("module", [nn.GELU(), nn.SiLU()])
def test_activations_whose_derivative_does_not_follow_have_no_rule(module):
    assert activation_rule(Architecture.of(nn.Sequential(module, nn.Flatten()), (1, 2, 2), 2).chain()[0]) is None


def test_saturated_outputs_stay_finite():
    for module, ends in ((nn.Sigmoid(), (0.0, 1.0)), (nn.Tanh(), (-1.0, 1.0))):
        rule = activation_rule(Architecture.of(nn.Sequential(module, nn.Flatten()), (1, 2, 2), 2).chain()[0])
        assert torch.isfinite(rule.inverse(torch.tensor(ends))).all()
