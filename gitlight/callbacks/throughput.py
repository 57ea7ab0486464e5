"""`Throughput`: leaks processed per second of training, what share of it goes into making them, and FLOPs."""

import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from gitlight.data.pair import GradientPair
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.virtual_ranks import DividedBatch

PAIRS_PER_SECOND = "throughput/pairs_per_second"
SHARE_MAKING_PAIRS = "throughput/share_making_pairs"
TERAFLOPS = "throughput/teraflops_per_second"
UTILIZATION = "throughput/model_flops_utilization"

_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Throughput(Callback):
    """Logs ``throughput/*``: pairs per second, share of time making pairs, teraFLOPs per second, and their utilisation.

    The first is leaks over all ranks per second of training; the second the part of these seconds, from 0 to 1, in
    which rank 0 made gradients and passed them through the channel. FLOPs are those of the generator's forward and
    backward pass over all ranks, matrix products and convolutions as PyTorch counts them in the first step;
    utilisation (MFU, Chowdhery et al. 2022) is their share of what the devices could do at most, where Lightning has a
    figure for the device and the precision.

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
        self._counter: FlopCounterMode | None = None
        self._flops_per_pair: float | None = None
        self._available: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """FLOPs per pair, so that a resumed run does not count again.

        Some operations compute in another way while they are counted, as for a backward pass, with another rounding: a
        resumed run would not follow the one that was never interrupted.
        """
        return {"flops_per_pair": self._flops_per_pair}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._flops_per_pair = state_dict["flops_per_pair"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the first step's operations."""
        if self._flops_per_pair is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
            if _makes_pairs(trainer):
                # Those of virtual ranks are made within the step.
                trainer.datamodule.clock.counter = self._counter  # type: ignore[attr-defined]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._stop_counting(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: a run that goes on within an epoch does not start that epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock anew."""
        self._epoch = _Tally()
        self._window = _Tally()
        self._set_marks(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: GradientPair | DividedBatch,
        batch_idx: int,
    ) -> None:
        """Count one batch, and report where a report is due."""
        if self._counter is not None:
            self._flops_per_pair = self._stop_counting(trainer) / len(batch)
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
            for name, value in self._flops(trainer, self._window).items():
                pl_module.log(name, value, on_step=True, on_epoch=False)
            self._window = _Tally()
            self._reported_step = step

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the epoch's mean so far to whoever looks at metrics when a validation ends, as sweeps do.

        By then fewer than ``log_every_n_steps`` steps may have been made, and nothing logged. Loggers do not get it.
        """
        if self._epoch.seconds > 0:
            for name, value in self._of_the_epoch(trainer).items():
                pl_module.log(name, value, logger=False, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation's time out."""
        self._set_marks(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch's mean."""
        if self._epoch.seconds > 0:
            for name, value in self._of_the_epoch(trainer).items():
                pl_module.log(name, value, prog_bar=name == PAIRS_PER_SECOND, sync_dist=True)

    def _of_the_epoch(self, trainer: Trainer) -> dict[str, float]:
        found = {PAIRS_PER_SECOND: self._epoch.rate}
        return {**found, SHARE_MAKING_PAIRS: self._epoch.share_making} if _makes_pairs(trainer) else found

    def _stop_counting(self, trainer: Trainer) -> int:
        """FLOPs of the step, without those of making pairs."""
        if self._counter is None:
            return 0
        self._counter.__exit__(None, None, None)
        counted, self._counter = self._counter.get_total_flops(), None
        if _makes_pairs(trainer):
            trainer.datamodule.clock.counter = None  # type: ignore[attr-defined]
        return counted

    def _flops(self, trainer: Trainer, tally: "_Tally") -> dict[str, float]:
        """What to log of them; nothing of a generator in closed form, which has no step to take."""
        if not self._flops_per_pair:
            return {}
        per_second = self._flops_per_pair * tally.rate
        found = {TERAFLOPS: per_second / 1e12}
        if trainer.strategy.root_device.type == "cuda":
            kind = _TYPES.get(str(trainer.precision), torch.float32)
            if self._available is None:
                # One figure for the run: asking again would warn again of a device without one.
                self._available = get_available_flops(trainer.strategy.root_device, kind) or 0
            if self._available:
                found[UTILIZATION] = per_second / (self._available * trainer.world_size)
        return found

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
