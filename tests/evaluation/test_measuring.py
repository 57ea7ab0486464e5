from collections.abc import Callable

import numpy as np
import pytest
import torch
from evaluated import Load, entries, rows

from gitlight.config import Config
from gitlight.data.pair import Gradients
from gitlight.evaluation import attack, evaluate
from gitlight.generators.base import Generator
from gitlight.report.attacked import FAILURE
from gitlight.training import build_pairs


def test_lpips_is_reported_where_it_can_be_had(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gitlight.evaluation.measuring.load_lpips", lambda: lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))
    )
    config = load()
    evaluate(config)
    assert entries(config)[0]["metrics"]["lpips"]["mean"] == pytest.approx(
        np.mean([float(row["lpips"]) for row in rows(config)])
    )


class Given(Generator):
    """Puts out images that it was given, whatever the gradients."""

    def __init__(self, config: Config, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.datamodule = build_pairs(config)
        super().__init__(self.datamodule.leaked_model.architecture, config.data.client_batch_size)
        pairs = self.datamodule.private_pairs(torch.device("cpu"), 100)
        self.images = change(torch.cat([pair.images for pair in pairs]))

    def forward(self, gradients: Gradients) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        n = len(next(iter(gradients.values())))
        return self.images[:n]


def test_diverged_reconstructions_count_as_failures(load: Load) -> None:
    def spoil(images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[0], images[1, 0, 0, 3, 3] = torch.nan, torch.inf
        return images

    generator = Given(load(), spoil)
    images, _ = attack(generator, generator.datamodule, ("a",) * 50, torch.device("cpu"), 4)
    assert images.failed.tolist() == [True, True, False, False]
    assert images.metrics["psnr"].tolist() == [FAILURE["psnr"], FAILURE["psnr"], 120.0, 120.0]
    assert images.metrics["ssim"][:2].tolist() == [0.0, 0.0]
    assert images.metrics["mse"][:2].tolist() == [1.0, 1.0]


def test_client_batches_are_matched_and_their_labels_counted(load: Load) -> None:
    generator = Given(load("data.client_batch_size=3"), lambda images: images.flip(1))
    images, _ = attack(generator, generator.datamodule, ("a",) * 50, torch.device("cpu"), 8)
    assert images.metrics["psnr"].tolist() == [120.0] * 6
    assert images.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.indices.tolist() == list(range(6))
    assert torch.equal(images.truth, images.reconstructions)
    # Each label that is right stands beside its image; of the others there is none.
    assert images.recovered_labels is not None
    assert ((images.recovered_labels == images.labels) | (images.recovered_labels == -1)).all()
    assert images.label_accuracy == pytest.approx((images.recovered_labels >= 0).double().mean().item())
    assert images.label_accuracy == 1, "pairs tell the probabilities"
