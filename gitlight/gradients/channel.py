"""Channels: what happens to a gradient on its way to the attacker."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gitlight.config import ChannelConfig, GaussianNoiseConfig, PruningConfig
from gitlight.data.pair import Gradients, as_rows
from gitlight.data.sampling import mixed_seed
from gitlight.errors import ConfigError
from gitlight.gradients import CHANNELS

ROUNDING = 1e-7
"""Noise below the rounding of a gradient's entries in single precision."""


class Channel(Protocol):
    """One stage of a channel: gradients of ``B`` leaks in, the same shapes out."""

    def __call__(self, gradients: Gradients, seeds: Tensor) -> Gradients:
        """Change the gradients; ``seeds`` (``(B,)`` int64) fixes each leak's randomness, whatever its batch."""
        ...


class GaussianNoise:
    """Adds white noise whose standard deviation is a share of the leak's root-mean-square gradient entry."""

    def __init__(self, settings: GaussianNoiseConfig) -> None:
        """Raises: ConfigError, if the range of levels is empty."""
        lowest, self._highest = levels_of(settings)
        # A level of zero has no logarithm, and one below rounding shows nowhere.
        self._lowest = min(max(lowest, ROUNDING), self._highest)

    def __call__(self, gradients: Gradients, seeds: Tensor) -> Gradients:
        """Noisy copies; each leak's noise and its level depend on its seed alone."""
        flat = torch.cat([as_rows(gradient) for gradient in gradients.values()], dim=1)
        noise = torch.empty_like(flat)
        generator = torch.Generator(flat.device)
        levels = torch.full((len(flat), 1), self._highest, dtype=flat.dtype)
        for number, (row, seed) in enumerate(zip(noise, seeds.tolist(), strict=True)):
            row.normal_(generator=generator.manual_seed(seed))
            if self._lowest < self._highest:
                # From another seed: with the noise's own, the first entries' noise would depend on the level.
                other = torch.Generator().manual_seed(mixed_seed("noise level", seed))
                share = torch.rand((), generator=other, device="cpu")
                levels[number] = self._lowest ** (1 - share) * self._highest**share
        noise *= levels.to(flat) * flat.square().mean(dim=1, keepdim=True).sqrt()
        parts = (flat + noise).split([gradient[0].numel() for gradient in gradients.values()], dim=1)
        return {name: part.view_as(gradient) for (name, gradient), part in zip(gradients.items(), parts, strict=True)}


def levels_of(settings: GaussianNoiseConfig) -> tuple[float, float]:
    """The lowest and the highest level.

    Raises:
        ConfigError: the former is above the latter.
    """
    lowest = settings.relative_std if settings.lowest_std is None else settings.lowest_std
    if lowest > settings.relative_std:
        raise ConfigError(
            f"channel: gaussian_noise: lowest_std={lowest:g} is above relative_std={settings.relative_std:g}, the "
            "highest level. Give a smaller lowest_std."
        )
    return lowest, settings.relative_std


class Pruning:
    """Sets the smallest entries of each tensor to zero (the gradient sparsification of distributed training)."""

    def __init__(self, settings: PruningConfig) -> None:
        self._fraction = settings.fraction

    def __call__(self, gradients: Gradients, seeds: Tensor) -> Gradients:
        """Pruned copies; of each leak's tensor of ``n`` entries the ``round(fraction · n)`` smallest become zero."""
        return {name: self._prune(gradient) for name, gradient in gradients.items()}

    def _prune(self, gradient: Tensor) -> Tensor:
        flat = as_rows(gradient)
        n_pruned = round(self._fraction * flat.shape[1])
        smallest = flat.abs().topk(n_pruned, dim=1, largest=False).indices
        return flat.scatter(1, smallest, 0.0).view_as(gradient)


def build_channel(stages: Sequence[ChannelConfig]) -> list[Channel]:
    """The stages of a config, in order."""
    return [CHANNELS[stage.name].load()(stage) for stage in stages]


def describe_channel(stages: Sequence[ChannelConfig]) -> str:
    """A channel in one line, for results: ``none``, or the stages with their settings.

    >>> describe_channel([GaussianNoiseConfig(relative_std=0.01), PruningConfig(fraction=0.5)])
    'gaussian_noise(relative_std=0.01) + pruning(fraction=0.5)'
    """
    described = []
    for stage in stages:
        values = ", ".join(
            f"{key}={value}" for key, value in vars(stage).items() if key != "name" and value is not None
        )
        described.append(f"{stage.name}({values})")
    return " + ".join(described) or "none"
