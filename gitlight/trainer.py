"""Lightning's `Trainer` of a run: what it is given, and what it is kept from."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from gitlight.callbacks import build_callbacks
from gitlight.checkpoint_io import AtomicCheckpointIO
from gitlight.config import Config, TrainerConfig
from gitlight.errors import ConfigError
from gitlight.loggers import build_loggers
from gitlight.runs import checkpoint_path
from gitlight.sharding import FullyShardedStrategy
from gitlight.stop_signals import StopSignals
from gitlight.virtual_ranks import mean_gradients

_NOTHING_TO_TRAIN = "closed form"
"""Name of our own strategy, beside Lightning's."""


def trainer_settings(config: Config, nothing_to_train: bool) -> tuple[dict[str, Any], int]:
    """The arguments that `Trainer` takes from ``trainer.*``, and for how many processes they are.

    They are tried out before anything of a run is touched.

    Args:
        config: the run's settings.
        nothing_to_train: whether the module is in closed form: processes then share its fits, whatever the strategy.

    Raises:
        ConfigError: Lightning does not accept them on this machine.
    """
    settings = dict(vars(config.trainer))
    for own in ("channels_last", "checkpoint_every_n_steps", "compile", "keep_last", "resume", "virtual_ranks"):
        settings.pop(own)
    settings["accelerator"] = accelerator(config.trainer)
    if nothing_to_train:
        settings["precision"] = "32-true"  # of trained layers; loss scaling would miss its gradients
        if settings["strategy"] in ("ddp", "fsdp"):  # which want something to train
            settings["strategy"] = "auto"
    try:
        trial = Trainer(**_with_strategy(settings), logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (MisconfigurationException, ValueError, TypeError, AttributeError) as error:
        given = ", ".join(f"trainer.{key}={value}" for key, value in settings.items() if value != _default(key))
        raise ConfigError(f"trainer: Lightning refuses these settings ({given or 'the defaults'}): {error}") from error
    _check_launched(trial)
    if nothing_to_train and trial.world_size > 1 and settings["strategy"] == "auto":
        settings["strategy"] = _NOTHING_TO_TRAIN
    return settings, trial.world_size


def _check_launched(trial: Trainer) -> None:
    """Torchrun's processes are those of the settings: each would else run alone, all in one folder, or wait."""
    if not torch.distributed.is_torchelastic_launched():
        return
    started, wanted = int(os.environ["WORLD_SIZE"]), trial.num_devices * trial.num_nodes
    if started != wanted:
        raise ConfigError(
            f"trainer.devices: torchrun started {started} processes, and trainer.devices={trial.num_devices} with "
            f"trainer.num_nodes={trial.num_nodes} is {wanted}. Give trainer.devices=NPROC_PER_NODE and "
            "trainer.num_nodes=NNODES as torchrun has them, or use scripts/torchrun.sh, which does."
        )


def _with_strategy(settings: dict[str, Any]) -> dict[str, Any]:
    """For one `Trainer`, which keeps its strategy to itself."""
    own = {"fsdp": FullyShardedStrategy, _NOTHING_TO_TRAIN: _ClosedFormStrategy}.get(settings["strategy"])
    return dict(settings) if own is None else {**settings, "strategy": own()}


class _ClosedFormStrategy(DDPStrategy):
    """Processes that share fits and validation. DDP takes no module without something to train."""

    def configure_ddp(self) -> None:
        """The module stays as it is: there are no gradients to add up."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A loss of nothing: of several processes Lightning accepts no step without one."""
        super().training_step(*args, **kwargs)
        return torch.zeros((), device=self.root_device, requires_grad=True)


class _PairwiseDDPStrategy(DDPStrategy):
    """DDP whose gradients are added up over processes in pairs."""

    def configure_ddp(self) -> None:
        """Lightning registers hooks for GPUs alone."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, mean_gradients)


def _default(key: str) -> Any:
    return getattr(TrainerConfig(), key)


def build_trainer(
    config: Config,
    settings: dict[str, Any],
    world_size: int,
    folder: Path,
    resume: Path | None,
    resumed: dict[str, Any] | None,
    signals: StopSignals,
) -> Trainer:
    """Lightning's trainer with the callbacks, loggers and checkpoint writer of a run.

    Args:
        config: the run's settings.
        settings: what `trainer_settings` found, and
        world_size: for how many processes they are.
        folder: the run's.
        resume: the checkpoint that the run continues, and
        resumed: its ``global_step`` and ``wandb_run_id``; None for a new run.
        signals: what stops the run.
    """
    callbacks = build_callbacks(config, folder, signals)
    continues_last = resume is not None and resume.resolve() == checkpoint_path(folder, "last").resolve()
    arguments = _with_strategy(settings)
    if world_size > 1 and settings["strategy"] in ("auto", "ddp"):
        in_pairs = config.trainer.virtual_ranks is not None and world_size > 2  # of two, any order is
        # Gradients lie where they are added up, and not a second time beside it.
        arguments["strategy"] = (_PairwiseDDPStrategy if in_pairs else DDPStrategy)(gradient_as_bucket_view=True)
    arguments["max_time"] = None  # a callback's
    trainer = Trainer(
        **arguments,
        callbacks=callbacks,
        logger=build_loggers(config, folder, folder.resolve().name, resumed),
        plugins=[AtomicCheckpointIO(config.trainer.keep_last, last_is_good=continues_last)],
        default_root_dir=folder,
        inference_mode=False,  # gradients are made in validation, too
        num_sanity_val_steps=0,  # they would run before the closed-form fits
        use_distributed_sampler=False,  # LeakSampler shares images among ranks by itself
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    # Lightning's handlers communicate within a signal, which can hang, and requeue SLURM's jobs from checkpoints of
    # their own, made in the middle of a step. Ours are the last checkpoint's.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # What tells the other ranks of such a signal waits for the device at every step.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    # With `max_steps` Lightning would take the end of an epoch for the middle of one where a run goes on from there.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    return trainer


def accelerator(settings: TrainerConfig) -> str:
    """``trainer.accelerator``, where ``auto`` never means MPS: it has no float64, which closed forms need.

    Raises:
        ConfigError: MPS is asked for.
    """
    if settings.accelerator == "mps":
        raise ConfigError("trainer.accelerator: 'mps' has no float64, which closed-form fits need; use cpu.")
    if settings.accelerator != "auto" or torch.cuda.is_available():
        return settings.accelerator
    return "cpu"
