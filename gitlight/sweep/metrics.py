"""Which metrics a training logs, so that a sweep over another name ends before anything is trained."""

from collections.abc import Iterable

from gitlight.config import Config, ExactGeneratorConfig
from gitlight.errors import ConfigError
from gitlight.registry import did_you_mean

_OF_IMAGES = ("val/psnr", "val/mse", "val/ssim", "val/lpips")
VALIDATED = {
    "generator": ("val/loss", *_OF_IMAGES),
    "leaked": ("val/loss", "val/accuracy"),
    "image_prior": _OF_IMAGES,
}
"""Task → what a run logs at a validation; ``val/lpips`` only where its network's weights are."""

TRAINED = {
    "generator": ("train/loss", "throughput/pairs_per_second", "throughput/share_making_pairs"),
    "leaked": ("train/loss", "train/accuracy"),
    "image_prior": ("train/loss",),
}
"""Task → what it logs while it trains, and a sweep may look at, too."""

_LOSS = "train/loss"
_DISTANCE = "weight_distance/"
ESTIMATING = ("exact", "hybrid")
"""Generators that estimate the leaked parameters, and log ``weight_distance/``."""

_SMALLEST_FOR_LPIPS = 31


def check_metric(
    metric: str, config: Config, where: str, parameters: Iterable[str] | None = None, trains: bool = True
) -> None:
    """Refuse a metric that no run of a config logs.

    Args:
        metric: its name.
        config: the run's.
        where: who gives the name, for the message: ``(in sweep.yaml)``.
        parameters: names of the leaked model's, as far as they are known already.
        trains: False if it is known that what is built has nothing to train.

    Raises:
        ConfigError: there is no such metric.
    """
    if metric.startswith(_DISTANCE) and config.task == "generator" and config.generator.name in ESTIMATING:
        name = metric.removeprefix(_DISTANCE).removesuffix("_relative")
        if parameters is None or name in (known := ("total", *parameters)):
            return
        near = did_you_mean(name, known)
        raise ConfigError(
            f"metric.name: {metric} {where}: the leaked model has no parameter {name}.{near} {_DISTANCE}total is the "
            "distance over all of them."
        )
    known = VALIDATED[config.task]
    if metric not in (*known, *TRAINED[config.task]):
        near = did_you_mean(metric, (*known, *TRAINED[config.task]))
        raise ConfigError(
            f"metric.name: {metric} {where} is not logged by a run of task={config.task}"
            f"{f' with generator.name={config.generator.name}' if metric.startswith(_DISTANCE) else ''}.{near} "
            f"At a validation it logs: {', '.join(known)}."
        )
    if metric == _LOSS and config.task == "generator" and (_in_closed_form(config) or not trains):
        how = " with generator.fit=layerwise" if _in_closed_form(config) else " for this leaked model"
        raise ConfigError(
            f"metric.name: {metric} {where}: generator.name={config.generator.name}{how} is fitted in closed form "
            f"alone, and has no training loss. At a validation it logs: {', '.join(known)}."
        )
    if metric == "val/lpips":
        _check_lpips(config, where)


def _in_closed_form(config: Config) -> bool:
    """Whether the settings say that there is nothing to train; with some leaked models it is so for hybrid, too."""
    return isinstance(config.generator, ExactGeneratorConfig) and config.generator.fit == "layerwise"


def _check_lpips(config: Config, where: str) -> None:
    if config.data.image_size < _SMALLEST_FOR_LPIPS:
        raise ConfigError(
            f"metric.name: val/lpips {where} needs images of at least {_SMALLEST_FOR_LPIPS} × {_SMALLEST_FOR_LPIPS} "
            f"pixels, and these have data.image_size={config.data.image_size}. Give val/ssim or val/psnr."
        )
    from gitlight.lpips import lpips_network  # imports torch

    try:
        lpips_network()
    except ConfigError as error:
        raise ConfigError(f"metric.name: val/lpips {where} is not logged here: {error}") from error
