"""`Result`, one entry of ``metrics.json``; and the file, which keeps the results of other conditions."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from gitlight.disk import writing
from gitlight.errors import CheckpointError

SCHEMA = 1


@dataclass(frozen=True)
class Metric:
    """How a metric is shown to people.

    Attributes:
        title: its name.
        meaning: one line for readers who do not know it.
        pattern: format of a number.
        unit: unit, with the space before it.
    """

    title: str
    meaning: str
    pattern: str
    unit: str = ""

    def show(self, value: float) -> str:
        """A value as text, without its unit."""
        return format(value, self.pattern)


METRICS = {
    "psnr": Metric("PSNR", "closeness pixel by pixel on a logarithmic scale; higher is closer", ".2f", " dB"),
    "ssim": Metric("SSIM", "likeness of local structure; 1 is identical, near 0 unrelated", ".4f"),
    "lpips": Metric("LPIPS", "perceptual distance by a neural network; 0 is identical, lower is closer", ".4f"),
    "mse": Metric("MSE", "mean squared pixel error, pixels between 0 and 1; 0 is identical", ".3g"),
}
"""The metrics in the order in which people are shown them."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images and the ends of its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """What one attack achieved under one condition.

    Attributes:
        attack: name of the attack.
        leaked: name of the leaked model.
        data: name of the images.
        channel: `gitlight.gradients.channel.describe_channel`, ``none`` for an open channel.
        client_batch_size: images per leak.
        leak: `gitlight.gradients.updates.describe_leak`: ``gradient``, or the update of several local steps.
        n_images: private images attacked.
        seed: the run's seed.
        metrics: ``mse``, ``psnr`` in dB, ``ssim``, and ``lpips`` where it could be had.
        label_accuracy: share of labels read off the leak correctly, in [0, 1]; None where none is read.
        seconds_per_image: time of the attack alone, without making the gradients.
        knowledge: what the attack was given: ``architecture``, ``pairs``, ``parameters``, ``labels``,
            ``image_prior``, ``prior``.
        n_failed: images whose reconstruction was not finite; counted in the metrics as a complete failure.
        verdicts: what the attack itself says of its reconstructions → number of images; empty where it says nothing.
    """

    attack: str
    leaked: str
    data: str
    channel: str
    client_batch_size: int
    n_images: int
    seed: int
    metrics: dict[str, Estimate]
    label_accuracy: float | None
    seconds_per_image: float
    knowledge: tuple[str, ...]
    n_failed: int = field(default=0)
    verdicts: dict[str, int] = field(default_factory=dict)
    leak: str = "gradient"

    def to_plain(self) -> dict[str, Any]:
        """The entry as ``metrics.json`` holds it; what has a default here is in it only where it differs from that."""
        entry = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != _default(field)
        }
        entry["metrics"] = {
            name: {"mean": estimate.mean, "ci95": [estimate.low, estimate.high]}
            for name, estimate in self.metrics.items()
        }
        return entry | {"knowledge": list(self.knowledge)}

    @classmethod
    def from_plain(cls, entry: dict[str, Any]) -> "Result":
        """The inverse of `to_plain`.

        Raises:
            KeyError, TypeError, ValueError: the entry is not of this form.
        """
        metrics = {
            name: Estimate(float(values["mean"]), *map(float, values["ci95"]))
            for name, values in entry["metrics"].items()
        }
        return cls(**(entry | {"metrics": metrics, "knowledge": tuple(entry["knowledge"])}))

    @property
    def condition(self) -> tuple[str | int, ...]:
        """What tells results apart: a new result replaces the one of the same condition."""
        return (
            self.attack, self.leaked, self.data, self.channel, self.client_batch_size, self.leak,
            self.n_images, self.seed,
        )  # fmt: skip


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def read_results(path: Path) -> list[Result]:
    """The results in a ``metrics.json``; none where there is no such file.

    Raises:
        CheckpointError: the file cannot be read as one, and so is not to be overwritten either.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, expected {SCHEMA}")
        return [Result.from_plain(entry) for entry in content["results"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} exists and cannot be read as results of an evaluation ({type(error).__name__}: {error}). "
            "It is left as it is; repair it or move it away, then evaluate again."
        ) from error


def merge_results(former: Sequence[Result], new: Result) -> list[Result]:
    """``former`` with ``new`` in the place of the result of the same condition, or at the end."""
    merged = [new if result.condition == new.condition else result for result in former]
    return merged if new in merged else [*merged, new]


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write ``metrics.json``, all or nothing."""
    content = {"schema": SCHEMA, "results": [result.to_plain() for result in results]}
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file: at any moment the file there is the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
