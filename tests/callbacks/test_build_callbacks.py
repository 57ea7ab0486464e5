import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import Fit, TinyData, TinyModule, batches

from gitlight.callbacks import LearningRate, PairsProgressBar, QuietProgress, build_callbacks
from gitlight.callbacks.checkpoints import best_checkpoint, last_checkpoint
from gitlight.checkpoint_io import AtomicCheckpointIO
from gitlight.config import Config
from gitlight.csv_logger import CSVFileLogger, read_rows
from gitlight.data.pair import GradientPair

pytestmark = pytest.mark.usefixtures("without_lpips")


def names(config: Config) -> list[str]:
    callbacks = build_callbacks(config, Path("runs/name"))
    return [str(c.filename) if isinstance(c, ModelCheckpoint) else type(c).__name__ for c in callbacks]


def test_generators_and_leaked_models_have_their_own_callbacks() -> None:
    both = ["LearningRate", "RunSettings", "RunState", "QuietProgress", "best", "last"]
    assert names(Config(task="leaked")) == both
    assert names(Config()) == ["ReconstructionMetrics", "ReconstructionGrid", "WeightDistance", "Throughput", *both]
    assert names(Config(task="image_prior")) == ["ReconstructionMetrics", "ReconstructionGrid", *both]


def test_the_bar_is_for_terminals_that_are_not_to_be_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert PairsProgressBar.__name__ in names(config)
    config.logging.quiet = True
    assert QuietProgress.__name__ in names(config)
    assert PairsProgressBar.__name__ not in names(config)


def test_a_whole_run_leaves_its_files(fit: Fit, tmp_path: Path) -> None:
    fit(build_callbacks(Config(), tmp_path), logger=[CSVFileLogger(tmp_path / "metrics.csv", None)])
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "reconstructions/epoch_0000.png",
        "reconstructions/epoch_0001.png",
    }
    table = read_rows(tmp_path / "metrics.csv")
    assert {"epoch", "step", "train/loss", "lr", "val/loss", "val/psnr", "val/ssim", "val/mse"} <= set(table[0])
    # The rate that each step is taken with: it halves every step.
    assert [float(row["lr"]) for row in table if row["lr"]] == [0.5 * 0.5**i for i in range(6)]


class GettingWorse(TinyModule):
    """The grey, and with it PSNR, is best after the first epoch."""

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.generator.grey += 3.0


@pytest.mark.parametrize("moved", [False, True])
def test_best_is_kept_in_place_and_last_goes_on_when_a_run_is_resumed(fit: Fit, tmp_path: Path, moved: bool) -> None:
    folder = tmp_path / "run" / "checkpoints"

    def run(max_epochs: int, resume: str | None = None) -> None:
        fit(
            build_callbacks(Config(), folder.parent),
            GettingWorse(),
            TinyData(batches(4, 4), batches(3)),
            ckpt_path=resume,
            max_epochs=max_epochs,
            plugins=[AtomicCheckpointIO()],
        )

    def epochs() -> tuple[int, int]:
        best, last = (AtomicCheckpointIO().load_checkpoint(folder / f"{name}.ckpt") for name in ("best", "last"))
        return best["epoch"], last["epoch"]

    run(2)
    assert epochs() == (0, 1)
    if moved:
        folder = folder.parent.rename(tmp_path / "moved") / "checkpoints"
    run(4, resume=str(folder / "last.ckpt"))
    assert epochs() == (0, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_that_goes_on_in_a_new_folder_has_its_own_best(fit: Fit, tmp_path: Path) -> None:
    data = TinyData(batches(4, 4), batches(3))
    fit(build_callbacks(Config(), tmp_path / "a"), GettingWorse(), data, max_epochs=2)
    old = str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The dirpath has changed")
        fit(build_callbacks(Config(), tmp_path / "b"), GettingWorse(), data, max_epochs=4, ckpt_path=old)
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "b" / "checkpoints" / "best.ckpt")["epoch"] == 2


class NothingToTrain(TinyModule):
    """A generator in closed form."""

    def training_step(self, pair: GradientPair, batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(pair, batch_idx)

    def configure_optimizers(self) -> None:
        return None


def test_a_generator_with_nothing_to_train_is_measured_and_kept(fit: Fit, tmp_path: Path) -> None:
    trainer = fit(build_callbacks(Config(), tmp_path), NothingToTrain())
    assert "val/psnr" in trainer.callback_metrics
    assert "lr" not in trainer.callback_metrics
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(fit: Fit, tmp_path: Path, name: str) -> None:
    data = TinyData(batches(4, 4, 4), batches(3))

    def run(folder: Path, max_epochs: int, resume: str | None = None) -> list[dict[str, str]]:
        step = None if resume is None else torch.load(resume, weights_only=True)["global_step"]
        torch.manual_seed(0)
        callbacks = [LearningRate(), best_checkpoint(folder, "val/loss", "max"), last_checkpoint(folder)]
        logger = CSVFileLogger(folder / "metrics.csv", step)
        fit(callbacks, TinyModule(), data, ckpt_path=resume, max_epochs=max_epochs, logger=[logger])
        return read_rows(folder / "metrics.csv")

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    # What a run killed in its third epoch has logged since its last checkpoint.
    with (tmp_path / "parts" / "metrics.csv").open("a") as file:
        file.write("2,6,9.9,9.9,\n")
    parts = run(tmp_path / "parts", 4, resume=str(tmp_path / "parts" / "checkpoints" / f"{name}.ckpt"))
    assert parts == whole
