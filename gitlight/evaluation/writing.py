"""What an evaluation found, and its files."""

import logging
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from filelock import FileLock

from gitlight.callbacks.reconstructions import draw_grid
from gitlight.config import Config
from gitlight.report.attacked import AttackedImages, write_per_image
from gitlight.report.html import Figure, render_report
from gitlight.report.results import METRICS, Result, merge_results, read_results, write_results, write_text

log = logging.getLogger(__name__)


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


def warn_of_few(config: Config, n_private: int, n_attacked: int) -> None:
    """Say so, and why, where fewer private images are attacked than asked for.

    Args:
        config: with ``evaluation.n_images`` and ``data.client_batch_size``.
        n_private: private images that there are.
        n_attacked: those that are attacked.
    """
    asked, causes = config.evaluation.n_images, []
    if n_private < asked:
        causes.append(f"there are {n_private}")
    if n_attacked < min(n_private, asked):
        causes.append(f"leaks are of {config.data.client_batch_size} images each (data.client_batch_size)")
    if causes:
        why = ", and ".join(causes)
        log.warning("evaluation.n_images: %d, but %d private images are attacked: %s", asked, n_attacked, why)


def write_evaluation(
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
