"""The leading singular direction, against a dense singular value decomposition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick

from gitlight.generators.exact.leading import leading_direction


@quick
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99), st.sampled_from([1.0, 1e-150, 1e150]))
def test_it_is_that_of_a_dense_svd(rows, columns, seed, size):
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed)).double() * size
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = leading_direction(matrices)
    torch.testing.assert_close(found.value, values[:, 0], rtol=1e-9, atol=0)
    if min(rows, columns) > 1 and (values[:, 1] > 0.9 * values[:, 0]).any():
        return  # two directions that are nearly as large are not told apart
    wanted = left[:, :, :1] * right[:, :1]
    torch.testing.assert_close(found.left.unsqueeze(2) * found.right.unsqueeze(1), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rest", [1e-6, 1e-12, 0.0])
def test_near_rank_one_it_has_all_digits(rest):
    generator = torch.Generator().manual_seed(0)
    left = torch.nn.functional.normalize(torch.randn(20, 10, generator=generator, dtype=torch.float64), dim=1)
    right = torch.nn.functional.normalize(torch.randn(20, 768, generator=generator, dtype=torch.float64), dim=1)
    matrices = left.unsqueeze(2) * right.unsqueeze(1)
    noisy = matrices + rest * torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
    found, dense = leading_direction(noisy), torch.linalg.svd(noisy, full_matrices=False)
    product = found.left.unsqueeze(2) * found.right.unsqueeze(1)
    torch.testing.assert_close(product, dense[0][:, :, :1] * dense[2][:, :1], rtol=0, atol=1e-14)


def test_of_nothing_it_is_nothing():
    found = leading_direction(torch.zeros(2, 3, 5, dtype=torch.float64))
    assert (found.value == 0).all()
    assert torch.isfinite(found.right).all()
