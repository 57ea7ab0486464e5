"""A tiny run: a generator of one number, pairs that are given, and a real trainer."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gitlight.data.pair import GradientPair
from gitlight.generators.base import ParameterEstimate


class TinyGenerator(nn.Module):
    """Paints every image in one grey."""

    def __init__(self, estimates: dict[str, ParameterEstimate] | None = None) -> None:
        super().__init__()
        self.grey = nn.Parameter(torch.tensor(0.2))
        self.estimates = estimates or {}

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        return self.estimates


class TinyModule(LightningModule):
    def __init__(self, estimates: dict[str, ParameterEstimate] | None = None) -> None:
        super().__init__()
        self.generator = TinyGenerator(estimates)

    def training_step(self, pair: GradientPair, batch_idx: int) -> Tensor:
        loss = (pair.images - self.generator.grey).square().mean()
        self.log("train/loss", loss, batch_size=len(pair))
        return loss

    def validation_step(self, pair: GradientPair, batch_idx: int) -> dict[str, Tensor]:
        # Backwards within a client batch, so that only matching puts it right.
        found = (0.9 * pair.images + 0.1 * self.generator.grey).flip(1)
        self.log("val/loss", (found - pair.images).square().mean(), batch_size=len(pair))
        return {"reconstructions": found}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"},
        }


class TinyData(LightningDataModule):
    """Batches of images ``(B, N, C, H, W)``, turned into pairs after the transfer as the project's data module does."""

    def __init__(self, train: list[Tensor], validation: list[Tensor], network: nn.Module | None = None) -> None:
        super().__init__()
        self.batches = {"train": train, "validation": validation}
        self.leaked_model = nn.Module()
        self.leaked_model.network = network or nn.Linear(2, 2)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.batches["train"], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.batches["validation"], batch_size=None)  # type: ignore[arg-type]

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> GradientPair:
        labels = torch.zeros(batch.shape[:2], dtype=torch.int64)
        return GradientPair(gradients={}, images=batch, labels=labels, indices=labels)


Fit = Callable[..., Trainer]


def batches(*sizes: int, n: int = 1, channels: int = 3, side: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, n, channels, side, side, generator=generator) for size in sizes]
