"""A histogram as the numbers that the report's SVG is drawn from."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Lengths in units of the SVG's view box.
WIDTH = 640.0
HEIGHT = 236.0
LEFT = 56.0
RIGHT = 14.0
TOP = 32.0
BOTTOM = 52.0

_MOST_BINS = 30


@dataclass(frozen=True)
class Bar:
    """One bin: its range, its count, and its rectangle in the view box."""

    low: float
    high: float
    count: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Histogram:
    """Bars, ticks ``(place, label)`` of both axes, and the place of the mean, in the view box."""

    bars: tuple[Bar, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    mean_x: float


def histogram(values: Tensor) -> Histogram:
    """Bins of a round width (1, 2 or 5 times a power of ten): about twice the root of the number of values, at most 31.

    Args:
        values: ``(n,)`` finite numbers, at least one.
    """
    values = values.double().flatten()
    lowest, highest = float(values.min()), float(values.max())
    width = (
        _round_step((highest - lowest) / min(_MOST_BINS, max(6.0, 2 * math.sqrt(len(values)))))
        if highest > lowest
        else 1.0
    )
    first = math.floor(lowest / width)
    n_bins = math.floor(highest / width) - first + 1
    bins = (values / width).floor().long().sub(first).clamp(0, n_bins - 1)
    counts = torch.bincount(bins, minlength=n_bins).tolist()
    # A few bins would be drawn as slabs; empty ones on both sides keep their proportions.
    padding = max(0, (6 - n_bins + 1) // 2)
    first, counts = first - padding, [0] * padding + counts + [0] * padding
    inner, high = (WIDTH - LEFT - RIGHT) / len(counts), max(counts)

    def x(value: float) -> float:
        return LEFT + (value / width - first) * inner

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - count / high * (HEIGHT - TOP - BOTTOM)

    bars = tuple(
        Bar(
            (first + i) * width,
            (first + i + 1) * width,
            count,
            x((first + i) * width),
            y(count),
            inner,
            y(0) - y(count),
        )
        for i, count in enumerate(counts)
    )
    span = len(counts) * width
    x_step = max(width, _round_step(span / 8))
    x_start = math.ceil(first * width / x_step - 1e-9)
    x_values = [k * x_step for k in range(x_start, x_start + 12) if k * x_step <= first * width + span + 1e-9]
    y_step = max(1, round(_round_step(high / 4)))
    return Histogram(
        bars=bars,
        x_ticks=tuple((x(value), f"{value:.10g}") for value in x_values),
        y_ticks=tuple((y(count), str(count)) for count in range(0, high + 1, y_step)),
        mean_x=x(float(values.mean())),
    )


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
