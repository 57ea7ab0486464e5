"""The last layer under noise, against its known input and output error."""

import pytest
import torch

from gitlight.generators.exact.head import solve_head

N_LEAKS, N_CLASSES, N_FEATURES = 200, 5, 60


@pytest.fixture(scope="module")
def leaks():
    torch.manual_seed(0)
    weight = torch.randn(N_CLASSES, N_FEATURES, dtype=torch.float64) / 4
    bias = torch.randn(N_CLASSES, dtype=torch.float64)
    inputs = torch.rand(N_LEAKS, N_FEATURES, dtype=torch.float64)
    labels = torch.nn.functional.one_hot(torch.randint(N_CLASSES, (N_LEAKS,)), N_CLASSES)
    delta = torch.softmax(inputs @ weight.T + bias, dim=1) - labels
    return weight, bias, inputs, delta


def solved(leaks, relative, weight=None):
    its_weight, bias, inputs, delta = leaks
    noise = relative * delta.norm(dim=1)
    torch.manual_seed(1)
    gradient = delta.unsqueeze(2) * inputs.unsqueeze(1)
    noisy = gradient + noise[:, None, None] * torch.randn_like(gradient)
    noisy_bias = delta + noise[:, None] * torch.randn_like(delta)
    return solve_head(noisy, noisy_bias, noise, its_weight if weight is None else weight, bias)


@pytest.mark.parametrize("relative", [1e-8, 1e-4, 1e-2])
def test_errors_are_as_stated(leaks, relative):
    _, _, inputs, delta = leaks
    head = solved(leaks, relative)
    inputs_error = (head.inputs - inputs).square() / head.inputs_variance
    assert inputs_error.mean().item() == pytest.approx(1, rel=0.1)
    variance = head.delta_variance + head.scale_variance[:, None] * delta.square()
    assert ((head.delta - delta).square() / variance).mean().item() == pytest.approx(1, rel=0.15)


def test_the_forward_pass_fixes_the_scale_better_than_the_bias_gradient(leaks):
    error = solved(leaks, 1e-3).scale_variance.sqrt()
    assert error.median() < 1e-3 / 2, "the bias gradient alone has a relative error of 1e-3"


def test_without_noise_it_is_exact(leaks):
    _, _, inputs, delta = leaks
    head = solved(leaks, 1e-16)
    torch.testing.assert_close(head.inputs, inputs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(head.delta, delta, rtol=1e-12, atol=1e-13)


def test_a_row_common_to_all_classes_changes_nothing(leaks):
    weight, _, _, _ = leaks
    plain, moved = solved(leaks, 1e-4), solved(leaks, 1e-4, weight + torch.randn(N_FEATURES, dtype=torch.float64))
    torch.testing.assert_close(moved.inputs, plain.inputs)


def test_weights_that_do_not_fit_leave_the_scale_to_the_bias_gradient(leaks):
    inputs = leaks[2]
    head = solved(leaks, 1e-3, 3 * leaks[0])
    assert head.scale_variance.sqrt().median().item() == pytest.approx(1e-3, rel=0.3)
    assert ((head.inputs - inputs).square() / head.inputs_variance).mean() < 3


def test_probabilities_rounded_to_zero_and_one_end_no_batch(leaks):
    """Of a leak whose covariance is singular the bias gradient's scale is kept; the others are as before."""
    weight, bias, inputs, delta = (part.clone() for part in leaks)
    inputs[0] *= 1e4
    rounded = torch.softmax(inputs[:1] @ weight.T + bias, dim=1)
    assert (rounded == 0).any()
    delta[0] = rounded - torch.nn.functional.one_hot(rounded.argmin(dim=1), N_CLASSES)
    gradient = delta.unsqueeze(2) * inputs.unsqueeze(1)
    for size in (1e-30, 1e-8):
        noise = size * delta.norm(dim=1)
        head = solve_head(gradient, delta, noise, weight, bias)
        torch.testing.assert_close(head.inputs[1:], inputs[1:], rtol=1e-6, atol=1e-8)
        assert torch.isfinite(head.inputs).all()
        assert torch.isfinite(head.delta).all()


def test_a_saturated_probability_leaves_finite_estimates(leaks):
    weight, bias, inputs, _ = leaks
    gradient = torch.zeros(1, N_CLASSES, N_FEATURES, dtype=torch.float64)
    gradient[0, 0], gradient[0, 1] = 1e-20 * inputs[0], -1e-20 * inputs[0]
    head = solve_head(gradient, gradient.sum(dim=2) / inputs[0].sum(), torch.tensor([1e-26]).double(), weight, bias)
    assert all(torch.isfinite(part).all() for part in head)
