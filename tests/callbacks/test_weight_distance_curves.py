import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gitlight.callbacks import WeightDistancePoint, draw_weight_distances


def falling(n_parameters: int, n_points: int) -> list[WeightDistancePoint]:
    """Every distance, and the MSE, is halved from point to point; the first point has no MSE."""
    points = []
    for number in range(n_points):
        distances = {}
        for name in [*(f"layer{i}.weight" for i in range(n_parameters)), "total"]:
            distances |= {name: 3 * 0.5**number, f"{name}_relative": 0.5**number}
        points.append(WeightDistancePoint(10 * number, distances, 0.1 * 0.5**number if number else None))
    return points


def pixels(history: list[WeightDistancePoint], path: Path) -> np.ndarray:
    draw_weight_distances(history, path)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("n_parameters", [1, 70])
def test_the_picture_changes_when_the_history_grows(tmp_path: Path, n_parameters: int) -> None:
    history = falling(n_parameters, 4)
    path = tmp_path / "new" / "curves.png"
    before, after, again = pixels(history[:3], path), pixels(history, path), pixels(history, path)
    assert before.shape == after.shape
    assert (before != after).any()
    assert (after == again).all()
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_every_panel_shows_its_own_numbers(tmp_path: Path) -> None:
    history = falling(2, 4)
    picture = pixels(history, tmp_path / "a.png")
    last = history[-1]
    changes = {
        "relative": WeightDistancePoint(last.step, {**last.distances, "layer0.weight_relative": 0.3}, last.mse),
        "absolute": WeightDistancePoint(last.step, {**last.distances, "layer0.weight": 0.9}, last.mse),
        "mse": WeightDistancePoint(last.step, last.distances, 0.03),
    }
    height, width = picture.shape[:2]
    for panel, changed in changes.items():
        rows, columns = np.nonzero((pixels([*history[:-1], changed], tmp_path / "b.png") != picture).any(axis=-1))
        assert (columns.max() < width / 2) == (panel != "absolute"), panel
        assert (rows.min() > height / 2) == (panel == "mse"), panel


def test_what_has_no_logarithm_is_left_out(tmp_path: Path) -> None:
    unusual = {"a": 0.0, "a_relative": math.inf, "total": math.nan, "total_relative": 0.0}
    draw_weight_distances([WeightDistancePoint(0, unusual), WeightDistancePoint(1, unusual, 0.0)], tmp_path / "a.png")
    history = [*falling(12, 3), WeightDistancePoint(30, {**falling(12, 1)[0].distances, **unusual}, math.nan)]
    draw_weight_distances(history, tmp_path / "a.png")


def test_a_parameter_may_be_estimated_from_some_point_on(tmp_path: Path) -> None:
    history = [*falling(2, 2), *falling(12, 4)[2:]]
    assert (pixels(history, tmp_path / "a.png") != pixels(falling(2, 4), tmp_path / "a.png")).any()


def test_an_empty_history_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one point"):
        draw_weight_distances([], tmp_path / "a.png")


def test_the_command_line_does_not_wait_for_matplotlib() -> None:
    code = "import sys, gitlight, gitlight.cli; gitlight.cli.settings_help(); sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
