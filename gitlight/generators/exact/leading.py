"""The leading singular direction of many small matrices at once."""

from typing import NamedTuple

import torch
from torch import Tensor


class Leading(NamedTuple):
    """The largest singular value of ``B`` matrices, and its vectors.

    Attributes:
        left: ``(B, rows)``.
        value: ``(B,)``.
        right: ``(B, columns)``.
    """

    left: Tensor
    value: Tensor
    right: Tensor


def leading_direction(matrices: Tensor) -> Leading:
    """Of ``(B, rows, columns)`` float64, finite.

    By the Gram matrix of the smaller side, whose rounding the two products that follow take out, as steps of the power
    method do. Singular value decompositions and QR factors of matrices that are not small both ways are computed one
    after the other on a GPU.
    """
    size = matrices.flatten(1).abs().amax(dim=1).clamp_min(1e-300)[:, None, None]
    scaled = matrices / size  # squares of tiny gradients would vanish
    flat = scaled.shape[1] <= scaled.shape[2]
    narrow = scaled if flat else scaled.mT
    vector = torch.linalg.eigh(narrow @ narrow.mT)[1][:, :, -1:]
    for _ in range(2):
        right, _ = _unit(narrow.mT @ vector)
        vector, value = _unit(narrow @ right)
    left, right = (vector, right) if flat else (right, vector)
    return Leading(left.squeeze(2), (value * size).flatten(), right.squeeze(2))


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norm = vectors.norm(dim=1, keepdim=True)
    return vectors / norm.clamp_min(1e-300), norm
