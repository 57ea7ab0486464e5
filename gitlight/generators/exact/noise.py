"""How noisy a leak is, and whether it is one image's, from the last layer's gradient alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.data.pair import Gradients


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
    # The smaller side's Gram matrix loses half the digits; the triangular factor does not.
    triangle = torch.linalg.qr(weight_gradient.double().transpose(1, 2), mode="r")[1]
    values = torch.linalg.svdvals(triangle)
    rest = values[:, 1:]
    if rest.shape[1] == 0:
        zeros = values.new_zeros(len(values))
        return RankOne(zeros, zeros, zeros.bool())
    # One direction of the n_classes is taken by the signal.
    noise = (rest.square().sum(dim=1) / ((n_classes - 1) * max(1, n_features - 1))).sqrt()
    largest = values[:, 0].clamp_min(1e-300)
    second = rest[:, 0] / largest
    # Every image's δ adds up to zero over the classes, and so does an average over images: their sum is noise alone.
    white = weight_gradient.double().sum(dim=1).norm(dim=1) / (n_classes * n_features) ** 0.5
    structured = (rest[:, 0] > 3 * white * (n_classes**0.5 + n_features**0.5)) & (second > 1e-5)
    return RankOne(noise, second, structured)


def rounding_level(gradients: Gradients, dtype: torch.dtype) -> Tensor:
    """``(B,)``: the error that the precision alone leaves on an entry of typical size."""
    total = sum(g.double().flatten(1).square().sum(dim=1) for g in gradients.values())
    count = sum(g[0].numel() for g in gradients.values())
    assert isinstance(total, Tensor)
    return torch.finfo(dtype).eps * (total / count).sqrt()
