"""Evaluation of an iterative attack."""

import torch
from filelock import FileLock

from gitlight.attacks.knowledge import check_attack, knowledge_of
from gitlight.attacks.private import attack_iteratively, forget_parts
from gitlight.config import Config
from gitlight.config_loading import save_config
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.evaluation.conditions import described, leak_changes, result_of, search_changes
from gitlight.evaluation.measuring import measured, perceptual_distance
from gitlight.evaluation.writing import Evaluation, warn_of_few, write_evaluation
from gitlight.gradients.channel import describe_channel
from gitlight.loggers import log_curve
from gitlight.report.attacked import AttackedImages
from gitlight.report.html import Figure
from gitlight.report.snapshots import draw_snapshots
from gitlight.report.trajectories import PICTURE, keep_trajectories, mean_curve
from gitlight.runs import run_folder


def evaluate_search(
    config: Config, trained: Config, datamodule: GradientPairDataModule, device: torch.device
) -> Evaluation:
    """An iterative attack on private images, with its trajectories."""
    settings, folder = check_attack(config), run_folder(config)
    knowledge = knowledge_of(config, datamodule, device)
    name = described(settings.name, search_changes(settings) | leak_changes(config, trained))
    lpips, class_names = perceptual_distance(datamodule.architecture), datamodule.class_names
    parts: list[AttackedImages] = []
    seconds, points, snapshots = 0.0, [], []
    for attacked in attack_iteratively(config, datamodule, knowledge, device, config.evaluation.n_images):
        parts.append(measured(attacked.pair, attacked.found, datamodule, class_names, knowledge.read_labels, lpips))
        seconds += attacked.seconds
        points += attacked.points
        snapshots += attacked.snapshots
    images = AttackedImages.joined(parts)
    warn_of_few(config, len(datamodule.split("test")), len(images))
    result = result_of(config, trained, images, seconds, name, knowledge.items)
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
    write_evaluation(evaluation, config, config, images, device, figures)
    log_curve(config, evaluation.folder, label, mean_curve(points))
    forget_parts(config, datamodule)
    return evaluation
