"""`MaxTime`: ``trainer.max_time``, which ends a run between two optimiser steps."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer


class MaxTime(Timer):
    """Lightning's timer, except that it never ends a run within a step whose gradients are still being summed."""

    state_key = "Timer"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Look at the clock."""
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, *batch)
