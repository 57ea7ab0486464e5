"""Which metrics ``train.py`` logs, so that a sweep over another name ends before its first trial."""

from pathlib import Path

from gitlight.errors import ConfigError
from gitlight.registry import did_you_mean

_OF_IMAGES = ("val/psnr", "val/mse", "val/ssim", "val/lpips")
VALIDATED = {
    "generator": ("val/loss", *_OF_IMAGES),
    "leaked": ("val/loss", "val/accuracy"),
    "image_prior": _OF_IMAGES,
}
"""Task → what a run logs at a validation; ``val/lpips`` only where its network's weights are."""

_OTHERS = ("train/", "throughput/", "weight_distance/")


def check_metric(metric: str, task: str, program: str, file: Path) -> None:
    """Refuse a metric that no run of a task logs.

    Args:
        metric: its name.
        task: the config's.
        program: the script of the sweep; what another than ``train.py`` logs is not known here.
        file: the sweep file, for the message.

    Raises:
        ConfigError: there is no such metric.
    """
    known = VALIDATED[task]
    if Path(program).name != "train.py" or metric in known or metric.startswith(_OTHERS):
        return
    raise ConfigError(
        f"metric.name: {metric} (in {file}) is not logged by a run of task={task}.{did_you_mean(metric, known)} "
        f"At a validation it logs: {', '.join(known)}."
    )
