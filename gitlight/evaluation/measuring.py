"""Reconstructions beside the truth."""

import torch
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.attacks.labels import LabelReader, in_the_order_of
from gitlight.data.pair import GradientPair
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.generators.base import Reconstruction
from gitlight.lpips import load_lpips
from gitlight.metrics import SMALLEST_LPIPS_IMAGE, PerceptualDistance, match
from gitlight.report.attacked import AttackedImages, measure, to_bytes


def measured(
    pair: GradientPair,
    found: Reconstruction,
    datamodule: GradientPairDataModule,
    class_names: tuple[str, ...],
    read_labels: LabelReader,
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
        recovered_labels=_recovered_labels(pair, found.labels, read_labels),
        metrics={name: values.flatten() for name, values in metrics.items()},
        failed=failed.flatten(),
        verdicts=tuple(verdict for verdict in found.verdicts for _ in range(per_leak)),
        truth=to_bytes(pair.images.flatten(0, 1)),
        reconstructions=to_bytes(reconstructions.flatten(0, 1)),
    )


def _recovered_labels(pair: GradientPair, found: Tensor | None, read_labels: LabelReader) -> Tensor | None:
    """``(B · N,)``: read off the leaks, each beside an equal true one where there is one; None where none can be.

    By the attack itself, where it does so (``found``), or else from the gradients alone.
    """
    if found is None:
        if not read_labels.readable:
            return None
        found = read_labels(pair.gradients)
    # Of one image a wrong label is shown as it was read.
    return (found if found.shape[1] == 1 else in_the_order_of(found.cpu(), pair.labels.cpu())).flatten().cpu()


def perceptual_distance(architecture: Architecture) -> PerceptualDistance | None:
    """LPIPS, where its weights are at hand and images are large enough."""
    return load_lpips() if min(architecture.image_shape[-2:]) >= SMALLEST_LPIPS_IMAGE else None
