"""`Throughput`: leaks processed per second of training, and what share of that time goes into making them."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gitlight.data.datamodule import GradientPairDataModule
from gitlight.data.pair import GradientPair

PAIRS_PER_SECOND = "throughput/pairs_per_second"
SHARE_MAKING_PAIRS = "throughput/share_making_pairs"


class Throughput(Callback):
    """Logs ``throughput/pairs_per_second`` and ``throughput/share_making_pairs``.

    The first is leaks over all ranks per second of training; the second the part of these seconds, from 0 to 1, in
    which rank 0 made gradients and passed them through the channel.

    A second of training is one of waiting for images, making gradients and optimising; validation, pictures and
    checkpoints do not count. Logged every ``log_every_n_steps`` optimiser steps for the steps since, and at the end
    of each epoch for the epoch. Every rank is taken to have processed what rank 0 has: the training images are dealt
    out in equal shares, and nothing needs to be communicated. Clocks are not synchronised with the device, which can
    lag by a few steps; the loss that is logged at the same steps waits for it.
    """

    def __init__(self) -> None:
        self._mark = self._making_mark = 0.0
        self._reported_step = 0
        self._window = _Tally()
        self._epoch = _Tally()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._epoch = _Tally()
        self._window = _Tally()
        self._set_marks(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: GradientPair, batch_idx: int
    ) -> None:
        """Count one batch, and report where a report is due."""
        seconds, making = time.perf_counter() - self._mark, _seconds_making(trainer) - self._making_mark
        for tally in (self._window, self._epoch):
            tally.add(len(batch) * trainer.world_size, seconds, making)
        self._set_marks(trainer)
        step = trainer.global_step
        due = step % max(1, trainer.log_every_n_steps) == 0 and step != self._reported_step  # type: ignore[attr-defined]
        if due and self._window.seconds > 0:
            pl_module.log(PAIRS_PER_SECOND, self._window.rate, prog_bar=True, on_step=True, on_epoch=False)
            if _makes_pairs(trainer):
                pl_module.log(SHARE_MAKING_PAIRS, self._window.share_making, on_step=True, on_epoch=False)
            self._window = _Tally()
            self._reported_step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation's time out."""
        self._set_marks(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch's mean."""
        if self._epoch.seconds > 0:
            pl_module.log(PAIRS_PER_SECOND, self._epoch.rate, prog_bar=True, sync_dist=True)
            if _makes_pairs(trainer):
                pl_module.log(SHARE_MAKING_PAIRS, self._epoch.share_making, sync_dist=True)

    def _set_marks(self, trainer: Trainer) -> None:
        self._mark, self._making_mark = time.perf_counter(), _seconds_making(trainer)


def _makes_pairs(trainer: Trainer) -> bool:
    return isinstance(trainer.datamodule, GradientPairDataModule)  # type: ignore[attr-defined]


def _seconds_making(trainer: Trainer) -> float:
    return trainer.datamodule.clock.seconds if _makes_pairs(trainer) else 0.0  # type: ignore[attr-defined]


class _Tally:
    def __init__(self) -> None:
        self.pairs = 0
        self.seconds = self.making = 0.0

    def add(self, pairs: int, seconds: float, making: float) -> None:
        self.pairs += pairs
        self.seconds += seconds
        self.making += making

    @property
    def rate(self) -> float:
        return self.pairs / self.seconds

    @property
    def share_making(self) -> float:
        return self.making / self.seconds
