"""How close reconstructions are to the truth: matching within a client batch, MSE, PSNR, SSIM, LPIPS, intervals."""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Reconstructions and images ``(K, C, H, W)`` in [0, 1] to one distance per image, ``(K,)``; see `gitlight.lpips`."""

PERFECT_PSNR = 120.0
"""PSNR of a perfect image, in dB, and the largest PSNR reported: a mean squared error of 1e-12."""

SSIM_WINDOW = 11
"""Height and width of SSIM's Gaussian window (Wang et al. 2004: sigma 1.5), in pixels."""

SMALLEST_LPIPS_IMAGE = 31
"""Height and width, in pixels, below which AlexNet's third layer has no output: LPIPS is then not defined."""


def match(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Put the reconstructions of each client batch in the order of its images.

    Within a client batch the leak carries no order, so the assignment with the least total squared error counts (the
    Hungarian method). Only the order changes; gradients flow to the reconstructions.

    >>> images = torch.rand(1, 3, 1, 8, 8)
    >>> bool((match(images[:, [2, 0, 1]], images) == images).all())
    True

    Args:
        reconstructions: ``(B, N, C, H, W)``, in any order within a client batch.
        images: the truth, ``(B, N, C, H, W)``.

    Returns:
        The reconstructions, ``(B, N, C, H, W)``: entry ``[b, n]`` is the one assigned to ``images[b, n]``.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(reconstructions, images)
    if images.shape[1] == 1:
        return reconstructions
    with torch.no_grad():
        # Distances are taken entry by entry: the matrix-product form loses what tells near-perfect images apart.
        distances = torch.cdist(
            images.flatten(2).float(), reconstructions.flatten(2).float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
    # A diverged reconstruction (NaN, infinity) is the worst choice, and must not stop the run.
    costs = torch.nan_to_num(distances.double().square(), nan=1e30, posinf=1e30).clamp(max=1e30).cpu().numpy()
    order = torch.stack([torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs])
    rows = torch.arange(len(order), device=reconstructions.device).unsqueeze(1)
    return reconstructions[rows, order.to(reconstructions.device)]


def image_metrics(
    reconstructions: Tensor, images: Tensor, lpips: PerceptualDistance | None = None
) -> dict[str, Tensor]:
    """Each image's metrics, after clamping both to [0, 1]; data range 1.

    Args:
        reconstructions: ``(B, N, C, H, W)``, in the order of the images (see `match`).
        images: the truth, ``(B, N, C, H, W)``.
        lpips: what `gitlight.lpips.load_lpips` returned; ``None`` leaves LPIPS out.

    Returns:
        ``mse``; ``psnr`` in dB, at most 120 (a perfect image); ``ssim`` (Wang et al. 2004); and, if given and the
        images have at least 31 × 31 pixels, ``lpips`` (Zhang et al. 2018, AlexNet); each ``(B, N)``.

    Raises:
        ValueError: the shapes differ, or a side is under 6 pixels, where SSIM's window cannot be padded.
    """
    _check_shapes(reconstructions, images)
    # Half precision would round the errors themselves.
    dtype = torch.promote_types(torch.promote_types(reconstructions.dtype, images.dtype), torch.float32)
    leading = images.shape[:2]
    candidates = reconstructions.detach().to(dtype).flatten(0, 1).clamp(0, 1)
    truth = images.detach().to(dtype).flatten(0, 1).clamp(0, 1)
    mse = (candidates - truth).square().mean(dim=(1, 2, 3))
    metrics = {"mse": mse, "psnr": _psnr(mse), "ssim": ssim(candidates, truth)}
    if lpips is not None and min(images.shape[-2:]) >= SMALLEST_LPIPS_IMAGE:
        metrics["lpips"] = lpips(candidates, truth)
    return {name: values.reshape(leading) for name, values in metrics.items()}


def bootstrap_interval(values: Tensor, n_samples: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean (Efron and Tibshirani 1993, §13.3).

    Args:
        values: one number per image, ``(n,)``.
        n_samples: resamplings of the images.
        seed: seed of the resamplings; the global random state is left alone.

    Returns:
        Lower and upper end: the 2.5 % and 97.5 % quantiles of the resampled means.

    Raises:
        ValueError: there are no values, or no resamplings.
    """
    values = values.detach().flatten().double().cpu()
    n = len(values)
    if n == 0 or n_samples < 1:
        raise ValueError(f"An interval needs at least one value and one resampling, not {n} and {n_samples}.")
    generator = torch.Generator().manual_seed(seed)
    # At most 4 million indices (32 MB) are held at a time.
    at_a_time = max(1, 2**22 // n)
    means = []
    for start in range(0, n_samples, at_a_time):
        chosen = torch.randint(n, (min(at_a_time, n_samples - start), n), generator=generator)
        means.append(values[chosen].mean(dim=1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image: the mean over the places where the whole window lies within it.

    That is Wang et al.'s definition and scikit-image's; torchmetrics' own mean counts padded borders or not depending
    on its version, so only its map is used. In images under 11 pixels no window fits: the padded map is averaged.

    Args:
        reconstructions: ``(K, C, H, W)`` in [0, 1]; gradients flow to them.
        images: the truth, of the same shape.

    Returns:
        ``(K,)``.

    Raises:
        ValueError: a side is under 6 pixels, where the window cannot be padded.
    """
    height, width = images.shape[-2:]
    margin = SSIM_WINDOW // 2
    if min(height, width) <= margin:
        raise ValueError(f"SSIM needs images of at least {margin + 1} × {margin + 1} pixels, not {height} × {width}.")
    _, similarity = structural_similarity_index_measure(
        reconstructions, images, sigma=1.5, reduction="none", data_range=1.0, return_full_image=True
    )
    if min(height, width) >= SSIM_WINDOW:
        similarity = similarity[..., margin : height - margin, margin : width - margin]
    return similarity.mean(dim=(1, 2, 3))


def _psnr(mse: Tensor) -> Tensor:
    # max(NaN, x) is NaN, so a diverged reconstruction stays visible.
    return -10 * torch.log10(mse.clamp(min=10 ** (-PERFECT_PSNR / 10)))


def _check_shapes(reconstructions: Tensor, images: Tensor) -> None:
    if reconstructions.shape != images.shape or images.ndim != 5:
        raise ValueError(
            f"Reconstructions {tuple(reconstructions.shape)} and images {tuple(images.shape)} must have one shape "
            "(client batches, images, channels, height, width)."
        )
