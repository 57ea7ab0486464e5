"""Which checkpoints a run keeps: ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``."""

from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gitlight.csv_logger import CSVFileLogger
from gitlight.data.datamodule import ImageDataModule
from gitlight.errors import RunStopped
from gitlight.runs import CHECKPOINTS, LAST
from gitlight.stop_signals import StopSignals


def best_checkpoint(output_dir: Path, monitor: str, mode: str) -> ModelCheckpoint:
    """Keeps ``best.ckpt``: the state after the validation with the largest (``max``) or least (``min``) ``monitor``."""
    return _MovableCheckpoint(
        dirpath=output_dir / CHECKPOINTS,
        filename="best",
        monitor=monitor,
        mode=mode,
        save_on_train_epoch_end=False,
        # Otherwise a second run into the folder would write best-v1.ckpt.
        enable_version_counter=False,
    )


def last_checkpoint(
    output_dir: Path, every_n_steps: int | None = None, signals: StopSignals | None = None
) -> ModelCheckpoint:
    """Keeps ``last.ckpt``: the state at the end of the latest epoch, after its validation, or within an epoch.

    Signals stop the run after the optimiser step, or the validation, that they come in: the checkpoint is written, and
    `RunStopped` raised. Several ranks stop at the same step, whichever of them is sent the signal.

    Args:
        output_dir: the run's folder.
        every_n_steps: optimiser steps between checkpoints within an epoch; None: there are none.
        signals: what stops the run; it listens from the beginning of training. None: nothing does.
    """
    return _LastCheckpoint(
        every_n_steps,
        signals,
        dirpath=output_dir / CHECKPOINTS,
        filename=Path(LAST).stem,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def is_finished(trainer: Trainer) -> bool:
    """Whether the epoch, at its end, has had all of its batches."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


class _MovableCheckpoint(ModelCheckpoint):
    """Keeps its score where a run folder is moved or copied and resumed there.

    Lightning forgets it, and would overwrite the best checkpoint with the next one.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        # A checkpoint of another run, continued in a new folder, has left its best checkpoint behind: forgotten.
        if Path(here(state_dict["best_model_path"])).is_file():
            paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
            scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
            super().load_state_dict({**state_dict, **paths, "best_k_models": scores, "dirpath": self.dirpath})
        elif state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)


class _LastCheckpoint(_MovableCheckpoint):
    """Saves between two batches, too, rather than at a batch's end.

    At a batch's end Lightning has not logged it yet: the row would be missing from a run that goes on from there.
    """

    def __init__(self, every_n_steps: int | None, signals: StopSignals | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._every_n_steps = every_n_steps
        self._signals = signals
        self._step = 0
        self._group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save: signals no longer end the process at once."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        if self._signals is not None:
            self._signals.listen(announce=trainer.is_global_zero)
            if trainer.world_size > 1:
                # Over the network from CPU to CPU: asking a GPU would make every step wait for the one before.
                self._group = torch.distributed.new_group(backend="gloo")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule):
            data.between_batches = lambda: self._between_batches(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where a signal has come since the last batch of the epoch before, whose end is saved by now."""
        # The step that ended that epoch is no news between the batches of this one, which may be summed up first.
        self._step = trainer.global_step
        if self._last_checkpoint_saved and (signal_number := self._agreed_signal(trainer)):
            self._stop(trainer, signal_number)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; what `max_steps` or `max_time` ended within an epoch goes on with that epoch's next batch."""
        progress = trainer.fit_loop.epoch_progress
        unfinished = not is_finished(trainer)
        for counted in (progress.total, progress.current):
            counted.processed -= unfinished  # type: ignore[attr-defined]
        super().on_train_epoch_end(trainer, pl_module)
        for counted in (progress.total, progress.current):
            counted.processed += unfinished  # type: ignore[attr-defined]

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVFileLogger):
                logger.sync()  # first: a run that goes on does not log them again
        super()._save_checkpoint(trainer, filepath)

    def _between_batches(self, trainer: Trainer) -> None:
        if trainer.global_step == self._step:
            return  # gradients of an unfinished optimiser step are not saved
        self._step = trainer.global_step
        signal_number = self._agreed_signal(trainer)
        if signal_number or (self._every_n_steps and self._step % self._every_n_steps == 0):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if signal_number:
            self._stop(trainer, signal_number)

    def _stop(self, trainer: Trainer, signal_number: int) -> NoReturn:
        # For Lightning an exception is a failure, which W&B would show; this run can go on.
        for logger in trainer.loggers:
            logger.finalize("success")
        raise RunStopped(signal_number, Path(self._last_checkpoint_saved), trainer.global_step)

    def _agreed_signal(self, trainer: Trainer) -> int:
        """The signal that any rank was sent, or 0; the same on all."""
        if self._signals is None or trainer.world_size == 1:
            return 0 if self._signals is None else self._signals.received
        received = torch.tensor(self._signals.received)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, self._group)
        return int(received)
