"""`evaluate`, what ``evaluate.py`` does: attack private images, measure, and report."""

import torch
from torch import nn

from gitlight.config import Config, MatchingConfig, TrainerConfig
from gitlight.config_loading import load_config
from gitlight.decisions import with_decisions_of
from gitlight.disk import check_writable
from gitlight.errors import ConfigError
from gitlight.evaluation.search import evaluate_search
from gitlight.evaluation.trained import attack, evaluate_generator
from gitlight.evaluation.writing import Evaluation
from gitlight.leaked.custom import with_network
from gitlight.report.results import read_results
from gitlight.runs import run_folder
from gitlight.trained import trained_checkpoint
from gitlight.trainer import accelerator
from gitlight.training import build_pairs

__all__ = ["Evaluation", "attack", "evaluate"]


def evaluate(config: Config, network: nn.Module | None = None) -> Evaluation:
    """Attack the first ``evaluation.n_images`` private images with a run's trained generator.

    Writes ``metrics.json``, ``per_image.csv``, ``reconstructions.png`` and ``report.html`` to ``evaluation/`` in the
    run's folder. Results of other conditions that ``metrics.json`` holds are kept; the other files are those of the
    latest evaluation. Reconstructions with NaN or infinity are not dropped: each counts as a complete failure
    (`gitlight.report.attacked.FAILURE`). The generator runs in float32 on one device.

    Args:
        config: the run's settings, perhaps with another channel, ``leaked`` or ``evaluation``.
        network: the leaked model, where it was passed to `gitlight.train`.

    Raises:
        CheckpointError: there is no trained generator, or it is damaged, or was trained with other settings or another
            leaked model; or an existing ``metrics.json`` cannot be read.
        ConfigError, DataError: the settings are not those of an attack, or the images are missing or unreadable.
    """
    config = with_network(config, network)
    settings, folder = config.evaluation, run_folder(config)
    iterative = isinstance(config.attack, MatchingConfig)
    if config.task == "image_prior":
        raise ConfigError(
            f"task: image_prior: an image prior attacks nothing by itself. Search through it: attack=gias "
            f"attack.image_prior={folder}, with the config of an attack such as configs/lenet_gias.yaml."
        )
    if config.task != "generator":
        raise ConfigError(
            f"task: {config.task}: an evaluation attacks with a trained generator, and this config trains a leaked "
            f"model. To attack that model, train a generator with leaked.weights={folder}."
        )
    if settings.n_images < config.data.client_batch_size:
        raise ConfigError(
            f"evaluation.n_images: {settings.n_images} is less than one client batch "
            f"(data.client_batch_size: {config.data.client_batch_size})."
        )
    check_writable("output_dir", folder)
    # Before the images are read and the leaked model is built: what would stop the end of the attack.
    checkpoint = {} if iterative else trained_checkpoint(config)
    read_results(folder / "evaluation" / "metrics.json")
    trained = load_config(folder) if (folder / "config.yaml").is_file() else config
    config = with_decisions_of(config, trained)
    datamodule, device = build_pairs(config, network), _device(config.trainer)
    if iterative:
        return evaluate_search(config, trained, datamodule, device)
    return evaluate_generator(config, trained, datamodule, device, checkpoint)


def _device(settings: TrainerConfig) -> torch.device:
    """One device of the kind that training would use; the CPU where the machine has none."""
    on_gpu = accelerator(settings) != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")
