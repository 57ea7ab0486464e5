"""Iterative attacks on private images: searches with progress, parts kept on disk, trajectories."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gitlight.attacks.finished import Finished
from gitlight.attacks.iterative import IterativeAttack
from gitlight.attacks.knowledge import Knowledge, check_attack
from gitlight.config import Config, GIASConfig, MatchingConfig
from gitlight.config_loading import to_plain
from gitlight.data.pair import GradientPair, Gradients
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.generators.base import Reconstruction
from gitlight.metrics import match
from gitlight.report.attacked import to_bytes
from gitlight.report.snapshots import Snapshot
from gitlight.report.trajectories import Point
from gitlight.runs import checkpoint_path, run_folder

UNFINISHED = "unfinished"
"""Folder below an evaluation's, for parts of interrupted ones."""


_OF_NO_CONSEQUENCE = {
    "attack": ("memory_limit_gb",),
    "gradients": ("memory_limit_gb", "method"),
    "data": ("memory_limit_gb", "num_workers", "batch_size", "horizontal_flip"),
}


@dataclass
class Attacked:
    """One batch of pairs with what was found for it."""

    pair: GradientPair
    found: Reconstruction
    seconds: float
    points: list[Point]
    snapshots: list[Snapshot]


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
    attack = knowledge.search
    store = _store(config, datamodule)
    done = {int(number): (part, row) for part in store.parts() for row, number in enumerate(part["numbers"])}
    identifiers = datamodule.split("test").identifiers
    n_leaks = min(n_images, len(identifiers)) // per_leak
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
                part = _searched(attack, pair, rows, numbers[rows], settings, bar, config.evaluation.n_pictures)
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

    def under_way(self, n_leaks: int, iteration: float, nearest: float) -> None:
        """So many searches have taken so many steps."""
        self._best = min(self._best, nearest)
        self._show(self._done * self._iterations + n_leaks * iteration)

    def finish(self, n_leaks: int) -> None:
        """So many more are done."""
        self._done += n_leaks
        self._show(self._done * self._iterations)

    def _show(self, steps: float) -> None:
        nearest = f", nearest {self._best:.1e}" if self._best < torch.inf else ""
        images = f"{self._done * self._per_leak}/{self._n_leaks * self._per_leak} images"
        self._progress.update(self._task, completed=steps, description=f"{self._name}: {images}{nearest}")


def forget_parts(config: Config, datamodule: GradientPairDataModule) -> None:
    """The evaluation is written: what was kept for going on with it is not needed."""
    _store(config, datamodule).remove()


def _store(config: Config, datamodule: GradientPairDataModule) -> Finished:
    plain = to_plain(config)
    plain["n_pictures"] = config.evaluation.n_pictures  # snapshots are kept of so many
    for key in ("output_dir", "logging", "evaluation", "trainer", "generator", "optimizer", "image_prior"):
        plain.pop(key)
    # What says how, and not what.
    for section, keys in _OF_NO_CONSEQUENCE.items():
        for key in keys:
            plain[section].pop(key, None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    digest.update(datamodule.leaked_model.fingerprint().encode())
    settings = check_attack(config)
    recovered = settings.recovered_from or str(run_folder(config))
    own = settings.image_prior if isinstance(settings, GIASConfig) else None
    for named in (
        settings.prior,
        recovered if settings.knowledge == "recovered" else None,
        own,
        settings.prior_settings.get("image_prior"),
    ):
        # A run that was made again under the same name is another one, and so is an image file.
        for file in () if named is None else _files_of(Path(named)):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    key = digest.hexdigest()[:16]
    return Finished(run_folder(config) / "evaluation" / UNFINISHED, key)


def _files_of(named: Path) -> list[Path]:
    """What an image file, or a run's generator, is made of; nothing for ``gray`` or an attack's name."""
    if not named.is_dir():
        return [named] if named.is_file() else []
    files = [named / "config.yaml", *(checkpoint_path(named, which) for which in ("best", "last"))]
    return [file for file in files if file.is_file()]


def _searched(
    attack: IterativeAttack,
    pair: GradientPair,
    rows: Tensor,
    numbers: Tensor,
    settings: MatchingConfig,
    bar: "_Bar",
    n_pictures: int,
) -> dict[str, Any]:
    """A part for the store: the leaks ``rows`` of a batch."""
    gradients: Gradients = {name: gradient[rows] for name, gradient in pair.gradients.items()}
    truth = pair.images[rows]
    # A line for each point, and first images of the first leaks with places of their own; restarts beside both.
    lines: list[Tensor] = []
    drawn, places = [truth.new_zeros(0, *truth.shape[2:], dtype=torch.uint8).cpu()], [torch.zeros(0, 3).long()]

    def told(which: Tensor, restart: int, iteration: int, images: Tensor, distances: Tensor) -> None:
        theirs, which = truth[which].to(images.dtype), which.cpu()
        matched = match(images.clamp(0, 1), theirs)
        error = (matched - theirs).square().flatten(2).mean(dim=2)
        psnr = (-10 * error.clamp_min(1e-12).log10()).mean(dim=1)
        columns = [which, torch.full_like(which, restart), torch.full_like(which, iteration), distances, psnr]
        lines.append(torch.stack([column.cpu().double() for column in columns], dim=1))
        if iteration in settings.snapshots:
            early = numbers[which] < n_pictures
            drawn.append(to_bytes(matched[early.to(matched.device), 0]))
            places.append(torch.stack(columns[:3], dim=1)[early])
        taken = (restart * settings.iterations + iteration) / settings.restarts
        bar.under_way(len(rows), taken, float(distances.min()) if len(distances) else torch.inf)

    started = time.perf_counter()
    labels = pair.labels[rows] if settings.labels == "given" else None
    found = attack.search(gradients, pair.indices[rows][:, 0], labels, told)
    seconds = time.perf_counter() - started
    counted = found.restarts.cpu()
    all_lines = torch.cat(lines) if lines else torch.zeros(0, 5, dtype=torch.float64)
    all_lines = all_lines[counted[all_lines[:, 0].long()] == all_lines[:, 1]]
    all_places = torch.cat(places)
    counts = counted[all_places[:, 0]] == all_places[:, 1]
    return {
        "numbers": numbers,
        "images": found.images.cpu(),
        "verdicts": list(found.verdicts),
        "labels": None if found.labels is None else found.labels.cpu(),
        "seconds": seconds,
        # Leaks by number from here on, and of restarts the one that counts alone.
        "lines": torch.cat([numbers[all_lines[:, :1].long()].double(), all_lines[:, 2:]], dim=1),
        "snapshots": torch.cat(drawn)[counts],
        "places": torch.stack([numbers[all_places[counts, 0]], all_places[counts, 2]], dim=1),
    }


def _joined(
    pair: GradientPair, numbers: Tensor, done: dict[int, tuple[dict[str, Any], int]], identifiers: Any
) -> Attacked:
    """A batch's searches, from the parts that hold them."""
    images, verdicts, labels, seconds = [], [], [], 0.0
    points: list[Point] = []
    snapshots: list[Snapshot] = []
    for position, number in enumerate(numbers.tolist()):
        part, row = done[number]
        images.append(part["images"][row])
        verdicts.append(part["verdicts"][row])
        if (its_labels := part.get("labels")) is not None:  # parts that an earlier version kept have none
            labels.append(its_labels[row])
        seconds += part["seconds"] / len(part["numbers"])
        lines = part["lines"][part["lines"][:, 0] == number]
        name = identifiers[int(pair.indices[position, 0])]
        points += [Point(number, name, int(step), distance, psnr) for _, step, distance, psnr in lines.tolist()]
        shown = (part["places"][:, 0] == number).nonzero().flatten().tolist()
        snapshots += [Snapshot(number, int(part["places"][at, 1]), part["snapshots"][at]) for at in shown]
    read_off = torch.stack(labels).to(pair.labels.device) if len(labels) == len(images) else None
    found = Reconstruction(torch.stack(images).to(pair.images.device), tuple(verdicts), read_off)
    return Attacked(pair, found, seconds, points, snapshots)
