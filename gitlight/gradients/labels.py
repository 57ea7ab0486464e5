"""The loss that labels enter."""

import torch
from torch import Tensor, nn

# Cross-entropy leaves out labels of -100 unless told of another: a client batch would shrink without a word.
_IGNORED = torch.iinfo(torch.int32).min


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of a client batch, in which every label counts.

    Args:
        logits: ``(N, n_classes)``.
        labels: ``(N,)`` int64.
        reduction: ``mean`` or ``sum``.
    """
    return nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction=reduction)
