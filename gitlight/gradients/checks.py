"""What leaks are made of: what images, labels and seeds have to be."""

import torch
from torch import Tensor

from gitlight.architecture import ImageShape
from gitlight.errors import DataError


def check_images(images: Tensor, image_shape: ImageShape) -> None:
    """Check that images fit a leaked model. Their values are not looked at.

    Args:
        images: what should be ``(B, N, C, H, W)`` of floating point, ``N`` at least 1.
        image_shape: ``(C, H, W)`` of the model's input.

    Raises:
        DataError: they have other sizes, another number of dimensions or whole numbers, or leaks have no images.
    """
    if images.ndim != 5 or images.shape[2:] != tuple(image_shape):
        sizes = ", ".join(map(str, image_shape))
        raise DataError(
            f"images: expected shape (leaks, images, {sizes}), as the leaked model's images are, not "
            f"{tuple(images.shape)}. Resize them, or trace the model for their size."
        )
    if not images.is_floating_point():
        raise DataError(
            f"images: expected values in [0, 1] of floating point, not {images.dtype}. Divide bytes by 255."
        )
    if images.shape[1] == 0:
        raise DataError(
            f"images: {len(images)} leaks of 0 images each, which have no gradient. Give each at least one image."
        )


def check_labels(images: Tensor, labels: Tensor, n_classes: int) -> None:
    """Check that labels fit images and classes.

    Values are looked at on the CPU alone: on a GPU the host would wait for all that the device has still to do. There
    a label that is no class fails the device's own assertion in `cross_entropy`.

    Args:
        images: ``(B, N, C, H, W)``, as `check_images` lets through.
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


def check_seeds(images: Tensor, seeds: Tensor) -> None:
    """Check that there is a seed for each leak.

    Args:
        images: ``(B, N, C, H, W)``.
        seeds: what should be ``(B,)`` int64.

    Raises:
        DataError: there is not.
    """
    if seeds.dtype != torch.int64 or seeds.shape != images.shape[:1]:
        raise DataError(
            f"seeds: expected one int64 number a leak, of shape ({len(images)},), not {seeds.dtype} of shape "
            f"{tuple(seeds.shape)}."
        )
