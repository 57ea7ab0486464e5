"""Iterative attacks on private images: from a config to searches, with progress, parts kept on disk, trajectories."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, resize

from gitlight.attacks import ATTACKS
from gitlight.attacks.finished import Finished
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.iterative import IterativeAttack, Prior
from gitlight.config import Config, MatchingConfig
from gitlight.config_loading import to_plain
from gitlight.data.datamodule import GradientPairDataModule
from gitlight.data.pair import GradientPair, Gradients
from gitlight.errors import ConfigError
from gitlight.generators.base import Reconstruction
from gitlight.gradients.updates import describe_leak
from gitlight.metrics import match
from gitlight.report.trajectories import Point
from gitlight.runs import checkpoint_path, run_folder
from gitlight.trained import generator_of_run

_GRAY = "gray"

UNFINISHED = "unfinished"
"""Folder below an evaluation's, for parts of interrupted ones."""


_OF_NO_CONSEQUENCE = {
    "attack": ("memory_limit_gb",),
    "gradients": ("memory_limit_gb", "method"),
    "data": ("memory_limit_gb", "num_workers", "batch_size", "horizontal_flip", "n_public_images", "n_validation"),
}


class Knowledge(NamedTuple):
    """What an attack is given.

    Attributes:
        function: the leaked model as the attack knows it.
        prior: what the search starts from; None: noise.
        items: for ``metrics.json``.
    """

    function: LeakedFunction
    prior: Prior | None
    items: tuple[str, ...]


@dataclass
class Attacked:
    """One batch of pairs with what was found for it."""

    pair: GradientPair
    found: Reconstruction
    seconds: float
    points: list[Point]


def check_attack(config: Config) -> MatchingConfig:
    """The settings of an iterative attack.

    Raises:
        ConfigError: the leaks are not ones whose gradient can be matched.
    """
    settings = config.attack
    assert isinstance(settings, MatchingConfig)
    leak = describe_leak(config.gradients.updates, config.data.client_batch_size)
    if leak != "gradient":
        raise ConfigError(
            f"attack.name: {settings.name} matches gradients; an update of several local steps, {leak}, is none. "
            "Give gradients.updates.epochs=1 gradients.updates.batch_size=null, or attack with a trained generator: "
            "attack=generator."
        )
    if config.gradients.sketch.name != "none":
        raise ConfigError(
            f"attack.name: {settings.name} matches whole gradients, not sketches. Give gradients.sketch.name=none."
        )
    if config.leaked.batch_norm == "batch":
        raise ConfigError(
            f"attack.name: {settings.name} knows batch norm by running statistics only. Give leaked.batch_norm=running."
        )
    if settings.prior_weight > 0 and settings.prior is None:
        raise ConfigError("attack.prior_weight: there is no prior to stay near to. Give attack.prior.")
    if settings.batch_norm_statistics > 0 and settings.knowledge == "recovered":
        raise ConfigError(
            "attack.batch_norm_statistics: running statistics are the leaked model's, and attack.knowledge=recovered "
            "knows what pairs give. Give attack.batch_norm_statistics=0."
        )
    return settings


def knowledge_of(config: Config, datamodule: GradientPairDataModule, device: torch.device) -> Knowledge:
    """What the attack of a config is given.

    Raises:
        ConfigError, CheckpointError: a run or file that it names is missing or does not fit.
    """
    settings = check_attack(config)
    architecture = datamodule.architecture
    items = ["architecture"]
    if settings.knowledge == "parameters":
        network = datamodule.leaked_model.network
        weights = {name: value.detach() for name, value in (*network.named_parameters(), *network.named_buffers())}
        items.append("parameters")
    else:
        weights = _recovered(config, settings, datamodule, device)
        items.append("pairs")
    needed = {name for layer in architecture.layers for name in (*layer.parameters.values(), *layer.constants.values())}
    if missing := sorted(needed - set(weights)):
        raise ConfigError(
            f"attack.knowledge: {settings.knowledge}: no value is known of {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}, without which no gradient can be computed."
            + (" Give attack.knowledge=parameters." if settings.knowledge == "recovered" else "")
        )
    if settings.labels == "given":
        items.append("labels")
    prior, from_pairs = _prior(config, settings, datamodule, device)
    if prior is not None:
        items.append("prior")
    if from_pairs and "pairs" not in items:
        items.append("pairs")
    order = ("architecture", "pairs", "parameters", "labels", "prior")
    return Knowledge(LeakedFunction(architecture, weights), prior, tuple(item for item in order if item in items))


def attack_iteratively(
    config: Config,
    datamodule: GradientPairDataModule,
    knowledge: Knowledge,
    device: torch.device,
    n_images: int,
) -> Iterator[Attacked]:
    """Attack private images, batch by batch. What is finished is kept until `forget_parts`.

    Args:
        config: the run's settings, with ``attack``.
        datamodule: makes the leaks.
        knowledge: of the attack.
        device: where to search.
        n_images: private images to attack, rounded down to whole client batches.
    """
    settings = check_attack(config)
    per_leak = config.data.client_batch_size
    attack: IterativeAttack = ATTACKS[settings.name].load()(
        datamodule.architecture, knowledge.function, settings, per_leak, config.seed, knowledge.prior
    )
    store = _store(config, datamodule)
    done = {int(number): (part, row) for part in store.parts() for row, number in enumerate(part["numbers"])}
    n_leaks = n_images // per_leak
    identifiers = datamodule.split("test").identifiers
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=config.logging.quiet) as progress:
        bar = _Bar(progress, settings, n_leaks, per_leak)
        first = 0
        for pair in datamodule.private_pairs(device, n_images):
            numbers = torch.arange(first, first + len(pair))
            first += len(pair)
            new = [row for row, number in enumerate(numbers.tolist()) if number not in done]
            bar.finish(len(pair) - len(new))
            for start in range(0, len(new), attack.at_once):
                rows = torch.tensor(new[start : start + attack.at_once])
                part = _searched(attack, pair, rows, numbers[rows], settings, bar)
                store.add(int(part["numbers"][0]), part)
                bar.finish(len(rows))
                done |= {int(number): (part, row) for row, number in enumerate(part["numbers"])}
            yield _joined(pair, numbers, done, identifiers)


class _Bar:
    """Images done, the nearest gradient so far, time left; it moves with the steps of the searches under way."""

    def __init__(self, progress: Progress, settings: MatchingConfig, n_leaks: int, per_leak: int) -> None:
        self._progress, self._name, self._per_leak = progress, settings.name, per_leak
        self._iterations, self._n_leaks, self._done, self._best = settings.iterations, n_leaks, 0, torch.inf
        self._task = progress.add_task(self._name, total=n_leaks * settings.iterations)

    def under_way(self, n_leaks: int, iteration: int, nearest: float) -> None:
        """So many searches have taken so many steps."""
        self._best = min(self._best, nearest)
        self._show(self._done * self._iterations + n_leaks * iteration)

    def finish(self, n_leaks: int) -> None:
        """So many more are done."""
        self._done += n_leaks
        self._show(self._done * self._iterations)

    def _show(self, steps: int) -> None:
        nearest = f", nearest {self._best:.1e}" if self._best < torch.inf else ""
        images = f"{self._done * self._per_leak}/{self._n_leaks * self._per_leak} images"
        self._progress.update(self._task, completed=steps, description=f"{self._name}: {images}{nearest}")


def forget_parts(config: Config, datamodule: GradientPairDataModule) -> None:
    """The evaluation is written: what was kept for going on with it is not needed."""
    _store(config, datamodule).remove()


def _store(config: Config, datamodule: GradientPairDataModule) -> Finished:
    plain = to_plain(config)
    for key in ("output_dir", "logging", "evaluation", "trainer", "generator", "optimizer"):
        plain.pop(key)
    # What says how, and not what.
    for section, keys in _OF_NO_CONSEQUENCE.items():
        for key in keys:
            plain[section].pop(key, None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    digest.update(datamodule.leaked_model.fingerprint().encode())
    settings = check_attack(config)
    recovered = settings.recovered_from or str(run_folder(config))
    for named in (settings.prior, recovered if settings.knowledge == "recovered" else None):
        # A run that was made again under the same name is another one.
        path = None if named is None else Path(named)
        file = checkpoint_path(path, "best") if path is not None and path.is_dir() else path
        if file is not None and file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    key = digest.hexdigest()[:16]
    return Finished(run_folder(config) / "evaluation" / UNFINISHED, key)


def _searched(
    attack: IterativeAttack, pair: GradientPair, rows: Tensor, numbers: Tensor, settings: MatchingConfig, bar: "_Bar"
) -> dict[str, Any]:
    """A part for the store: the leaks ``rows`` of a batch."""
    gradients: Gradients = {name: gradient[rows] for name, gradient in pair.gradients.items()}
    truth = pair.images[rows]
    lines: list[Tensor] = []

    def record(which: Tensor, iteration: int, images: Tensor, distances: Tensor) -> None:
        theirs = truth[which].to(images.dtype)
        error = (match(images.clamp(0, 1), theirs) - theirs).square().flatten(2).mean(dim=2)
        psnr = (-10 * error.clamp_min(1e-12).log10()).mean(dim=1)
        steps = torch.full_like(psnr, iteration)
        lines.append(
            torch.stack([numbers[which.cpu()].to(psnr), steps, distances.to(psnr), psnr], dim=1).cpu().double()
        )
        bar.under_way(len(rows), iteration, float(distances.min()) if len(distances) else torch.inf)

    started = time.perf_counter()
    labels = pair.labels[rows] if settings.labels == "given" else None
    found = attack.search(gradients, pair.indices[rows][:, 0], labels, record)
    seconds = time.perf_counter() - started
    return {
        "numbers": numbers,
        "images": found.images.cpu(),
        "verdicts": list(found.verdicts),
        "seconds": seconds,
        "lines": torch.cat(lines) if lines else torch.zeros(0, 4, dtype=torch.float64),
    }


def _joined(
    pair: GradientPair, numbers: Tensor, done: dict[int, tuple[dict[str, Any], int]], identifiers: Any
) -> Attacked:
    """A batch's searches, from the parts that hold them."""
    images, verdicts, seconds, points = [], [], 0.0, []
    for position, number in enumerate(numbers.tolist()):
        part, row = done[number]
        images.append(part["images"][row])
        verdicts.append(part["verdicts"][row])
        seconds += part["seconds"] / len(part["numbers"])
        lines = part["lines"][part["lines"][:, 0] == number]
        name = identifiers[int(pair.indices[position, 0])]
        points += [Point(number, name, int(step), distance, psnr) for _, step, distance, psnr in lines.tolist()]
    found = Reconstruction(torch.stack(images).to(pair.images.device), tuple(verdicts))
    return Attacked(pair, found, seconds, points)


def _recovered(
    config: Config, settings: MatchingConfig, datamodule: GradientPairDataModule, device: torch.device
) -> dict[str, Tensor]:
    folder = run_folder(config) if settings.recovered_from is None else Path(settings.recovered_from)
    generator, name = generator_of_run(
        folder, "attack.recovered_from", datamodule.architecture, datamodule.leaked_model.fingerprint(), 1, device
    )
    found = {key: estimate.value for key, estimate in generator.estimated_parameters().items()}
    if not found:
        raise ConfigError(
            f"attack.recovered_from: {folder} is a run of {name}, which has identified no weight of this leaked model. "
            "Give a run of generator.name=exact (configs/lenet_exact.yaml)."
        )
    return found


def _prior(
    config: Config, settings: MatchingConfig, datamodule: GradientPairDataModule, device: torch.device
) -> tuple[Prior | None, bool]:
    """What the search starts from, and whether it rests on pairs."""
    named, n_images, shape = settings.prior, config.data.client_batch_size, datamodule.architecture.image_shape
    if named is None:
        return None, False
    path = Path(named)
    if path.is_dir():
        generator, _ = generator_of_run(
            path, "attack.prior", datamodule.architecture, datamodule.leaked_model.fingerprint(), n_images, device
        )

        def reconstructed(gradients: Gradients) -> Tensor:
            with torch.no_grad():
                return generator.reconstruct(gradients).images

        return reconstructed, True
    image = torch.full(shape, 0.5) if named == _GRAY else _image_file(path, shape)
    return (lambda gradients: image.expand(len(next(iter(gradients.values()))), n_images, *shape)), False


def _image_file(path: Path, shape: tuple[int, int, int]) -> Tensor:
    if not path.exists():
        raise ConfigError(
            f"attack.prior: {path} does not exist. Give a run's folder, an image file, gray, or null for noise."
        )
    try:
        with Image.open(path) as image:
            pixels = pil_to_tensor(image.convert("RGB" if shape[0] == 3 else "L")).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"attack.prior: {path} is neither a run's folder nor an image: {error}") from error
    found: Tensor = resize(pixels, list(shape[1:]), antialias=True).clamp(0, 1)
    return found
