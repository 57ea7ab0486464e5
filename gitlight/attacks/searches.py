"""`build_search`: the iterative attack that settings name."""

from pathlib import Path
from typing import Any

import torch

from gitlight.architecture import Architecture
from gitlight.attacks import ATTACKS
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.image_prior import load_image_prior
from gitlight.attacks.iterative import IterativeAttack, Prior
from gitlight.attacks.labels import LabelReader
from gitlight.config import GIASConfig, MatchingConfig
from gitlight.errors import ConfigError


def check_image_prior(settings: MatchingConfig) -> None:
    """Raises: ConfigError, if the attack searches through an image prior, and none is given, or by L-BFGS."""
    if isinstance(settings, GIASConfig) and settings.optimizer == "lbfgs":
        raise ConfigError(
            "attack.optimizer: lbfgs keeps a hundred copies of what gias moves, a decoder's weights for each leak. "
            "Give adam or signed_adam."
        )
    if isinstance(settings, GIASConfig) and settings.image_prior is None:
        raise ConfigError(
            "attack.image_prior: gias searches through an image prior. Train one, `python train.py "
            "configs/image_prior.yaml`, and give its run: attack.image_prior=runs/image_prior (for attack.prior=gias: "
            "attack.prior_settings.image_prior)."
        )


def build_search(
    settings: MatchingConfig,
    architecture: Architecture,
    function: LeakedFunction,
    client_batch_size: int,
    seed: int,
    prior: Prior | None,
    device: torch.device,
    read_labels: LabelReader,
    prior_error: float | None = None,
) -> IterativeAttack:
    """Args: those of `IterativeAttack`, and where an image prior is to be.

    Raises:
        ConfigError, CheckpointError: the image prior that the settings name is missing or does not fit.
    """
    check_image_prior(settings)
    further: dict[str, Any] = {"read_labels": read_labels}
    if not isinstance(settings, GIASConfig):
        further["prior_error"] = prior_error
    elif settings.image_prior is not None:
        further["image_prior"] = load_image_prior(Path(settings.image_prior), architecture.image_shape, device)
    search = ATTACKS[settings.name].load()(architecture, function, settings, client_batch_size, seed, prior, **further)
    assert isinstance(search, IterativeAttack)
    return search
