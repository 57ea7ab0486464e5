"""How iterative attacks went: distance of gradients and PSNR over iterations, as CSV and as a picture."""

import csv
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gitlight.errors import CheckpointError
from gitlight.report.results import write_text

_COLUMNS = ("attack", "leak", "image", "iteration", "distance", "psnr")
PICTURE = "all.png"
_SIZE = (9.0, 3.6)
_MOST_CURVES = 8


@dataclass(frozen=True)
class Point:
    """Where one search was.

    Attributes:
        leak: its number among the attacked ones.
        image: short name of its first image.
        iteration: steps taken.
        distance: of the gradients, in the objective's terms.
        psnr: mean over its images, in dB.
    """

    leak: int
    image: str
    iteration: int
    distance: float
    psnr: float


def keep_trajectories(points: Sequence[Point], label: str, condition: Sequence[str | int], folder: Path) -> Path:
    """Write an attack's points beside those of others, and draw them all.

    Args:
        points: of all searches.
        label: the attack, for people.
        condition: what tells it from any other; the same replaces the former's.
        folder: holds one CSV for each, and `PICTURE`.

    Returns:
        the CSV.
    """
    words = re.sub(r"[^A-Za-z0-9.]+", "_", label)[:60].strip("_")
    digest = hashlib.sha256(repr(tuple(condition)).encode()).hexdigest()[:8]
    path = folder / f"{words}-{digest}.csv"
    write_trajectories(points, label, path)
    # The latest, when there are more than can be told apart; this one is.
    latest = sorted(folder.glob("*.csv"), key=lambda file: file.stat().st_mtime)[-_MOST_CURVES:]
    curves = {}
    for file in latest:
        its_label, its_points = read_trajectories(file)
        curves[its_label if its_label not in curves else f"{its_label} ({file.stem[-8:]})"] = its_points
    draw_trajectories(curves, folder / PICTURE)
    return path


def write_trajectories(points: Sequence[Point], label: str, path: Path) -> None:
    """Write the points as CSV, all or nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for point in points:
        writer.writerow([label, point.leak, point.image, point.iteration, f"{point.distance:.6g}", f"{point.psnr:.4f}"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(text.getvalue(), path)


def read_trajectories(path: Path) -> tuple[str, list[Point]]:
    """The attack and its points, as `write_trajectories` wrote them.

    Raises:
        CheckpointError: the file is not of that form.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        points = [
            Point(int(row["leak"]), row["image"], int(row["iteration"]), float(row["distance"]), float(row["psnr"]))
            for row in rows
        ]
        return (rows[0]["attack"] if rows else path.stem), points
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold trajectories of an attack: {error}. Move it away.") from error


def mean_curve(points: Sequence[Point]) -> list[tuple[int, float, float]]:
    """``(iteration, median distance, mean PSNR)`` over searches; one that has ended counts with where it ended.

    >>> mean_curve([Point(0, "a", 0, 1.0, 10.0), Point(1, "b", 0, 3.0, 10.0), Point(0, "a", 5, 0.0, 20.0)])
    [(0, 2.0, 10.0), (5, 1.5, 15.0)]
    """
    by_iteration: dict[int, dict[int, Point]] = {}
    for point in points:
        by_iteration.setdefault(point.iteration, {})[point.leak] = point
    latest: dict[int, Point] = {}
    curve = []
    for iteration in sorted(by_iteration):
        latest |= by_iteration[iteration]
        distances = sorted(point.distance for point in latest.values())
        middle = len(distances) // 2
        median = distances[middle] if len(distances) % 2 else (distances[middle - 1] + distances[middle]) / 2
        curve.append((iteration, median, sum(point.psnr for point in latest.values()) / len(latest)))
    return curve


def draw_trajectories(attacks: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Write a PNG: median distance of gradients and mean PSNR over iterations, a line for each attack.

    Raises:
        ValueError: there is none.
    """
    if not attacks:
        raise ValueError("A picture of trajectories needs at least one attack.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    distance_axes, psnr_axes = figure.subplots(1, 2)
    for name, points in attacks.items():
        curve = mean_curve(points)
        iterations = [iteration for iteration, _, _ in curve]
        # A logarithmic axis has no place for zero.
        distance_axes.plot(iterations, [d if d > 0 else math.nan for _, d, _ in curve], label=name)
        psnr_axes.plot(iterations, [psnr for _, _, psnr in curve], label=name)
    distance_axes.set_yscale("log")
    distance_axes.set_title("distance of gradients, median", fontsize=9)
    psnr_axes.set_title("PSNR, dB, mean", fontsize=9)
    for axes in (distance_axes, psnr_axes):
        axes.set_xlabel("iteration", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    psnr_axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial)
    partial.replace(path)
