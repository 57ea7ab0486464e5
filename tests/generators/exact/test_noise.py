"""Noise, and averages over several images, seen in the last layer's gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick
from torch import nn

from gitlight.generators.exact.noise import entry_size, rank_one

SHAPES = [(10, 768), (10, 64), (10, 20), (10, 10), (20, 10), (100, 64)]


def last_layers_gradient(n_images, classes, features, seed=0, n_leaks=20):
    """``(leaks, classes, features)`` by autograd: of the mean cross-entropy over the images of a leak."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(n_leaks):
        weight = (torch.randn(classes, features, generator=generator).double() / features**0.5).requires_grad_()
        inputs = torch.rand(n_images, features, generator=generator).double()
        labels = torch.randint(classes, (n_images,), generator=generator)
        gradients.append(torch.autograd.grad(nn.functional.cross_entropy(inputs @ weight.T, labels), weight)[0])
    return torch.stack(gradients)


def noisy(gradient, share, seed=1):
    size = share * gradient.square().mean(dim=(1, 2)).sqrt()
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gradient + size[:, None, None] * noise, size


@pytest.mark.parametrize("share", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize(("classes", "features"), SHAPES)
def test_white_noise_is_measured_and_not_taken_for_several_images(classes, features, share):
    gradient, size = noisy(last_layers_gradient(1, classes, features), share)
    found = rank_one(gradient)
    assert not found.structured.any()
    torch.testing.assert_close(found.noise.mean(), size.mean(), rtol=0.15, atol=0)


@pytest.mark.parametrize("share", [0.0, 1e-3])
@pytest.mark.parametrize("n_images", [2, 3, 8, 30])
@pytest.mark.parametrize(("classes", "features"), SHAPES)
def test_an_average_over_several_images_is_detected(classes, features, n_images, share):
    gradient, _ = noisy(last_layers_gradient(n_images, classes, features), share)
    assert rank_one(gradient).structured.double().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_one_image_has_rank_one_up_to_rounding(dtype):
    found = rank_one(last_layers_gradient(1, 10, 50).to(dtype))
    assert not found.structured.any()
    assert (found.second < 10 * torch.finfo(dtype).eps).all()


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_the_second_singular_value_is_that_of_a_dense_svd(classes, features, seed):
    gradient = torch.randn(3, classes, features, generator=torch.Generator().manual_seed(seed)).double()
    values = torch.linalg.svdvals(gradient)
    found = rank_one(gradient)
    wanted = values[:, 1] / values[:, 0] if min(classes, features) > 1 else torch.zeros(3).double()
    torch.testing.assert_close(found.second, wanted)
    assert found.noise.shape == found.structured.shape == (3,)


def test_precision_times_the_size_of_entries_is_the_error_of_rounding():
    generator = torch.Generator().manual_seed(0)
    exact = {"weight": torch.randn(4, 300, 30, generator=generator, dtype=torch.float64), "bias": torch.ones(4, 2) / 3}
    error = (exact["weight"].float().double() - exact["weight"]).square().mean(dim=(1, 2)).sqrt()
    found = torch.finfo(torch.float32).eps * entry_size(exact)
    assert found.shape == (4,)
    assert ((error < found) & (found < 10 * error)).all()
