"""`Throughput`: leaks processed per second of training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gitlight.data.pair import GradientPair

PAIRS_PER_SECOND = "throughput/pairs_per_second"


class Throughput(Callback):
    """Logs ``throughput/pairs_per_second``: leaks over all ranks per second of training.

    A second of training is one of waiting for images, making gradients and optimising; validation, pictures and
    checkpoints do not count. Logged every ``log_every_n_steps`` optimiser steps for the steps since, and at the end
    of each epoch for the epoch. Every rank is taken to have processed what rank 0 has: the training images are dealt
    out in equal shares, and nothing needs to be communicated. Clocks are not synchronised with the device, which can
    lag by a few steps; the loss that is logged at the same steps waits for it.
    """

    def __init__(self) -> None:
        self._mark = 0.0
        self._reported_step = 0
        self._window = _Tally()
        self._epoch = _Tally()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._epoch = _Tally()
        self._window = _Tally()
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: GradientPair, batch_idx: int
    ) -> None:
        """Count one batch, and report where a report is due."""
        now = time.perf_counter()
        for tally in (self._window, self._epoch):
            tally.add(len(batch) * trainer.world_size, now - self._mark)
        self._mark = now
        step = trainer.global_step
        due = step % max(1, trainer.log_every_n_steps) == 0 and step != self._reported_step  # type: ignore[attr-defined]
        if due and self._window.seconds > 0:
            pl_module.log(PAIRS_PER_SECOND, self._window.rate, prog_bar=True, on_step=True, on_epoch=False)
            self._window = _Tally()
            self._reported_step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation's time out."""
        self._mark = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch's mean."""
        if self._epoch.seconds > 0:
            pl_module.log(PAIRS_PER_SECOND, self._epoch.rate, prog_bar=True, sync_dist=True)


class _Tally:
    def __init__(self) -> None:
        self.pairs = 0
        self.seconds = 0.0

    def add(self, pairs: int, seconds: float) -> None:
        self.pairs += pairs
        self.seconds += seconds

    @property
    def rate(self) -> float:
        return self.pairs / self.seconds
