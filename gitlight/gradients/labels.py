"""Labels of leaks: what they have to be, and the loss that they enter."""

import torch
from torch import Tensor, nn

from gitlight.errors import DataError

# Cross-entropy leaves out labels of -100 unless told of another: a client batch would shrink without a word.
_IGNORED = torch.iinfo(torch.int32).min


def check_labels(images: Tensor, labels: Tensor, n_classes: int) -> None:
    """Find out whether labels fit images and classes.

    Values are looked at on the CPU alone: on a GPU the host would wait for all that the device has still to do. There
    a label that is no class fails the device's own assertion in `cross_entropy`.

    Args:
        images: ``(B, N, C, H, W)``.
        labels: what should be ``(B, N)`` int64.
        n_classes: number of classes.

    Raises:
        DataError: they are not one whole number in ``range(n_classes)`` for each image.
    """
    if labels.dtype != torch.int64 or labels.shape != images.shape[:2]:
        raise DataError(
            f"labels: expected one int64 number an image, of shape {tuple(images.shape[:2])} (leaks, images), not "
            f"{labels.dtype} of shape {tuple(labels.shape)}."
        )
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    least, most = (int(value) for value in labels.aminmax())
    if least < 0 or most >= n_classes:
        leak, image = (int(index) for index in ((labels < 0) | (labels >= n_classes)).nonzero()[0])
        raise DataError(
            f"labels: image {image} of leak {leak} has label {int(labels[leak, image])}, and the leaked model has "
            f"classes 0 to {n_classes - 1}. Leave images without a label out, or give the model the number of classes."
        )


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of a client batch, in which every label counts.

    Args:
        logits: ``(N, n_classes)``.
        labels: ``(N,)`` int64.
        reduction: ``mean`` or ``sum``.
    """
    return nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction=reduction)
