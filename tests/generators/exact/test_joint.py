"""The inputs of several images from one gradient, against dense Gaussian estimates with matrices made by autograd."""

import pytest
import torch
from dense import gradient_matrix, layer_of, relative
from hypothesis import assume, given
from small_layers import affine_layers, quick
from torch import nn

from gitlight.generators.exact import rule_for
from gitlight.generators.exact.joint import (
    _variance_by_output,
    exact_by_outputs,
    exact_jointly,
    solve_jointly,
    solved_jointly,
)
from gitlight.generators.exact.posterior import N_DEVIATIONS

SMALL = 1e-9
EXACT = torch.zeros((), dtype=torch.float64)


def case(module, shape, n_images, n_leaks=2):
    """The rule, inputs, δ, the gradient of their sum, means, a factor for each block, and sizes."""
    torch.manual_seed(0)
    rule = rule_for(layer_of(module, shape))
    inputs = torch.rand(n_leaks, n_images, *shape, dtype=torch.float64)
    delta = torch.randn(n_leaks, n_images, *rule.layer.output_shape, dtype=torch.float64)
    gradient = rule.weight_gradient(inputs.flatten(0, 1), delta.flatten(0, 1)).unflatten(0, (n_leaks, -1)).sum(dim=1)
    mean = torch.rand_like(inputs)
    factor = torch.eye(rule.column_size, dtype=torch.float64) + torch.randn(
        rule.n_blocks, rule.column_size, rule.column_size, dtype=torch.float64
    ).tril() / (2 * rule.column_size)
    size = 0.5 + torch.rand(n_leaks, n_images, dtype=torch.float64)
    return rule, inputs, delta, gradient, mean, factor, size


def no_errors(delta):
    return torch.zeros(*delta.shape[:2], N_DEVIATIONS, *delta.shape[2:], dtype=torch.float64)


def dense(module, rule, delta, gradient, noise, mean, factor, size):
    """Mean and covariance of all images' inputs, for one leak, from the textbook's formula."""
    shape = rule.layer.input_shape
    matrix = torch.cat([gradient_matrix(module, its, shape) for its in delta], dim=1)
    numbers = torch.arange(rule.n_inputs, dtype=torch.float64).view(1, *shape)
    prior = torch.zeros(rule.n_inputs, rule.n_inputs, dtype=torch.float64)
    for block, columns in zip(factor, rule.columns(numbers)[0].long(), strict=True):
        for column in columns:
            prior[column[:, None], column] = block @ block.T
    covariance = torch.block_diag(*(scale**2 * prior for scale in size))
    gain = covariance @ matrix.T
    inner = matrix @ gain + torch.diag(noise.square().expand(len(matrix)))
    flat = mean.flatten()
    found = flat + gain @ torch.linalg.solve(inner, gradient.flatten() - matrix @ flat)
    return found.view(mean.shape), covariance - gain @ torch.linalg.solve(inner, gain.T)


@quick
@given(affine_layers)
def test_it_is_the_gaussian_estimate(small):
    module, shape = small
    rule = rule_for(layer_of(module, shape))
    assume(rule.groups == 1)
    rule, _, delta, gradient, mean, factor, size = case(module, shape, n_images=3)
    covered = rule.from_columns(torch.ones_like(rule.columns(mean[:, 0]))) > 0
    noise = torch.tensor([0.3, 0.01], dtype=torch.float64)
    found = solve_jointly(rule, delta, no_errors(delta), gradient, noise, mean, factor, size, EXACT)
    for leak in range(2):
        wanted, _ = dense(module, rule, delta[leak], gradient[leak], noise[leak], mean[leak], factor, size[leak])
        torch.testing.assert_close(found.value[leak], torch.where(covered[0], wanted, mean[leak]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("module", "shape", "n_images"), [(nn.Linear(6, 9), (6,), 7), (nn.Conv2d(2, 6, 3, 1, 1), (2, 4, 4), 3)]
)
def test_as_many_equations_as_unknowns_give_the_inputs_themselves(module, shape, n_images):
    rule, inputs, delta, gradient, mean, factor, size = case(module.double(), shape, n_images)
    assert exact_jointly(rule, n_images)
    noise = torch.full((2,), 1e-14, dtype=torch.float64)
    found = solve_jointly(rule, delta, no_errors(delta), gradient, noise, mean, factor, size, EXACT)
    assert relative(found.value, inputs) < SMALL
    tiny = solve_jointly(
        rule, 1e-170 * delta, no_errors(delta), 1e-170 * gradient, 1e-170 * noise, mean, factor, size, EXACT
    )
    assert relative(tiny.value, inputs) < SMALL


@pytest.mark.parametrize("n_images", [2, 9])  # fewer unknowns than equations, and more
def test_the_stated_variance_is_that_of_the_gaussian_estimate(n_images):
    module = nn.Conv2d(2, 4, 3, 1, 1).double()
    rule, _, delta, gradient, mean, factor, size = case(module, (2, 4, 4), n_images)
    noise = torch.tensor([0.5, 0.05], dtype=torch.float64)
    found = solve_jointly(rule, delta, no_errors(delta), gradient, noise, mean, factor, size, EXACT)
    for leak in range(2):
        _, covariance = dense(module, rule, delta[leak], gradient[leak], noise[leak], mean[leak], factor, size[leak])
        wanted = covariance.diagonal().view(n_images, -1).mean(dim=1)
        stated = found.variance[leak].flatten(1)[:, 0]
        # From sixteen samples of each unknown.
        torch.testing.assert_close(stated.mean(), wanted.mean(), rtol=0.2, atol=0)
        torch.testing.assert_close(stated, wanted, rtol=0.5, atol=0)


def test_errors_of_delta_and_of_weights_are_stated():
    """They say how wrong the inputs are, and keep the equations from being taken at their word."""
    module = nn.Linear(20, 12).double()
    rule, inputs, delta, _, mean, factor, size = case(module, (20,), n_images=10, n_leaks=200)
    mean, size = 0.5 * torch.ones_like(mean), 0.3 * torch.ones_like(size)
    factor = torch.ones_like(factor)
    noise = torch.full((200,), 1e-9, dtype=torch.float64)
    errors = 0.05 * torch.randn_like(no_errors(delta))
    for stated, spoiled, misfit in (
        (errors, delta + errors[:, :, 0], EXACT),
        (no_errors(delta), delta * (1 + 0.05 * torch.randn_like(delta)), EXACT + 0.05),
    ):
        true = rule.weight_gradient(inputs.flatten(0, 1), spoiled.flatten(0, 1)).unflatten(0, (200, -1)).sum(dim=1)
        wary = solve_jointly(rule, delta, stated, true, noise, mean, factor, size, misfit)
        trusting = solve_jointly(rule, delta, no_errors(delta), true, noise, mean, factor, size, EXACT)
        its, other = (((each.value - inputs).square().mean()) for each in (wary, trusting))
        assert its < 0.7 * other
        assert 0.5 < its / wary.variance.mean() < 2


def test_errors_of_delta_times_wide_inputs_are_what_they_make_of_gradients():
    """Of few positions and many inputs, the variances of equations are computed from products of inputs."""
    rule, _, delta, _, mean, _, _ = case(nn.Linear(300, 7).double(), (300,), n_images=3)
    errors = 0.1 * torch.randn_like(no_errors(delta))
    spread = torch.zeros(2, 3, 1, dtype=torch.float64)
    noise = torch.full((2,), 0.01, dtype=torch.float64)
    made = torch.einsum("bnso,bni->bsoi", errors, mean)
    expected = noise.square().unsqueeze(1) + made.square().mean(dim=(1, 3))
    torch.testing.assert_close(
        _variance_by_output(rule, errors.float(), noise, mean, spread), expected, rtol=1e-5, atol=0
    )
    doubt = (errors[:, :1, :1].expand_as(errors), torch.stack([mean[:, 0]] * 3, dim=1))
    opposite = doubt[0].float() * torch.tensor([1.0, 1.0, -2.0]).view(1, 3, 1, 1)
    assert _variance_by_output(rule, opposite, 0 * noise, doubt[1], spread).max() < 1e-12


def test_where_a_system_has_no_factor_what_was_expected_stands():
    module = nn.Linear(3, 2).double()
    rule, _, delta, gradient, mean, factor, size = case(module, (3,), n_images=4)
    delta[1] = torch.nan
    noise = torch.full((2,), 1e-3, dtype=torch.float64)
    found = solve_jointly(rule, delta, no_errors(delta), gradient, noise, mean, factor, size, EXACT)
    assert torch.isfinite(found.value[0]).all()
    assert torch.equal(found.value[1], mean[1])
    # That of sixteen samples of it.
    beforehand = size[1].square() * factor.square().sum(dim=2).mean()
    torch.testing.assert_close(found.variance[1, :, 0], beforehand, rtol=0.8, atol=0)
    # Nothing of the other leak is lost.
    alone = solve_jointly(
        rule, delta[:1], no_errors(delta)[:1], gradient[:1], noise[:1], mean[:1], factor, size[:1], EXACT
    )
    torch.testing.assert_close(found.value[:1], alone.value)


@pytest.mark.parametrize(
    ("module", "shape", "n_images", "exact"),
    [
        (nn.Linear(3, 5), (3,), 5, True),
        (nn.Linear(3, 5), (3,), 6, False),
        (nn.Linear(3, 8), (4, 3), 2, True),
        (nn.Linear(3, 8), (4, 3), 3, False),
        (nn.Conv2d(12, 12, 5, 1, 2), (12, 8, 8), 4, True),  # 300 equations a channel, 64 unknowns an image
        (nn.Conv2d(12, 12, 5, 1, 2), (12, 8, 8), 5, False),
        (nn.Conv2d(12, 12, 5, 2, 2), (12, 16, 16), 1, False),
        (nn.Conv2d(4, 8, 1, groups=2), (4, 1, 1), 2, False),  # groups are not solved jointly
    ],
)
def test_how_many_images_gradient_equations_determine(module, shape, n_images, exact):
    assert exact_jointly(rule_for(layer_of(module.double(), shape)), n_images) is exact


@pytest.mark.parametrize(
    ("module", "shape", "exact"),
    [
        (nn.Linear(4, 4), (4,), True),
        (nn.Linear(5, 4), (5,), False),
        (nn.Conv2d(12, 12, 5, 1, 2), (12, 8, 8), True),
        (nn.Conv2d(2, 8, 2, 2), (2, 5, 4), False),  # enough outputs, but a row of pixels is seen by none
        (nn.Conv2d(1, 1, 3), (1, 5, 5), False),
    ],
)
def test_whether_outputs_alone_determine_the_input(module, shape, exact):
    assert exact_by_outputs(rule_for(layer_of(module.double(), shape))) is exact


def test_pixels_that_no_kernel_meets_are_not_known():
    module = nn.Conv2d(1, 8, 2, 2).double()
    rule, inputs, delta, gradient, mean, factor, size = case(module, (1, 5, 4), n_images=2)
    noise = torch.full((2,), 1e-12, dtype=torch.float64)
    found = solve_jointly(rule, delta, no_errors(delta), gradient, noise, mean, factor, size, EXACT)
    assert torch.isinf(found.variance[..., 4, :]).all()
    assert torch.isfinite(found.variance[..., :4, :]).all()
    assert relative(found.value[..., :4, :], inputs[..., :4, :]) < SMALL


def test_an_error_without_bound_says_that_an_outputs_equations_say_nothing():
    module = nn.Linear(6, 9).double()
    rule, inputs, delta, gradient, mean, factor, size = case(module, (6,), n_images=3)
    errors = no_errors(delta)
    errors[0, 0, :, 4] = torch.inf
    gradient[0, 4] = 1e6
    noise = torch.full((2,), 1e-12, dtype=torch.float64)
    found = solve_jointly(rule, delta, errors, gradient, noise, mean, factor, size, EXACT)
    assert relative(found.value, inputs) < 1e-6


def test_why_a_layer_is_not_solved_for_several_images():
    groups = rule_for(layer_of(nn.Conv2d(4, 8, 3, groups=2), (4, 5, 5)))
    assert solved_jointly(groups, 2) == "its weight has 2 groups"
    large = rule_for(layer_of(nn.Conv2d(1, 2, 1), (1, 80, 80)))
    assert solved_jointly(large, 2) == "the equations of 2 images are too many"
    assert solved_jointly(rule_for(layer_of(nn.Conv2d(12, 12, 5, 2, 2), (12, 16, 16))), 9) is None
