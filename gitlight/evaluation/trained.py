"""Evaluation of a trained generator."""

import logging
import time
from typing import Any

import torch

from gitlight.attacks.labels import LabelReader
from gitlight.config import Config, GivenConfig
from gitlight.data.pair import Gradients
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.errors import CheckpointError
from gitlight.evaluation.conditions import attack_changes, changes_since, described, result_of
from gitlight.evaluation.measuring import measured, perceptual_distance
from gitlight.evaluation.writing import Evaluation, warn_of_few, write_evaluation
from gitlight.generators.base import Generator, Reconstruction
from gitlight.report.attacked import AttackedImages
from gitlight.runs import checkpoint_path, run_folder
from gitlight.trained import load_generator_weights
from gitlight.training import build_generator

log = logging.getLogger(__name__)

KNOWLEDGE = ("architecture", "pairs")
"""What a trained generator is given: it never sees a parameter, a label or another attack's result."""

_WARM_UP = 4


def evaluate_generator(
    config: Config,
    trained: Config,
    datamodule: GradientPairDataModule,
    device: torch.device,
    checkpoint: dict[str, Any],
) -> Evaluation:
    """A trained generator's reconstructions of private images; ``trained`` is the config that it was trained with."""
    settings, folder = config.evaluation, run_folder(config)
    _check_leaked_model(config, trained, datamodule, checkpoint)
    generator = build_generator(config, datamodule.architecture)
    load_generator_weights(generator, checkpoint["state_dict"], checkpoint_path(folder, settings.checkpoint))
    images, seconds = attack(generator, datamodule, datamodule.class_names, device, settings.n_images)
    warn_of_few(config, len(datamodule.split("test")), len(images))
    name = described(config.generator.name, attack_changes(config, trained))
    evaluation = Evaluation(result_of(config, trained, images, seconds, name, KNOWLEDGE), folder / "evaluation")
    write_evaluation(evaluation, config, trained, images, device)
    return evaluation


def attack(
    generator: Generator,
    datamodule: GradientPairDataModule,
    class_names: tuple[str, ...],
    device: torch.device,
    n_images: int,
) -> tuple[AttackedImages, float]:
    """Reconstruct private images from their leaks, and measure how close the reconstructions are.

    Args:
        generator: trained; it is moved to the device and put into evaluation mode.
        datamodule: makes the leaks.
        class_names: name of each label.
        device: where gradients are made and the generator runs.
        n_images: private images to attack, rounded down to whole client batches.

    Returns:
        The images; and the seconds that the generator's forward passes took, without making the gradients. A few leaks
        pass through the generator once more before the clock starts, to leave out one-off set-up costs.
    """
    generator.to(device).eval()
    lpips, read_labels = perceptual_distance(generator.architecture), LabelReader.of(datamodule, device)
    parts: list[AttackedImages] = []
    seconds = 0.0
    for pair in datamodule.private_pairs(device, n_images):
        if not parts:
            _timed_forward(generator, {name: g[:_WARM_UP] for name, g in pair.gradients.items()}, device)
        found, elapsed = _timed_forward(generator, pair.gradients, device)
        seconds += elapsed
        parts.append(measured(pair, found, datamodule, class_names, read_labels, lpips))
    return AttackedImages.joined(parts), seconds


def _timed_forward(generator: Generator, gradients: Gradients, device: torch.device) -> tuple[Reconstruction, float]:
    _synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        found = generator.reconstruct(gradients)
    _synchronize(device)
    return found, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_leaked_model(
    config: Config, trained: Config, datamodule: GradientPairDataModule, checkpoint: dict[str, Any]
) -> None:
    """The leaked model must be the one that the generator was trained on, unless ``leaked`` was changed on purpose."""
    if config.leaked != trained.leaked:
        log.warning(
            "The attacked model is not the one that the generator was trained on: %s was changed",
            ", ".join(f"leaked.{key}" for key in changes_since(config.leaked, trained.leaked)),
        )
        return
    part = checkpoint.get(type(datamodule).__qualname__)
    stored = part.get("leaked_fingerprint") if isinstance(part, dict) else None
    if stored != datamodule.leaked_model.fingerprint():
        named = config.leaked.weights
        cause = f"{named} (leaked.weights) has changed since" if named else "data settings or initialisation differ"
        if isinstance(config.leaked, GivenConfig):
            cause = "the network passed is not the one that was passed to train"
        raise CheckpointError(
            f"The generator was trained on another leaked model, whose weights are not those that `leaked` gives now: "
            f"{cause}. Restore the weights, or train the generator again: `python train.py CONFIG`. "
            "To attack another model on purpose, say so: leaked.weights=PATH or leaked.seed=NUMBER."
        )
