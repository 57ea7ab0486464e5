"""`ReconstructionMetrics`: MSE, PSNR, SSIM and LPIPS over all validation images."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gitlight.data.pair import GradientPair
from gitlight.lpips import load_lpips
from gitlight.metrics import PerceptualDistance, match
from gitlight.report.attacked import measure

METRICS = ("mse", "psnr", "ssim", "lpips")


class ReconstructionMetrics(Callback):
    """Logs ``val/mse``, ``val/psnr`` (dB), ``val/ssim`` and ``val/lpips``: means over images, at each validation's end.

    Exact over ranks whose shards differ in size: ranks add their sums once, at the end of the validation. ``val/lpips``
    is logged only if it could be computed for every image (its weights, and images of at least 31 × 31 pixels).
    """

    def __init__(self) -> None:
        self._lpips: PerceptualDistance | None = None
        self._sums = torch.zeros(0)
        self._counts = torch.zeros(0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load LPIPS before training, so that its one warning comes where it is seen."""
        self._lpips = load_lpips()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation."""
        self._sums = torch.zeros(len(METRICS), dtype=torch.float64)
        self._counts = torch.zeros(len(METRICS), dtype=torch.float64)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: GradientPair,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch; no communication, as ranks may have different numbers of batches."""
        reconstructions: Tensor = outputs["reconstructions"].detach()
        # As in an evaluation: what is not finite counts as a complete failure.
        values, _ = measure(match(reconstructions, batch.images), batch.images, self._lpips)
        for i, name in enumerate(METRICS):
            if name in values:
                self._sums[i] += values[name].cpu().double().sum()
                self._counts[i] += values[name].numel()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks' sums and log the means."""
        totals = torch.stack([self._sums, self._counts])
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals.to(pl_module.device), reduce_op="sum").cpu()
        sums, counts = totals
        for i, name in enumerate(METRICS):
            if 0 < counts[i] == counts.max():
                mean = float(sums[i] / counts[i])
                # All ranks hold the same mean; sync_dist only tells Lightning so.
                pl_module.log(f"val/{name}", mean, prog_bar=name in ("psnr", "ssim"), sync_dist=True)
