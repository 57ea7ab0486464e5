import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from tiny_run import Fit, TinyData, TinyModule, batches


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(
        callbacks: list[Callback],
        module: LightningModule | None = None,
        data: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        **settings: Any,
    ) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "logger": False,
            "inference_mode": False,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
            "default_root_dir": tmp_path,
        }
        trainer = Trainer(callbacks=callbacks, **{**defaults, **settings})
        data = data or TinyData(batches(4, 4, 4), batches(3, 2))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            trainer.fit(module or TinyModule(), data, ckpt_path=ckpt_path)
        return trainer

    return run
