from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_run import Fit

from gitlight.callbacks.checkpoints import last_checkpoint
from gitlight.csv_logger import CSVFileLogger, read_rows
from gitlight.errors import RunStopped
from gitlight.stop_signals import StopSignals


class Given(StopSignals):
    """A signal that has come already; the process's own keep their meaning."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.received = number

    def listen(self, announce: bool = True) -> None:
        pass


class Synced(CSVFileLogger):
    """Keeps which rows were synced before which checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "metrics.csv", None)
        self.last = folder / "checkpoints" / "last.ckpt"
        self.synced: list[tuple[int, int]] = []

    def sync(self) -> None:
        step = torch.load(self.last, weights_only=True)["global_step"] if self.last.exists() else 0
        self.synced.append((len(read_rows(self.path)), step))
        super().sync()


class Told(CSVLogger):
    """Keeps what it is told of the run's end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.statuses: list[str] = []

    def finalize(self, status: str) -> None:
        self.statuses.append(status)
        super().finalize(status)


def test_a_signal_stops_a_run_with_a_checkpoint_and_not_as_a_failure(fit: Fit, tmp_path: Path) -> None:
    logger = Told(tmp_path)
    with pytest.raises(RunStopped, match="stopped at step 3"):
        fit([last_checkpoint(tmp_path, signals=Given(15))], max_epochs=4, logger=logger)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    # Lightning takes every exception for a failure, and says so once the run has ended for its loggers.
    assert logger.statuses[0] == "success"


def test_rows_before_a_checkpoint_are_synced_before_it(fit: Fit, tmp_path: Path) -> None:
    logger = Synced(tmp_path)
    fit([last_checkpoint(tmp_path)], logger=logger)
    # Three steps and a validation an epoch; the checkpoint there was when they were synced is that of the epoch before.
    assert logger.synced == [(4, 0), (8, 3)]
