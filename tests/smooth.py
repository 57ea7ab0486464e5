"""Images that are random, and smooth as photographs are."""

import torch


def smooth_images(n, seed, shape):
    """Random images that, like photographs, vary more over large distances than over small ones."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)
    return (fine + 0.05 * torch.randn(n, *shape, generator=generator)).clamp(0, 1)
