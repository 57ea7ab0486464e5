import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny_run import Fit, TinyData, TinyModule, batches
from torch import nn

from gitlight.callbacks import ReconstructionMetrics, WeightDistance
from gitlight.callbacks.checkpoints import last_checkpoint
from gitlight.callbacks.weight_distance import weight_distances
from gitlight.checkpoint_io import AtomicCheckpointIO
from gitlight.csv_logger import CSVFileLogger, read_rows
from gitlight.generators.base import ParameterEstimate

pytestmark = pytest.mark.usefixtures("without_lpips")


def test_distances_are_euclidean_norms() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.full((2, 2), 6.0), "c": torch.ones(3)}
    estimates = {"a": ParameterEstimate(torch.zeros(2)), "b": ParameterEstimate(torch.zeros(2, 2))}
    distances = weight_distances(estimates, truth)
    assert distances == pytest.approx(
        {"a": 5, "a_relative": 1, "b": 12, "b_relative": 1, "total": 13, "total_relative": 1}
    )


def test_a_common_row_does_not_count_where_it_cannot_be_known() -> None:
    torch.manual_seed(0)
    truth = torch.randn(5, 4)
    shifted = ParameterEstimate(truth + torch.randn(4), up_to_common_row=True)
    assert weight_distances({"w": shifted}, {"w": truth})["w"] < 1e-6
    assert weight_distances({"w": ParameterEstimate(shifted.value)}, {"w": truth})["w"] > 1
    other = torch.randn(5, 4)
    a, b = (x.double().numpy() - x.double().numpy().mean(axis=0) for x in (other, truth))
    distances = weight_distances({"w": ParameterEstimate(other, up_to_common_row=True)}, {"w": truth})
    assert distances["w"] == pytest.approx(np.linalg.norm(a - b))
    assert distances["w_relative"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_a_bias_is_known_up_to_one_number() -> None:
    truth = torch.tensor([1.0, 2.0, 4.0])
    assert weight_distances({"b": ParameterEstimate(truth + 7, up_to_common_row=True)}, {"b": truth})["b"] < 1e-6


def test_tiny_distances_are_measured_in_float64() -> None:
    truth = torch.full((1000,), 1.0, dtype=torch.float64)
    distance = weight_distances({"w": ParameterEstimate(truth + 1e-12)}, {"w": truth})["total"]
    assert distance == pytest.approx(1e-12 * math.sqrt(1000), rel=1e-3)


def test_a_parameter_of_zeros_has_no_relative_distance() -> None:
    zeros = torch.zeros(3)
    assert weight_distances({"w": ParameterEstimate(zeros)}, {"w": zeros})["w_relative"] == 0
    assert weight_distances({"w": ParameterEstimate(zeros + 1)}, {"w": zeros})["w_relative"] == math.inf


def test_an_estimate_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"estimate of w .*\(2,\), not \(3,\)"):
        weight_distances({"w": ParameterEstimate(torch.zeros(2))}, {"w": torch.zeros(3)})


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gitlight.callbacks.weight_distance.draw_weight_distances", lambda history, path: None)


class Approaching(TinyModule):
    """Estimates a weight of four entries: off by 8 each, then by half of what it was after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2).requires_grad_(False)

    def on_fit_start(self) -> None:
        self.estimate(8.0)

    def on_train_batch_end(self, *args: Any) -> None:
        self.estimate(8.0 * 0.5**self.trainer.global_step)

    def estimate(self, off_by: float) -> None:
        self.generator.estimates = {"weight": ParameterEstimate(self.network.weight + off_by)}


def run(fit: Fit, folder: Path, max_epochs: int = 2, resume: str | None = None) -> WeightDistance:
    """Two steps and a validation an epoch; ``metrics.csv`` and ``checkpoints/last.ckpt`` in the folder."""
    callback, module = WeightDistance(folder), Approaching()
    step = None if resume is None else AtomicCheckpointIO().load_checkpoint(resume)["global_step"]
    fit(
        [ReconstructionMetrics(), callback, last_checkpoint(folder)],
        module,
        TinyData(batches(4, 4), batches(3), module.network),
        ckpt_path=resume,
        max_epochs=max_epochs,
        logger=[CSVFileLogger(folder / "metrics.csv", step)],
        plugins=[AtomicCheckpointIO()],
    )
    return callback


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """``(step, value)`` of the rows of metrics.csv that have the metric."""
    return [(int(row["step"]), float(row[name])) for row in read_rows(folder / "metrics.csv") if row[name]]


@pytest.mark.usefixtures("no_drawing")
def test_distances_are_logged_before_the_first_step_and_at_each_validation(fit: Fit, tmp_path: Path) -> None:
    run(fit, tmp_path)
    # Each of four entries is off by 8 after no step, by 2 after two and by 0.5 after four; a row's step counts from 0.
    steps, distances = zip(*logged(tmp_path, "weight_distance/weight"), strict=True)
    assert steps == (0, 1, 3)
    assert distances == pytest.approx((16, 4, 1), rel=1e-5)
    assert logged(tmp_path, "weight_distance/total") == logged(tmp_path, "weight_distance/weight")
    relative = [value for _, value in logged(tmp_path, "weight_distance/total_relative")]
    assert relative == pytest.approx([relative[0], relative[0] / 4, relative[0] / 16], rel=1e-4)
    first = next(row for row in read_rows(tmp_path / "metrics.csv") if row["weight_distance/total"])
    assert (first["epoch"], first["train/loss"], first["val/mse"]) == ("0", "", "")


@pytest.mark.usefixtures("no_drawing")
def test_the_history_has_distances_and_the_logged_mse_by_steps_taken(fit: Fit, tmp_path: Path) -> None:
    history = run(fit, tmp_path).history
    assert [point.step for point in history] == [0, 2, 4]
    assert [point.distances["total"] for point in history] == pytest.approx([16, 4, 1], rel=1e-5)
    assert history[0].mse is None
    assert [point.mse for point in history[1:]] == [value for _, value in logged(tmp_path, "val/mse")]


@pytest.mark.usefixtures("no_drawing")
def test_without_reconstruction_metrics_there_is_no_mse(fit: Fit, tmp_path: Path) -> None:
    callback, module = WeightDistance(tmp_path), Approaching()
    fit([callback], module, TinyData(batches(4), batches(3), module.network), num_sanity_val_steps=1)
    assert [point.mse for point in callback.history] == [None] * 3


@pytest.mark.usefixtures("no_drawing")
def test_a_resumed_run_continues_its_curve(fit: Fit, tmp_path: Path) -> None:
    run(fit, tmp_path, 2)
    resumed = run(fit, tmp_path, 4, resume=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert [point.step for point in resumed.history] == [0, 2, 4, 6, 8]
    assert [point.mse for point in resumed.history[1:]] == [value for _, value in logged(tmp_path, "val/mse")]
    assert [step for step, _ in logged(tmp_path, "weight_distance/total")] == [0, 1, 3, 5, 7]


@pytest.mark.usefixtures("no_drawing")
def test_a_checkpoint_without_a_history_gets_no_second_start(fit: Fit, tmp_path: Path) -> None:
    callback, module = WeightDistance(tmp_path), Approaching()
    data = TinyData(batches(4, 4), batches(3), module.network)
    fit([last_checkpoint(tmp_path)], module, data, max_epochs=1)
    fit([callback], module, data, max_epochs=2, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert [point.step for point in callback.history] == [4]


@pytest.mark.usefixtures("no_drawing")
def test_the_history_survives_a_checkpoint(fit: Fit, tmp_path: Path) -> None:
    callback = run(fit, tmp_path)
    torch.save(callback.state_dict(), tmp_path / "state.ckpt")
    other = WeightDistance(tmp_path)
    other.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert other.history == callback.history


class Pictures(WeightDistance):
    """Keeps what each picture's file held."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.pictures = [*getattr(self, "pictures", []), self.path.read_bytes()]


def test_the_picture_is_drawn_again_at_each_validation(fit: Fit, tmp_path: Path) -> None:
    callback, module = Pictures(tmp_path), Approaching()
    fit([callback], module, TinyData(batches(4), batches(3), module.network))
    assert len(set(callback.pictures)) == 2
    assert [path.name for path in tmp_path.glob("*weight_distance*")] == ["weight_distance.png"]


def test_generators_without_estimates_log_and_draw_nothing(fit: Fit, tmp_path: Path) -> None:
    callback = WeightDistance(tmp_path)
    trainer = fit([callback], logger=[CSVFileLogger(tmp_path / "metrics.csv", None)])
    assert not any("distance" in name for name in trainer.callback_metrics)
    assert not any("distance" in name for name in read_rows(tmp_path / "metrics.csv")[0])
    assert [path.name for path in tmp_path.glob("*.*")] == ["metrics.csv"]
    assert callback.history == []
