"""What accompanies training: metrics, pictures, weight distance, throughput, progress and checkpoints."""

import sys
import warnings
from pathlib import Path

from lightning.pytorch import Callback

from gitlight.callbacks.checkpoints import best_checkpoint, last_checkpoint
from gitlight.callbacks.learning_rate import LearningRate
from gitlight.callbacks.max_time import MaxTime
from gitlight.callbacks.metrics import ReconstructionMetrics
from gitlight.callbacks.progress import PairsProgressBar, QuietProgress
from gitlight.callbacks.reconstructions import ReconstructionGrid, draw_grid
from gitlight.callbacks.run_settings import RunSettings
from gitlight.callbacks.run_state import RunState
from gitlight.callbacks.throughput import Throughput
from gitlight.callbacks.weight_averaging import moving_average
from gitlight.callbacks.weight_distance import WeightDistance
from gitlight.callbacks.weight_distance_curves import WeightDistancePoint, draw_weight_distances
from gitlight.config import Config
from gitlight.stop_signals import StopSignals
from gitlight.sweep.trial import trial_from_environment

__all__ = [
    "LearningRate",
    "PairsProgressBar",
    "QuietProgress",
    "ReconstructionGrid",
    "ReconstructionMetrics",
    "RunSettings",
    "RunState",
    "Throughput",
    "WeightDistance",
    "WeightDistancePoint",
    "build_callbacks",
    "draw_grid",
    "draw_weight_distances",
]

MONITORS = {"generator": "val/psnr", "leaked": "val/accuracy", "image_prior": "val/psnr"}
"""Task → the validation metric, larger is better, that chooses ``best.ckpt`` where ``loss.perceptual`` is not given."""


def build_callbacks(config: Config, output_dir: Path, signals: StopSignals | None = None) -> list[Callback]:
    """The callbacks of a training run.

    Every task has a progress display, the learning rate and the checkpoints with the run's settings and state in
    them; ``task=generator`` adds what concerns reconstructions, ``task=image_prior`` their metrics and pictures. The
    display is a progress bar, or one plain line an epoch where ``logging.quiet`` asks for it or standard output is not
    a terminal. A trial of a sweep reports to it.

    Args:
        config: the run's settings.
        output_dir: the run's folder.
        signals: what stops the run with a checkpoint.
    """
    output_dir = Path(output_dir)
    # The display comes after what it shows.
    return [
        *_averaging(config),
        *_reconstruction_callbacks(config, output_dir),
        *_sweep_callbacks(config),
        *([] if config.trainer.max_time is None else [MaxTime(config.trainer.max_time)]),
        LearningRate(),
        RunSettings(config),
        RunState(config.seed),
        QuietProgress() if config.logging.quiet or not sys.stdout.isatty() else PairsProgressBar(),
        _best_checkpoint(config, output_dir),
        last_checkpoint(output_dir, config.trainer.checkpoint_every_n_steps, signals),
    ]


def _best_checkpoint(config: Config, output_dir: Path) -> Callback:
    if config.loss.perceptual is not None:
        # By PSNR the epoch would be kept that has done least for the term.
        return best_checkpoint(output_dir, "val/loss", "min")
    return best_checkpoint(output_dir, MONITORS[config.task], "max")


def _averaging(config: Config) -> list[Callback]:
    decay = config.optimizer.ema_decay
    if decay is None:
        return []
    # Ours is not sharded then: `train` sees to it.
    warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
    return [moving_average(decay)]


def _reconstruction_callbacks(config: Config, output_dir: Path) -> list[Callback]:
    if config.task == "leaked":
        return []
    seen: list[Callback] = [ReconstructionMetrics(), ReconstructionGrid(output_dir, config.evaluation.n_pictures)]
    return seen if config.task == "image_prior" else [*seen, WeightDistance(output_dir), Throughput()]


def _sweep_callbacks(config: Config) -> list[Callback]:
    trial = trial_from_environment()
    if trial is None:
        return []
    # Optuna is loaded by trials alone.
    from gitlight.callbacks.prune_trial import PruneTrial

    return [PruneTrial(trial, config)]
