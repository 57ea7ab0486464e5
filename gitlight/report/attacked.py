"""`AttackedImages`: every attacked image with what came of it; and ``per_image.csv``."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gitlight.metrics import PerceptualDistance, image_metrics
from gitlight.report.results import METRICS, write_text

FAILURE = {"mse": 1.0, "psnr": 0.0, "ssim": 0.0, "lpips": 1.0}
"""What a reconstruction with NaN or infinity counts: the largest error (black for white), no structure in common."""


@dataclass(frozen=True)
class AttackedImages:
    """``n`` private images, in the order of attack.

    Attributes:
        indices: ``(n,)`` int64, positions in the test split.
        identifiers: one short name per image.
        positions: ``(n,)`` int64, place within the client batch.
        labels: ``(n,)`` int64, the truth.
        class_names: name of each label.
        recovered_labels: ``(n,)`` int64 as read off the leaks, -1 where unreadable; None where none are read.
        metrics: metric → ``(n,)`` float64; a failed image has the values of `FAILURE`.
        failed: ``(n,)`` bool, whether the reconstruction held NaN or infinity.
        verdicts: in words, what the attack says became of each image's leak; empty where it says nothing.
        truth: ``(n, C, H, W)`` uint8.
        reconstructions: ``(n, C, H, W)`` uint8, clamped and rounded, for pictures; black where not finite.
    """

    indices: Tensor
    identifiers: tuple[str, ...]
    positions: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    recovered_labels: Tensor | None
    metrics: dict[str, Tensor]
    failed: Tensor
    verdicts: tuple[str, ...]
    truth: Tensor
    reconstructions: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def joined(cls, parts: Sequence["AttackedImages"]) -> "AttackedImages":
        """Parts in a row as one; all of the same kind, at least one."""
        recovered = [part.recovered_labels for part in parts if part.recovered_labels is not None]
        return cls(
            indices=torch.cat([part.indices for part in parts]),
            identifiers=tuple(name for part in parts for name in part.identifiers),
            positions=torch.cat([part.positions for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            class_names=parts[0].class_names,
            recovered_labels=torch.cat(recovered) if recovered else None,
            metrics={name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics},
            failed=torch.cat([part.failed for part in parts]),
            verdicts=tuple(verdict for part in parts for verdict in part.verdicts),
            truth=torch.cat([part.truth for part in parts]),
            reconstructions=torch.cat([part.reconstructions for part in parts]),
        )

    @property
    def label_accuracy(self) -> float | None:
        """Share of labels recovered, in [0, 1]; None where none are read."""
        if self.recovered_labels is None:
            return None
        return float((self.recovered_labels == self.labels).double().mean())


def measure(
    reconstructions: Tensor, images: Tensor, lpips: PerceptualDistance | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Each image's metrics, diverged reconstructions counted as failures instead of dropped.

    Args:
        reconstructions: ``(B, N, C, H, W)``, matched to the images.
        images: the truth, ``(B, N, C, H, W)`` in [0, 1].
        lpips: see `gitlight.metrics.image_metrics`.

    Returns:
        Metric → ``(B, N)`` float64 on the CPU; and which failed, ``(B, N)`` bool.
    """
    failed = ~torch.isfinite(reconstructions).flatten(2).all(dim=2).cpu()
    usable = torch.nan_to_num(reconstructions, posinf=0.0, neginf=0.0)
    metrics = image_metrics(usable, images, lpips)
    return {name: torch.where(failed, FAILURE[name], values.double().cpu()) for name, values in metrics.items()}, failed


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 on the CPU; clamped, and black where not finite."""
    return torch.nan_to_num(images.float(), posinf=0.0, neginf=0.0).clamp(0, 1).mul(255).round().byte().cpu()


def write_per_image(images: AttackedImages, path: Path) -> None:
    """Write ``per_image.csv``, all or nothing: one line per image, in the order of attack."""
    names = [name for name in METRICS if name in images.metrics]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "identifier", "label", "class", "position_in_leak", *names, "failed", "verdict"])
    labels = images.labels.tolist()
    columns = [
        images.indices.tolist(),
        images.identifiers,
        labels,
        [images.class_names[label] for label in labels],
        images.positions.tolist(),
        *(images.metrics[name].tolist() for name in names),
        [str(failed).lower() for failed in images.failed.tolist()],
        images.verdicts,
    ]
    writer.writerows(zip(*columns, strict=True))
    write_text(text.getvalue(), path)
