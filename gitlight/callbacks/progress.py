"""What a run shows while it trains: a progress bar on a terminal, one plain line an epoch elsewhere."""

import math
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from gitlight.callbacks.checkpoints import is_finished
from gitlight.callbacks.throughput import PAIRS_PER_SECOND

SHOWN = ("train/", "val/", "weight_distance/total_relative")
"""Beginnings of the names of the metrics that the plain lines show."""


class TrainingClock:
    """Time since training began in this process, and an estimate of the time left in the whole run."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._start = time.monotonic()
        # A resumed run did its first steps in another process.
        self._first_step = trainer.global_step

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self._start

    @property
    def remaining(self) -> float | None:
        """Seconds, validations included; ``None`` while there is nothing to go by."""
        done = self._trainer.global_step - self._first_step
        total = self._trainer.estimated_stepping_batches - self._first_step
        if done <= 0 or not math.isfinite(total):
            return None
        estimate = self.elapsed * max(0.0, total - done) / done
        limits = [c.time_remaining() for c in self._trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        return min([estimate, *(max(0.0, limit) for limit in limits if limit is not None)])


class PairsProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with pairs per second and the time left in the whole run among its metrics.

    The bar and the times in front count one epoch.
    """

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_text_delimiter="  ", metrics_format=".4g"))
        self._clock: TrainingClock | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._clock = TrainingClock(trainer)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The metrics beside the bar: losses and validation metrics, pairs per second, time left in the run."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        rate = metrics.pop(PAIRS_PER_SECOND, None)
        if isinstance(rate, float | int):
            metrics["pairs/s"] = f"{rate:.0f}"
        if self._clock is not None and (remaining := self._clock.remaining) is not None:
            metrics["left"] = _clock_time(remaining)
        return metrics


class QuietProgress(ProgressBar):
    """One plain line an epoch, by rank 0: epoch, losses and metrics, pairs per second, elapsed and remaining time.

    It stands in for Lightning's progress bar, so that none is drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._clock: TrainingClock | None = None
        self._validated = False

    def disable(self) -> None:
        """Print nothing (ranks other than 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock = TrainingClock(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there are values of this epoch's."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line."""
        if self._enabled and self._clock is not None:
            self.print(_epoch_line(trainer, self._clock, self._validated), flush=True)
        self._validated = False


def _epoch_line(trainer: Trainer, clock: TrainingClock, validated: bool) -> str:
    logged: dict[str, Any] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    part = "" if is_finished(trainer) else f", up to step {trainer.global_step}"
    parts = [f"epoch {trainer.current_epoch + 1}{last}{part}"]
    # Lightning keeps a value logged by step and by epoch under three names.
    shown = SHOWN if validated else SHOWN[:1]  # the others are of an epoch before
    names = [name for name in logged if name.startswith(shown) and not name.endswith(("_step", "_epoch"))]
    parts += [f"{name} {logged[name]:.4g}" for name in sorted(names)]
    if PAIRS_PER_SECOND in logged:
        parts.append(f"{logged[PAIRS_PER_SECOND]:.0f} pairs/s")
    parts.append(f"elapsed {_clock_time(clock.elapsed)}")
    remaining = clock.remaining
    if remaining is not None:
        parts.append(f"left {_clock_time(remaining)}")
    return "  ".join(parts)


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
