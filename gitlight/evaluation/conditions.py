"""What an evaluation was of, in words: a result under another condition must not replace it."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from gitlight.config import Config, EvaluationConfig, MatchingConfig
from gitlight.gradients.channel import describe_channel
from gitlight.gradients.updates import describe_leak
from gitlight.metrics import bootstrap_interval
from gitlight.report.attacked import AttackedImages
from gitlight.report.results import Estimate, Result


def changes_since(settings: Any, trained: Any) -> dict[str, Any]:
    """The settings of a component that are not those of training."""
    former = vars(trained)
    return {key: value for key, value in vars(settings).items() if key not in former or value != former[key]}


def attack_changes(config: Config, trained: Config) -> dict[str, Any]:
    """What makes an attack another one than the trained generator's best checkpoint on the run's own images."""
    changes = changes_since(config.generator, trained.generator) | leak_changes(config, trained)
    if config.evaluation.checkpoint != EvaluationConfig().checkpoint:
        changes["checkpoint"] = config.evaluation.checkpoint
    return changes


def leak_changes(config: Config, trained: Config) -> dict[str, Any]:
    """What makes the leaks others than the run's own."""
    changes = changes_since(config.gradients, trained.gradients)
    # How, not what; updates are a part of the condition of their own, and another sketch does not load.
    for key in ("memory_limit_gb", "method", "updates", "sketch"):
        changes.pop(key, None)
    if config.seed != trained.seed:
        changes["images_seed"] = config.seed
    return changes


def search_changes(settings: MatchingConfig) -> dict[str, Any]:
    """What an iterative attack does otherwise than by default."""
    changes = changes_since(settings, type(settings)())
    for key in ("memory_limit_gb", "record_every", "snapshots"):
        changes.pop(key, None)
    return changes


def _leaked_changes(config: Config, trained: Config) -> dict[str, Any]:
    """What makes the leaked model another one than that of training, beside what its title says."""
    changes = changes_since(config.leaked, trained.leaked)
    return {key: value for key, value in changes.items() if key not in ("target", "type")}


def described(name: str, changes: dict[str, Any]) -> str:
    """A name, with what was changed since training: a result under such a condition must not replace the other's."""
    values = ", ".join(f"{key}={'null' if v is None else v}" for key, v in changes.items() if key != "name")
    return f"{name}({values})" if values else name


def result_of(
    config: Config,
    trained: Config,
    images: AttackedImages,
    seconds: float,
    name: str,
    knowledge: tuple[str, ...],
) -> Result:
    """The entry of ``metrics.json``; ``seconds`` are those of the attack on all images."""
    metrics = {}
    for metric, values in images.metrics.items():
        low, high = bootstrap_interval(values, config.evaluation.bootstrap_samples, config.seed)
        metrics[metric] = Estimate(float(values.mean()), low, high)
    data = config.data
    # Of the data settings, only these choose other private images; a folder's own name says which images it holds.
    data_name = Path(os.path.abspath(data.root)).name if data.name == "folder" and data.root else data.name
    data_changes = {key: v for key, v in changes_since(data, trained.data).items() if key == "private_classes"}
    return Result(
        attack=name,
        leaked=described(config.leaked.title, _leaked_changes(config, trained)),
        data=described(data_name, data_changes),
        channel=describe_channel(config.channel),
        client_batch_size=data.client_batch_size,
        leak=describe_leak(config.gradients.updates, data.client_batch_size),
        n_images=len(images),
        seed=trained.seed,
        metrics=metrics,
        label_accuracy=images.label_accuracy,
        seconds_per_image=seconds / len(images),
        knowledge=knowledge,
        n_failed=int(images.failed.sum()),
        verdicts=dict(Counter(verdict for verdict in images.verdicts if verdict).most_common()),
    )
