"""`LearningRate`: the optimiser's learning rate, as ``lr``."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LearningRate(Callback):
    """Logs ``lr``, the rate each step is taken with, in the same row as that step's loss.

    Lightning's LearningRateMonitor names the rate after the optimiser's class and logs it in a row of its own.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rate of the step about to be taken; Lightning writes every ``log_every_n_steps``-th."""
        # A generator with nothing to train has no parameter group.
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if groups:
            pl_module.log("lr", groups[0]["lr"], on_step=True, on_epoch=False)
