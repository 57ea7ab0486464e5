"""The weight-distance curves of a run: how far estimated parameters are from the leaked ones as training goes on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gitlight.disk import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTAL = "total"

TOTAL_COLOUR = "black"
OTHER_COLOUR = "0.75"
COLOURS = tuple(f"tab:{hue}" for hue in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan"))
"""As many parameters as these can be told apart; of more, only so many are named."""

# More points than this run into each other.
MOST_MARKERS = 40

TEXT_SIZE = 9


@dataclass(frozen=True)
class WeightDistancePoint:
    """What was measured at one moment of training.

    Attributes:
        step: optimiser steps taken so far.
        distances: ``NAME`` and ``NAME_relative`` for each estimated parameter and for ``total``, as
            `gitlight.callbacks.weight_distance.weight_distances` returns them.
        mse: mean squared error of the validation images' reconstructions, pixels in [0, 1]; None where no validation
            belongs to the point, as before training.
    """

    step: int
    distances: Mapping[str, float]
    mse: float | None = None


def draw_weight_distances(history: Sequence[WeightDistancePoint], path: Path) -> None:
    """Write a PNG: relative distances, absolute distances, and the reconstructions' MSE, over training steps.

    One thin line for each parameter, a bold one for the total, logarithmic axes. Where there are many parameters, the
    legend names those with the largest latest relative distance. A logarithmic axis has no place for zero, nor for the
    relative distance to a parameter of zeros: such points are left out.

    Args:
        history: the points, at least one, in the order of their steps.
        path: the file to write; missing folders are made. At any moment the file there is the old one or the new one,
            whole.

    Raises:
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("A picture of weight distances needs at least one point; the history is empty.")
    # Imported where it is needed: few runs draw. Not pyplot, whose global state is the calling program's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    colours = _colours(history)
    figure = Figure(figsize=(12, 7.5), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    relative = figure.add_subplot(grid[0, 0])
    absolute = figure.add_subplot(grid[0, 1], sharex=relative)
    error = figure.add_subplot(grid[1, 0], sharex=relative)
    legend = figure.add_subplot(grid[1, 1])

    for axes, ending in ((relative, "_relative"), (absolute, "")):
        for name, colour in colours.items():
            _line(axes, history, [point.distances.get(name + ending) for point in history], colour, name == TOTAL)
    _line(error, history, [point.mse for point in history], TOTAL_COLOUR, bold=True)
    _dress(relative, "relative distance to the leaked parameters", "‖estimate − truth‖ / ‖truth‖")
    _dress(absolute, "distance to the leaked parameters", "‖estimate − truth‖")
    _dress(error, "reconstruction error", "validation MSE")
    # Of one step, too, the axis is to show steps and not thousandths of one.
    first, last = history[0].step, max(history[-1].step, history[0].step + 1)
    relative.set_xlim(first - 0.03 * (last - first), last + 0.03 * (last - first))
    _explain(legend, colours)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        canvas.print_png(partial)
        partial.replace(path)


def _colours(history: Sequence[WeightDistancePoint]) -> dict[str, str]:
    """Name → colour in the order of drawing: what is not named in the legend, then what is, then the total."""
    keys = dict.fromkeys(key for point in history for key in point.distances)
    names = [key for key in keys if key != TOTAL and f"{key}_relative" in keys]
    named = names
    if len(names) > len(COLOURS):
        named = sorted(names, key=lambda name: _latest_relative(history, name), reverse=True)[: len(COLOURS)]
    colours = {name: OTHER_COLOUR for name in names if name not in named}
    # The smallest of the named first, so that the largest is drawn above it.
    colours |= dict(reversed(list(zip(named, COLOURS, strict=False))))
    return colours | {TOTAL: TOTAL_COLOUR}


def _latest_relative(history: Sequence[WeightDistancePoint], name: str) -> float:
    value = history[-1].distances.get(f"{name}_relative", math.inf)
    return value if math.isfinite(value) else -math.inf


def _line(
    axes: "Axes", history: Sequence[WeightDistancePoint], values: Sequence[float | None], colour: str, bold: bool
) -> None:
    drawn = [
        (point.step, value)
        for point, value in zip(history, values, strict=True)
        if value is not None and 0 < value < math.inf
    ]
    if not drawn:
        return
    axes.plot(
        [step for step, _ in drawn],
        [value for _, value in drawn],
        color=colour,
        linewidth=2.8 if bold else 1.0,
        marker="o" if len(history) <= MOST_MARKERS else "",
        markersize=5 if bold else 2.5,
    )


def _dress(axes: "Axes", title: str, y_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=TEXT_SIZE + 2, loc="left")
    axes.set_ylabel(y_label, fontsize=TEXT_SIZE)
    axes.set_xlabel("training steps", fontsize=TEXT_SIZE)
    if axes.lines:
        axes.set_yscale("log")
    else:
        # Matplotlib cannot scale nothing.
        axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(which="both", labelsize=TEXT_SIZE - 1)
    axes.grid(which="major", color="0.9")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _explain(axes: "Axes", colours: Mapping[str, str]) -> None:
    """The legend of both panels of distances, in a place of its own: names are long."""
    from matplotlib.lines import Line2D

    axes.axis("off")
    named = [name for name, colour in colours.items() if colour != OTHER_COLOUR]
    entries = {name: colours[name] for name in reversed(named)}
    if others := len(colours) - len(named):
        entries[f"{others} others; named are the largest relative distances"] = OTHER_COLOUR
    lines = [Line2D([], [], color=colour, linewidth=2.8 if name == TOTAL else 1.5) for name, colour in entries.items()]
    axes.legend(lines, list(entries), loc="upper left", frameon=False, fontsize=TEXT_SIZE)
