"""`evaluate`, what ``evaluate.py`` does: attack private images with a trained generator, measure, and report."""

import logging
import os
import time
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.attacks.knowledge import check_attack, knowledge_of
from gitlight.attacks.labels import in_the_order_of, labels_from_leak
from gitlight.attacks.private import attack_iteratively, forget_parts
from gitlight.callbacks.reconstructions import draw_grid
from gitlight.config import Config, EvaluationConfig, GivenConfig, MatchingConfig, TrainerConfig
from gitlight.config_loading import load_config, save_config
from gitlight.data.datamodule import GradientPairDataModule
from gitlight.data.pair import GradientPair, Gradients
from gitlight.errors import CheckpointError, ConfigError
from gitlight.generators.base import Generator, Reconstruction
from gitlight.generators.exact.labels import labels_from_bias_gradient, output_bias
from gitlight.gradients.channel import describe_channel
from gitlight.gradients.updates import describe_leak
from gitlight.loggers import log_curve
from gitlight.lpips import load_lpips
from gitlight.metrics import SMALLEST_LPIPS_IMAGE, PerceptualDistance, bootstrap_interval, match
from gitlight.report.attacked import AttackedImages, measure, to_bytes, write_per_image
from gitlight.report.html import Figure, render_report
from gitlight.report.results import METRICS, Estimate, Result, merge_results, read_results, write_results, write_text
from gitlight.report.snapshots import draw_snapshots
from gitlight.report.trajectories import PICTURE, keep_trajectories, mean_curve
from gitlight.runs import checkpoint_path, run_folder
from gitlight.trained import load_generator_weights, trained_checkpoint
from gitlight.training import accelerator, build_generator, build_pairs, with_network

log = logging.getLogger(__name__)

KNOWLEDGE = ("architecture", "pairs")
"""What a trained generator is given: it never sees a parameter, a label or another attack's result."""

_WARM_UP = 4


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found and wrote.

    Attributes:
        result: the entry of ``metrics.json``.
        folder: ``RUN_DIR/evaluation``.
    """

    result: Result
    folder: Path

    def summary(self) -> str:
        """The metrics as an aligned table in plain text, then where the picture and the report are."""
        result = self.result
        lines = [
            f"{result.attack} on {result.leaked}, {result.data}: {result.n_images} private images, "
            f"{result.client_batch_size} per {result.leak}, channel: {result.channel}",
            "",
            f"{'':<16}{'mean':>10}    95 % interval",
        ]
        for name, metric in METRICS.items():
            if name in result.metrics:
                mean, low, high = map(metric.show, astuple(result.metrics[name]))
                lines.append(f"{metric.title:<16}{mean:>10}    {low} to {high}{metric.unit}")
        if result.label_accuracy is not None:
            lines.append(f"{'labels right':<16}{result.label_accuracy:>10.1%}")
        lines.append(f"{'time per image':<16}{result.seconds_per_image * 1000:>10.3g}    ms")
        lines += [f"{count:<16}{verdict}" for verdict, count in result.verdicts.items()]
        if result.n_failed:
            lines.append(f"{'failed':<16}{result.n_failed:>10}    no image; each counts as 0 dB")
        lines += ["", f"picture  {self.folder / 'reconstructions.png'}", f"report   {self.folder / 'report.html'}"]
        return "\n".join(lines)


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
    checkpoint = {} if iterative else trained_checkpoint(config)
    read_results(folder / "evaluation" / "metrics.json")  # unreadable: stop now, not after the attack
    trained = load_config(folder) if (folder / "config.yaml").is_file() else config
    device = _device(config.trainer)
    if iterative:
        return _evaluate_search(config, trained, build_pairs(config, network), device)
    datamodule = build_pairs(config, network)
    _check_leaked_model(config, trained, datamodule, checkpoint)
    generator = build_generator(config, datamodule.architecture)
    load_generator_weights(generator, checkpoint["state_dict"], checkpoint_path(folder, settings.checkpoint))
    images, seconds = attack(generator, datamodule, datamodule.class_names, device, settings.n_images)
    _warn_of_few(settings, images)
    name = _described(config.generator.name, _attack_changes(config, trained))
    evaluation = Evaluation(_result(config, trained, images, seconds, name, KNOWLEDGE), folder / "evaluation")
    _write(evaluation, config, trained, images, device)
    return evaluation


def _evaluate_search(
    config: Config, trained: Config, datamodule: GradientPairDataModule, device: torch.device
) -> Evaluation:
    """An iterative attack on private images, with its trajectories."""
    settings, folder = check_attack(config), run_folder(config)
    knowledge = knowledge_of(config, datamodule, device)
    name = _described(settings.name, _search_changes(settings) | _leak_changes(config, trained))
    lpips = _lpips(datamodule.architecture)
    parts: list[AttackedImages] = []
    seconds, points, snapshots = 0.0, [], []
    for attacked in attack_iteratively(config, datamodule, knowledge, device, config.evaluation.n_images):
        parts.append(_measured(attacked.pair, attacked.found, datamodule, datamodule.class_names, lpips))
        seconds += attacked.seconds
        points += attacked.points
        snapshots += attacked.snapshots
    images = AttackedImages.joined(parts)
    _warn_of_few(config.evaluation, images)
    result = _result(config, trained, images, seconds, name, knowledge.items)
    evaluation = Evaluation(result, folder / "evaluation")
    if not (folder / "config.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    label = name if not config.channel else f"{name}, {describe_channel(config.channel)}"
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(evaluation.folder / ".lock"):
        path = keep_trajectories(points, label, result.condition, evaluation.folder / "trajectories")
        per_leak, n_leaks = config.data.client_batch_size, config.evaluation.n_pictures
        truth, final = (kind[::per_leak][:n_leaks] for kind in (images.truth, images.reconstructions))
        draw_snapshots(snapshots, truth, final, path.with_suffix(".png"))
    figures = (
        Figure.of(path.with_name(PICTURE), "Distance of gradients and PSNR over iterations, of the latest attacks"),
        Figure.of(path.with_suffix(".png"), "Reconstructions on the way, below the private images"),
    )
    # Of a search the report has no other, trained conditions.
    _write(evaluation, config, config, images, device, figures)
    log_curve(config, evaluation.folder, label, mean_curve(points))
    forget_parts(config, datamodule)
    return evaluation


def _warn_of_few(settings: EvaluationConfig, images: AttackedImages) -> None:
    if len(images) < settings.n_images:
        log.warning("evaluation.n_images: %d, but the private images make up %d", settings.n_images, len(images))


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
    lpips = _lpips(generator.architecture)
    parts: list[AttackedImages] = []
    seconds = 0.0
    for pair in datamodule.private_pairs(device, n_images):
        if not parts:
            _timed_forward(generator, {name: g[:_WARM_UP] for name, g in pair.gradients.items()}, device)
        found, elapsed = _timed_forward(generator, pair.gradients, device)
        seconds += elapsed
        parts.append(_measured(pair, found, datamodule, class_names, lpips))
    return AttackedImages.joined(parts), seconds


def _measured(
    pair: GradientPair,
    found: Reconstruction,
    datamodule: GradientPairDataModule,
    class_names: tuple[str, ...],
    lpips: PerceptualDistance | None,
) -> AttackedImages:
    """A batch's reconstructions beside the truth."""
    reconstructions = match(found.images, pair.images)
    metrics, failed = measure(reconstructions, pair.images, lpips)
    per_leak = pair.images.shape[1]
    positions = torch.arange(per_leak).expand(len(pair), -1)
    identifiers = datamodule.split("test").identifiers
    return AttackedImages(
        indices=pair.indices.flatten().cpu(),
        identifiers=tuple(identifiers[index] for index in pair.indices.flatten().tolist()),
        positions=positions.flatten(),
        labels=pair.labels.flatten().cpu(),
        class_names=class_names,
        recovered_labels=_recovered_labels(pair, datamodule.architecture),
        metrics={name: values.flatten() for name, values in metrics.items()},
        failed=failed.flatten(),
        verdicts=tuple(verdict for verdict in found.verdicts for _ in range(per_leak)),
        truth=to_bytes(pair.images.flatten(0, 1)),
        reconstructions=to_bytes(reconstructions.flatten(0, 1)),
    )


def _recovered_labels(pair: GradientPair, architecture: Architecture) -> Tensor | None:
    """``(B · N,)``: read off the leaks, each beside an equal true one where there is one; None where none can be."""
    bias = output_bias(architecture)
    if bias is None or bias in architecture.sketched:
        return None
    if pair.images.shape[1] == 1:
        return labels_from_bias_gradient(pair.gradients[bias]).cpu()
    found = labels_from_leak(architecture, pair.gradients, pair.images.shape[1])
    return in_the_order_of(found.cpu(), pair.labels.cpu()).flatten()


def _lpips(architecture: Architecture) -> PerceptualDistance | None:
    return load_lpips() if min(architecture.image_shape[-2:]) >= SMALLEST_LPIPS_IMAGE else None


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


def _device(settings: TrainerConfig) -> torch.device:
    """One device of the kind that training would use; the CPU where the machine has none."""
    on_gpu = accelerator(settings) != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _check_leaked_model(
    config: Config, trained: Config, datamodule: GradientPairDataModule, checkpoint: dict[str, Any]
) -> None:
    """The leaked model must be the one that the generator was trained on, unless ``leaked`` was changed on purpose."""
    if config.leaked != trained.leaked:
        log.warning(
            "The attacked model is not the one that the generator was trained on: %s was changed",
            ", ".join(f"leaked.{key}" for key in _changes(config.leaked, trained.leaked)),
        )
        return
    stored = checkpoint.get(type(datamodule).__qualname__, {}).get("leaked_fingerprint")
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


def _changes(settings: Any, trained: Any) -> dict[str, Any]:
    """The settings of a component that are not those of training."""
    former = vars(trained)
    return {key: value for key, value in vars(settings).items() if key not in former or value != former[key]}


def _attack_changes(config: Config, trained: Config) -> dict[str, Any]:
    """What makes an attack another one than the trained generator's best checkpoint on the run's own images."""
    changes = _changes(config.generator, trained.generator) | _leak_changes(config, trained)
    if config.evaluation.checkpoint != EvaluationConfig().checkpoint:
        changes["checkpoint"] = config.evaluation.checkpoint
    return changes


def _leak_changes(config: Config, trained: Config) -> dict[str, Any]:
    """What makes the leaks others than the run's own."""
    changes = _changes(config.gradients, trained.gradients)
    # How, not what; updates are a part of the condition of their own, and another sketch does not load.
    for key in ("memory_limit_gb", "method", "updates", "sketch"):
        changes.pop(key, None)
    if config.seed != trained.seed:
        changes["images_seed"] = config.seed
    return changes


def _search_changes(settings: MatchingConfig) -> dict[str, Any]:
    """What an iterative attack does otherwise than by default."""
    changes = _changes(settings, type(settings)())
    for key in ("memory_limit_gb", "record_every", "snapshots"):
        changes.pop(key, None)
    return changes


def _leaked_changes(config: Config, trained: Config) -> dict[str, Any]:
    """What makes the leaked model another one than that of training, beside what its title says."""
    changes = _changes(config.leaked, trained.leaked)
    return {key: value for key, value in changes.items() if key not in ("target", "type")}


def _described(name: str, changes: dict[str, Any]) -> str:
    """A name, with what was changed since training: a result under such a condition must not replace the other's."""
    values = ", ".join(f"{key}={'null' if v is None else v}" for key, v in changes.items() if key != "name")
    return f"{name}({values})" if values else name


def _result(
    config: Config,
    trained: Config,
    images: AttackedImages,
    seconds: float,
    name: str,
    knowledge: tuple[str, ...],
) -> Result:
    metrics = {}
    for metric, values in images.metrics.items():
        low, high = bootstrap_interval(values, config.evaluation.bootstrap_samples, config.seed)
        metrics[metric] = Estimate(float(values.mean()), low, high)
    data = config.data
    # Of the data settings, only these choose other private images; a folder's own name says which images it holds.
    data_name = Path(os.path.abspath(data.root)).name if data.name == "folder" and data.root else data.name
    data_changes = {key: v for key, v in _changes(data, trained.data).items() if key == "private_classes"}
    return Result(
        attack=name,
        leaked=_described(config.leaked.title, _leaked_changes(config, trained)),
        data=_described(data_name, data_changes),
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


def _write(
    evaluation: Evaluation,
    config: Config,
    trained: Config,
    images: AttackedImages,
    device: torch.device,
    figures: tuple[Figure, ...] = (),
) -> None:
    """Write the four files, each all or nothing."""
    result, folder = evaluation.result, evaluation.folder
    folder.mkdir(parents=True, exist_ok=True)
    n = config.evaluation.n_pictures
    captions = [
        "failed" if failed else f"{psnr:.1f} dB"
        for psnr, failed in zip(images.metrics["psnr"][:n].tolist(), images.failed[:n].tolist(), strict=True)
    ]
    # Evaluations of one run under several conditions may well run side by side.
    with FileLock(folder / ".lock"):
        results = merge_results(read_results(folder / "metrics.json"), result)
        write_per_image(images, folder / "per_image.csv")
        partial = folder / ".reconstructions.partial.png"
        draw_grid(images.truth[:n] / 255, images.reconstructions[:n] / 255, partial, captions)
        partial.replace(folder / "reconstructions.png")
        write_text(render_report(config, trained, results, result, images, device, figures), folder / "report.html")
        write_results(results, folder / "metrics.json")
