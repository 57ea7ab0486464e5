from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from tiny_run import Fit, TinyData, TinyModule, batches
from torch import Tensor

import gitlight.callbacks.metrics
from gitlight.callbacks import ReconstructionMetrics

pytestmark = pytest.mark.usefixtures("without_lpips")


def mean_psnr(images: list[Tensor], grey: float) -> float:
    pairs = [(x.numpy(), (0.9 * x + 0.1 * grey).numpy()) for batch in images for x in batch.flatten(0, 1)]
    return float(np.mean([peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]))


@pytest.mark.parametrize("n", [1, 3])
def test_metrics_are_means_over_images_not_over_batches(fit: Fit, n: int) -> None:
    validation, module = batches(5, 1, n=n), TinyModule()
    trainer = fit([ReconstructionMetrics()], module, TinyData(batches(4), validation))
    expected = mean_psnr(validation, module.generator.grey.item())
    assert float(trainer.callback_metrics["val/psnr"]) == pytest.approx(expected, abs=1e-3)
    assert {"val/mse", "val/ssim"} <= set(trainer.callback_metrics)
    assert "val/lpips" not in trainer.callback_metrics
    assert "val/psnr" in trainer.progress_bar_metrics


def test_lpips_is_logged_where_it_is_available(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def lpips(reconstructions: Tensor, images: Tensor) -> Tensor:
        return torch.full((len(images),), 0.25)

    monkeypatch.setattr(gitlight.callbacks.metrics, "load_lpips", lambda: lpips)
    trainer = fit([ReconstructionMetrics()], data=TinyData(batches(4), batches(3, 2, side=32)))
    assert float(trainer.callback_metrics["val/lpips"]) == 0.25
    trainer = fit([ReconstructionMetrics()], data=TinyData(batches(4), batches(3, 2, side=12)))
    assert "val/lpips" not in trainer.callback_metrics


class Sharded(TinyData):
    """Rank 0 has three validation batches of different sizes, rank 1 has one."""

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        mine = [slice(0, 3), slice(3, 4)][self.trainer.global_rank]
        return torch.utils.data.DataLoader(self.batches["validation"][mine], batch_size=None)  # type: ignore[arg-type]


class Recorder(ReconstructionMetrics):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save((values, pl_module.generator.grey.item()), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
def test_metrics_are_exact_over_ranks_with_uneven_shares(fit: Fit, tmp_path: Path) -> None:
    validation = batches(3, 1, 2, 5)
    fit(
        [Recorder(tmp_path)],
        data=Sharded(batches(4), validation),
        devices=2,
        strategy="ddp_spawn",
        use_distributed_sampler=False,
        max_epochs=1,
    )
    for rank in range(2):
        values, grey = torch.load(tmp_path / f"{rank}.pt")
        assert values["val/psnr"] == pytest.approx(mean_psnr(validation, grey), abs=1e-3)
