"""LPIPS (Zhang et al. 2018) with AlexNet, where its backbone's weights are to be had; and nothing else by that name."""

import functools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights

from gitlight.errors import ConfigError
from gitlight.metrics import PerceptualDistance

DOWNLOAD_TIMEOUT = 10.0
"""Seconds without an answer after which the download of the weights is given up."""

IMAGES_AT_A_TIME = 64
"""Images in one pass through AlexNet, which bounds the memory but in training, where all passes are kept."""


@functools.cache
def load_lpips() -> PerceptualDistance | None:
    """AlexNet LPIPS, or ``None`` and one warning that says how to get it.

    torchmetrics ships LPIPS' own weights but not AlexNet's: these are taken from torch's hub cache, or downloaded
    once. The result is kept for the process: there is one attempt and at most one warning. A file that is there but
    cannot be read is a warning as well: no run should end for a metric.

    Returns:
        A function from reconstructions and images, ``(K, C, H, W)`` in [0, 1] with at least 31 × 31 pixels, to one
        distance per image, ``(K,)``. Grey images are repeated to three channels.
    """
    try:
        distance = lpips_network()
    except ConfigError as error:
        rank_zero_warn(f"LPIPS is left out: {error}")
        return None
    return torch.no_grad()(distance)


def lpips_network() -> PerceptualDistance:
    """AlexNet LPIPS to train with: the same function as `load_lpips`', and gradients flow to the reconstructions.

    Raises:
        ConfigError: AlexNet's weights are not to be had, or cannot be read.
    """
    weights = AlexNet_Weights.IMAGENET1K_V1
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlsplit(weights.url).path).name
    found = path.exists()
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            weights.get_state_dict(progress=False, check_hash=True)
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    except Exception as error:  # a damaged pickle raises whatever it happens to run into
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if found:
            problem = f"the AlexNet weights in {path} cannot be read ({reason}); delete the file and"
        else:
            problem = f"the AlexNet weights are not in torch's hub cache and cannot be downloaded ({reason});"
        raise ConfigError(f"{problem} put {path.name} from {weights.url} into {folder}.") from error
    network.requires_grad_(False).eval()

    def lpips(reconstructions: Tensor, images: Tensor) -> Tensor:
        network.to(device=images.device, dtype=images.dtype)
        # expand() repeats grey images' one channel and leaves colour images as they are.
        candidates = reconstructions.expand(-1, 3, -1, -1).split(IMAGES_AT_A_TIME)
        truth = images.expand(-1, 3, -1, -1).split(IMAGES_AT_A_TIME)
        pairs = zip(candidates, truth, strict=True)
        return torch.cat([network(a, b, normalize=True).flatten() for a, b in pairs])

    return lpips


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torch.hub opens the address without a timeout of its own.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
