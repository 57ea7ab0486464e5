import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Fit, TinyData, TinyModule, batches
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import gitlight.callbacks.throughput
from gitlight.callbacks import Throughput
from gitlight.callbacks.checkpoints import last_checkpoint
from gitlight.csv_logger import CSVFileLogger, read_rows
from gitlight.data.pair import GradientPair
from gitlight.data.pair_clock import PairClock


class FakeClock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(gitlight.callbacks.throughput, "time", fake)
    return fake


class TimedModule(TinyModule):
    """A training step takes half a second, a validation step a hundred."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, *args: Any) -> Any:
        self.clock.now += 0.5
        return super().training_step(*args)

    def validation_step(self, *args: Any) -> Any:
        self.clock.now += 100
        return super().validation_step(*args)


def test_pairs_per_second_leaves_validation_out(fit: Fit, tmp_path: Path, clock: FakeClock) -> None:
    data = TinyData(batches(4, 4, 4, 2, n=2), batches(3))
    logger = CSVFileLogger(tmp_path / "metrics.csv", None)
    trainer = fit(
        [Throughput()], TimedModule(clock), data, logger=[logger], log_every_n_steps=2, val_check_interval=0.5
    )
    logged = [
        (int(row["step"]), float(row["throughput/pairs_per_second"]))
        for row in read_rows(tmp_path / "metrics.csv")
        if row["throughput/pairs_per_second"]
    ]
    # Leaks, not images; windows of two steps, and each epoch's mean.
    assert logged == [(1, 8.0), (3, 6.0), (3, 7.0), (5, 8.0), (7, 6.0), (7, 7.0)]
    assert float(trainer.progress_bar_metrics["throughput/pairs_per_second"]) == 7.0


def test_accumulated_batches_count_once_each(fit: Fit, clock: FakeClock) -> None:
    data = TinyData(batches(4, 4, 4, 4), batches(3))
    trainer = fit([Throughput()], TimedModule(clock), data, accumulate_grad_batches=2, log_every_n_steps=1)
    assert float(trainer.callback_metrics["throughput/pairs_per_second"]) == 8.0


def test_a_run_that_goes_on_within_an_epoch_counts_from_there(fit: Fit, tmp_path: Path, clock: FakeClock) -> None:
    data = TinyData(batches(4, 4, 4, 4), batches(3))
    fit([Throughput(), last_checkpoint(tmp_path)], TimedModule(clock), data, max_steps=2)
    clock.now += 1000.0  # until somebody starts it again
    logger = CSVFileLogger(tmp_path / "metrics.csv", None)
    fit(
        [Throughput()], TimedModule(clock), data, str(tmp_path / "checkpoints" / "last.ckpt"),
        max_epochs=1, logger=[logger],
    )  # fmt: skip
    rates = [row["throughput/pairs_per_second"] for row in read_rows(tmp_path / "metrics.csv")]
    assert {float(rate) for rate in rates if rate} == {8.0}


def test_a_real_clock_runs(fit: Fit) -> None:
    start = time.perf_counter()
    trainer = fit([Throughput()], max_epochs=1)
    assert float(trainer.callback_metrics["throughput/pairs_per_second"]) > 12 / (time.perf_counter() - start)


class LinearModule(TimedModule):
    """Paints images by a matrix of 12 × 20 from 12 numbers of each."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.generator.layer = nn.Linear(12, 20)

    def training_step(self, pair: GradientPair, batch_idx: int) -> Tensor:
        found = self.generator.layer(pair.images[:, 0, 0, 0])
        self.clock.now += 0.5
        return found.square().mean()


def test_flops_are_those_of_the_generators_step(fit: Fit, tmp_path: Path, clock: FakeClock) -> None:
    logger = CSVFileLogger(tmp_path / "metrics.csv", None)
    fit([Throughput()], LinearModule(clock), TinyData(batches(4, 4), batches(3)), logger=[logger], log_every_n_steps=1)
    rows = read_rows(tmp_path / "metrics.csv")
    flops = [1e12 * float(value) for row in rows if (value := row["throughput/teraflops_per_second"])]
    # Forward and the weight's gradient, a multiplication and an addition each; eight images a second.
    assert flops == pytest.approx([8 * 2 * 2 * 12 * 20] * len(flops))
    assert flops
    assert not any(row.get("throughput/model_flops_utilization") for row in rows), "no CPU has a figure"


def test_counting_ends_with_a_step_that_fails(fit: Fit, clock: FakeClock) -> None:
    class Failing(TimedModule):
        def training_step(self, *args: Any) -> Any:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit([Throughput()], Failing(clock), TinyData(batches(4), batches(3)))
    assert not _get_current_dispatch_mode_stack()


def test_operations_that_make_pairs_are_not_counted() -> None:
    clock, one = PairClock(), torch.ones(3, 3)
    with FlopCounterMode(display=False) as counter:
        clock.counter = counter
        one @ one
        with clock.running(torch.device("cpu")):
            one @ one
            torch.export.export(
                nn.Linear(3, 4), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
            ).module()(one)
        one @ one
    assert counter.get_total_flops() == 2 * 2 * 27
    assert type(counter.get_total_flops()) is int
