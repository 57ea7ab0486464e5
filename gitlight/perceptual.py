"""Training terms for sharp images. The least squared error alone is the mean of all that a leak leaves possible."""

from torch import Tensor
from torchmetrics.functional.image import image_gradients

from gitlight.architecture import ImageShape
from gitlight.errors import ConfigError
from gitlight.lpips import lpips_network
from gitlight.metrics import SMALLEST_LPIPS_IMAGE, SSIM_WINDOW, PerceptualDistance, ssim


def perceptual_term(name: str, image_shape: ImageShape) -> PerceptualDistance:
    """A distance to train with, differentiable in the reconstructions.

    Args:
        name: ``ssim``, one less structural similarity (Wang et al. 2004); ``gradient_difference``, between the sizes of
            steps from pixel to pixel (Mathieu et al. 2016, Eq. 6, α = 1); ``lpips`` (Zhang et al. 2018, AlexNet).
        image_shape: ``(C, H, W)``.

    Returns:
        A function from reconstructions and images, ``(K, C, H, W)`` in [0, 1], to one distance per image, ``(K,)``.

    Raises:
        ConfigError: the images are too small for it, or AlexNet's weights are not to be had.
    """
    smallest = {"ssim": SSIM_WINDOW // 2 + 1, "gradient_difference": 2, "lpips": SMALLEST_LPIPS_IMAGE}[name]
    if min(image_shape[1:]) < smallest:
        raise ConfigError(
            f"loss.perceptual: {name} needs images of at least {smallest} × {smallest} pixels, not {image_shape[1]} × "
            f"{image_shape[2]}. Leave it out, or give larger ones (data.image_size)."
        )
    if name == "ssim":
        return _dissimilarity
    if name == "gradient_difference":
        return _gradient_difference
    try:
        return lpips_network()
    except ConfigError as error:
        raise ConfigError(f"loss.perceptual: {name}: {error}") from error


def _dissimilarity(reconstructions: Tensor, images: Tensor) -> Tensor:
    return 1 - ssim(reconstructions, images)


def _gradient_difference(reconstructions: Tensor, images: Tensor) -> Tensor:
    pairs = zip(image_gradients(reconstructions), image_gradients(images), strict=True)
    differences = [(ours.abs() - theirs.abs()).abs().mean(dim=(1, 2, 3)) for ours, theirs in pairs]
    return differences[0] + differences[1]
