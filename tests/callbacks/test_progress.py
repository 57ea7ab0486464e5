import re

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from tiny_run import Fit, TinyData, batches

from gitlight.callbacks import PairsProgressBar, QuietProgress, Throughput


def test_quiet_progress_is_one_line_an_epoch(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit([Throughput(), QuietProgress()], max_epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    number, clock = r"[\d.e+-]+", r"\d+:\d\d:\d\d"
    for i, line in enumerate(lines):
        assert re.fullmatch(
            rf"epoch {i + 1}/3  train/loss {number}  val/loss {number}  \d+ pairs/s  elapsed {clock}  left {clock}",
            line,
        )
    assert len(lines) == 3
    assert lines[-1].endswith("left 0:00:00")


def test_values_of_a_former_validation_are_not_shown(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit([QuietProgress()], max_epochs=4, check_val_every_n_epoch=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["val/" in line for line in lines] == [False, True, False, True]


def test_quiet_progress_knows_no_time_left_of_an_endless_run(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    class OneEpoch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    fit([QuietProgress(), OneEpoch()], max_epochs=-1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert line.startswith("epoch 1  ")
    assert "left" not in line


def test_time_left_of_a_resumed_run_counts_its_own_steps(
    fit: Fit, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    data = TinyData(batches(4, 4), batches(3))
    trainer = fit([QuietProgress()], data=data, max_epochs=2)
    trainer.save_checkpoint(f"{tmp_path}/last.ckpt")
    capsys.readouterr()
    fit([QuietProgress()], data=data, max_epochs=3, ckpt_path=f"{tmp_path}/last.ckpt")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 1
    assert lines[0].startswith("epoch 3/3")


def test_the_bar_shows_pairs_per_second_and_the_time_left(fit: Fit) -> None:
    shown: list[dict[str, object]] = []

    class Recorder(PairsProgressBar):
        def get_metrics(self, *args: object) -> dict[str, object]:  # type: ignore[override]
            shown.append(super().get_metrics(*args))  # type: ignore[arg-type]
            return shown[-1]

    fit([Throughput(), Recorder()], max_epochs=1)
    assert re.fullmatch(r"\d+", str(shown[-1]["pairs/s"]))
    assert re.fullmatch(r"\d+:\d\d:\d\d", str(shown[-1]["left"]))
    assert not any(name.startswith("throughput") for name in shown[-1])


def test_time_left_is_at_most_what_max_time_leaves(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit([QuietProgress(), Timer(duration={"seconds": 7})], max_epochs=10**6, max_steps=6)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert re.search(r"left 0:00:0[0-7]$", line)
