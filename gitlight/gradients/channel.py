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
from gitlight.gradients.memory import leaks_at_once
from gitlight.gradients.sketch import Sketch

ROUNDING = 1e-7
"""Noise below the rounding of a gradient's entries in single precision."""

# Copies of a part's gradients that a stage holds beside them, pruning's with their 64-bit indices; a sketch's; and what
# `topk` lists of one leak's largest tensor on its way.
_STAGE_COPIES, _SKETCH_COPIES, _LISTED_COPIES = 5, 2, 4

# On a CPU the copies of parts of this size take memory that was freed before, not new pages (docs/decisions.md).
_CPU_PART_BYTES = 8e6


class Channel(Protocol):
    """One stage of a channel: gradients of ``B`` leaks in, any part of a batch, and the same shapes out."""

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
        noise *= levels.to(flat) * _mean_squares(flat).sqrt()
        parts = (flat + noise).split([gradient[0].numel() for gradient in gradients.values()], dim=1)
        return {name: part.view_as(gradient) for (name, gradient), part in zip(gradients.items(), parts, strict=True)}


def _mean_squares(rows: Tensor) -> Tensor:
    """``(B, 1)`` of ``(B, entries)``."""
    squares = rows.square()
    # Threads share the sum of a single row, which rounds it otherwise than among others.
    several = squares if len(rows) > 1 else squares.expand(2, -1)
    return several.mean(dim=1, keepdim=True)[: len(rows)]


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
        smallest = flat.abs().topk(n_pruned, dim=1, largest=False, sorted=False).indices
        return flat.scatter(1, smallest, 0.0).view_as(gradient)


def build_channel(stages: Sequence[ChannelConfig]) -> list[Channel]:
    """The stages of a config, in order."""
    return [CHANNELS[stage.name].load()(stage) for stage in stages]


def sent(
    gradients: Gradients, seeds: Tensor, stages: Sequence[Channel], sketch: Sketch | None, limit_gb: float
) -> Gradients:
    """What reaches the attacker: gradients after all stages, and then after a sketch if there is one.

    They pass a part of the leaks at a time, as many as the limit has room for, and what they are does not depend on it.

    Args:
        gradients: of ``B`` leaks; overwritten, and without a sketch the result.
        seeds: ``(B,)`` int64, of each leak's randomness.
        stages: in order.
        sketch: after them; None: gradients stay whole.
        limit_gb: for ``gradients``, the result and what stages and sketch need.

    Raises:
        ConfigError: one leak at a time needs more.
    """
    n_leaks = len(seeds)
    result = gradients
    if sketch is not None:
        result = {name: g.new_empty(n_leaks, *sketch.shapes[name]) for name, g in gradients.items()}
    n_parts = _n_parts(gradients, 0 if sketch is None else _n_bytes(result), bool(stages), limit_gb)
    parts = zip(_split(gradients, n_parts), _split(result, n_parts), seeds.tensor_split(n_parts), strict=True)
    for part, written, part_seeds in parts:
        for stage in stages:
            part = stage(part, part_seeds)
        if sketch is not None:
            part = sketch(part)
        for name, kept in written.items():
            kept.copy_(part[name])
    return result


def _n_parts(gradients: Gradients, sketched: int, has_stages: bool, limit_gb: float) -> int:
    """Into how many parts leaks are divided; ``sketched``: bytes of the sketches."""
    first = next(iter(gradients.values()))
    n_leaks, results = len(first), _n_bytes(gradients)
    if n_leaks == 0:
        return 1
    largest = max(gradient[:1].nbytes for gradient in gradients.values())
    fixed = sketched + (_LISTED_COPIES * largest if has_stages else 0)
    each = (_STAGE_COPIES if has_stages else _SKETCH_COPIES) * results / n_leaks
    at_once = leaks_at_once(
        limit_gb,
        results,
        fixed,
        each,
        f"the gradients of {n_leaks} leaks take",
        "and for one at a time to pass channel and sketch",
    )
    if first.device.type == "cpu":
        at_once = min(at_once, max(1, int(_CPU_PART_BYTES * n_leaks / results)))
    return -(-n_leaks // at_once)


def _n_bytes(gradients: Gradients) -> int:
    return sum(gradient.nbytes for gradient in gradients.values())


def _split(gradients: Gradients, n_parts: int) -> list[Gradients]:
    """Views of parts of the leaks, about equally many in each."""
    parts = zip(*(gradient.tensor_split(n_parts) for gradient in gradients.values()), strict=True)
    return [dict(zip(gradients, part, strict=True)) for part in parts]


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
