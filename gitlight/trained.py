"""Trained generators: from a run's checkpoint, with a clear word on what does not fit."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.config import Config
from gitlight.config_loading import load_config
from gitlight.errors import CheckpointError, ConfigError, differences, misfit
from gitlight.generators.base import Generator
from gitlight.gradients.updates import describe_leak
from gitlight.runs import available_checkpoint, checkpoint_path, load_checkpoint, run_folder
from gitlight.training import build_generator

log = logging.getLogger(__name__)

_CHOOSING = ("name", "n_public_images", "n_validation", "public_classes")
"""Settings of ``data`` that, with ``seed``, choose the public images and those of them that are held out."""


def trained_checkpoint(config: Config) -> dict[str, Any]:
    """The checkpoint of a config's run that ``evaluation.checkpoint`` names.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder, which = run_folder(config), config.evaluation.checkpoint
    path = checkpoint_path(folder, which)
    if not path.is_file():
        others = [name for name in ("best", "last") if checkpoint_path(folder, name).is_file()]
        advice = (
            f"There is evaluation.checkpoint={others[0]}."
            if others
            else "Train the generator first: `python train.py CONFIG`, then evaluate that config or its run folder."
        )
        raise CheckpointError(f"{folder} holds no trained generator: {path} does not exist. {advice}")
    return dict(load_checkpoint(path))


def load_generator_weights(generator: Generator, state: dict[str, Tensor], path: Path) -> None:
    """A checkpoint's weights into a generator.

    Raises:
        CheckpointError: they do not fit, or are not a generator's.
    """
    own = {name.removeprefix("generator."): value for name, value in state.items() if name.startswith("generator.")}
    if not own:
        raise CheckpointError(f"{path} holds no generator; was it made with task=leaked?")
    try:
        generator.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit the settings: they, or the version of gitlight, differ from those that the generator "
            "was trained with. Evaluate the run's folder without changing data, leaked or generator settings. "
            f"{misfit(error)}"
        ) from error


def generator_of_run(
    folder: Path,
    key: str,
    architecture: Architecture,
    fingerprint: str,
    client_batch_size: int | None,
    device: torch.device,
) -> tuple[Generator, str]:
    """The trained generator of another run, for the leaks of this one, whole gradients; and what its results call it.

    Args:
        folder: the run's.
        key: the setting that names it, for messages.
        architecture: of the leaked model that is attacked.
        fingerprint: `LeakedModel.fingerprint` of that model.
        client_batch_size: images per leak; None: it is asked for no images, and any will do.
        device: where to put it.

    Raises:
        ConfigError, CheckpointError: it is no such run, or of another leaked model.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{key}: {folder} is not a run's folder: it has no config.yaml.")
    config = load_config(folder)
    if config.task != "generator":
        raise ConfigError(f"{key}: {folder} is a run of task={config.task}, which trains no generator.")
    if client_batch_size not in (None, config.data.client_batch_size):
        raise ConfigError(
            f"{key}: the generator of {folder} was trained with data.client_batch_size="
            f"{config.data.client_batch_size}, and these leaks are of {client_batch_size} images."
        )
    if config.gradients.sketch.name != "none":
        raise ConfigError(
            f"{key}: the generator of {folder} was trained on sketches (gradients.sketch.name="
            f"{config.gradients.sketch.name}), and these leaks are whole gradients. Give a run with "
            "gradients.sketch.name=none."
        )
    if (leak := describe_leak(config.gradients.updates, config.data.client_batch_size)) != "gradient":
        raise ConfigError(
            f"{key}: the generator of {folder} was trained on updates of several local steps ({leak}), and these leaks "
            "are gradients. Give a run with gradients.updates.epochs=1 gradients.updates.batch_size=null."
        )
    # The command line's evaluation.checkpoint is of the run that is evaluated: nobody could give it for this one.
    which = available_checkpoint(folder, config.evaluation.checkpoint)
    checkpoint = trained_checkpoint(replace(config, evaluation=replace(config.evaluation, checkpoint=which)))
    stored = next((part["leaked_fingerprint"] for part in checkpoint.values() if _names_a_leaked_model(part)), None)
    if stored != fingerprint:
        raise CheckpointError(
            f"{key}: the generator of {folder} was trained on another leaked model: its weights are not those of the "
            "model that is attacked. Give a run with the same `leaked` and `data` settings."
        )
    generator = build_generator(config, architecture)
    load_generator_weights(generator, checkpoint["state_dict"], checkpoint_path(folder, which))
    return generator.to(device).eval(), config.generator.name


def _names_a_leaked_model(part: Any) -> bool:
    return isinstance(part, dict) and "leaked_fingerprint" in part


def warn_of_other_images(key: str, folder: Path, config: Config) -> None:
    """Warn where a run was trained on another choice of public images than a config's attack knows of.

    Args:
        key: the setting that names the run, for the message.
        folder: the run's; a folder that is none is somebody else's to complain of.
        config: the attack's.
    """
    if not (folder / "config.yaml").is_file():
        return
    theirs, ours = (
        {"seed": one.seed} | {f"data.{name}": getattr(one.data, name) for name in _CHOOSING}
        for one in (load_config(folder), config)
    )
    if other := differences(theirs, ours, "there"):
        log.warning(
            "%s: %s was trained on another choice of public images (%s): images that are held out, or private, here "
            "may be among them, and results then look better than they are",
            key,
            folder,
            other,
        )
