"""How noisy a leak is, and whether it is one image's, from the last layer's gradient alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.data.pair import Gradients, as_rows
from gitlight.generators.exact.leading import leading_direction

SUMMED = 4.0
"""Rounding of one entry, which the sums of a forward and a backward pass through several layers multiply."""


_ENTRIES_AT_ONCE = 1 << 20
"""That a processor brings to float64 together, 8 MiB: of larger pieces, the new memory takes most of the time."""


class RankOne(NamedTuple):
    """The last layer's weight gradient of one image has rank one, ``δ ⊗ a``; what is left over tells.

    Attributes:
        noise: ``(B,)``, standard deviation of the errors of its entries, from what is left over.
        second: ``(B,)``, its second singular value over its first.
        structured: ``(B,)`` bool, whether what is left over is more than white noise: its largest singular value is
            far above what noise of the size seen elsewhere would give. An average over several images is of that kind.
    """

    noise: Tensor
    second: Tensor
    structured: Tensor


def rank_one(weight_gradient: Tensor) -> RankOne:
    """Split ``(B, classes, features)`` into its rank-one part and the rest."""
    n_classes, n_features = weight_gradient.shape[1:]
    if min(n_classes, n_features) == 1:
        zeros = weight_gradient.new_zeros(len(weight_gradient), dtype=torch.float64)
        return RankOne(zeros, zeros, zeros.bool())
    gradient = weight_gradient.double()
    left, largest, _ = leading_direction(gradient)
    rest = gradient - left.unsqueeze(2) * (left.unsqueeze(1) @ gradient)
    # One direction of the n_classes is taken by the signal.
    noise = rest.flatten(1).norm(dim=1) / ((n_classes - 1) * max(1, n_features - 1)) ** 0.5
    second_value = leading_direction(rest).value
    second = second_value / largest.clamp_min(1e-300)
    # Every image's δ adds up to zero over the classes, and so does an average over images: their sum is noise alone.
    white = gradient.sum(dim=1).norm(dim=1) / (n_classes * n_features) ** 0.5
    structured = (second_value > 3 * white * (n_classes**0.5 + n_features**0.5)) & (second > 1e-5)
    return RankOne(noise, second, structured)


def entry_size(gradients: Gradients) -> Tensor:
    """``(B,)`` float64: the root mean square of each leak's entries."""
    norms = [_norms(as_rows(gradient)) for gradient in gradients.values()]
    count = sum(gradient.shape[1:].numel() for gradient in gradients.values())
    return torch.stack(norms).norm(dim=0) / count**0.5


def _norms(rows: Tensor) -> Tensor:
    at_once = max(1, _ENTRIES_AT_ONCE // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, len(rows))
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in rows.split(at_once)]
    return torch.cat(parts)
