import csv
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

import gitlight.loggers
from gitlight.config import Config
from gitlight.csv_logger import CSVFileLogger
from gitlight.loggers import ForgivingWandbLogger, build_loggers

KEY = "0123456789" * 4


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_call_and_a_header_that_grows(tmp_path: Path) -> None:
    logger = CSVFileLogger(tmp_path / "run" / "metrics.csv", resume_step=None)
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=9)
    logger.log_metrics({"val/psnr": torch.tensor(20.25), "epoch": torch.tensor(0.0)}, step=9)
    assert rows(tmp_path / "run" / "metrics.csv") == [
        {"epoch": "0", "step": "9", "train/loss": "0.5", "val/psnr": ""},
        {"epoch": "0", "step": "9", "train/loss": "", "val/psnr": "20.25"},
    ]


def test_csv_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CSVFileLogger(path, resume_step=None)
    for step in range(5):
        logger.log_metrics({"train/loss": step}, step=step)
        assert len(rows(path)) == step + 1


def test_csv_is_synced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    synced: dict[int, int] = {}

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    monkeypatch.setattr(os, "fsync", fsync)
    logger = CSVFileLogger(path, resume_step=None)
    logger.sync()
    assert not synced, "there is no file yet"
    logger.log_metrics({"train/loss": 0.5}, step=0)
    assert tmp_path.stat().st_ino in synced, "a file that is renamed into place"
    logger.log_metrics({"train/loss": 0.25}, step=1)
    assert synced[path.stat().st_ino] < path.stat().st_size
    logger.sync()
    assert synced[path.stat().st_ino] == path.stat().st_size


def test_csv_of_a_new_run_replaces_the_old(tmp_path: Path) -> None:
    for _ in range(2):
        logger = CSVFileLogger(tmp_path / "metrics.csv", resume_step=None)
        logger.log_metrics({"train/loss": 1.0}, step=0)
    assert len(rows(tmp_path / "metrics.csv")) == 1


def test_csv_of_a_resumed_run_keeps_the_steps_before_and_drops_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CSVFileLogger(path, resume_step=None)
    for step in (9, 19, 20, 29):
        logger.log_metrics({"train/loss": step / 3, "epoch": step // 10}, step=step)
    before = rows(path)
    resumed = CSVFileLogger(path, resume_step=20)
    resumed.log_metrics({"train/loss": 1.5, "val/psnr": 7.0}, step=20)
    after = rows(path)
    assert [row["step"] for row in after] == ["9", "19", "20"]
    assert [row["train/loss"] for row in after] == [before[0]["train/loss"], before[1]["train/loss"], "1.5"]
    assert [row["val/psnr"] for row in after] == ["", "", "7.0"]


def test_csv_drops_the_half_row_of_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,val/psnr\n0,1,20.5\n0,2,2")
    CSVFileLogger(path, resume_step=100).log_metrics({"val/psnr": 21.0}, step=100)
    assert [row["val/psnr"] for row in rows(path)] == ["20.5", "21.0"]


def test_csv_of_a_resumed_run_without_a_file_starts_one(tmp_path: Path) -> None:
    CSVFileLogger(tmp_path / "metrics.csv", resume_step=5).log_metrics({"val/psnr": 1.0}, step=6)
    assert len(rows(tmp_path / "metrics.csv")) == 1


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user without anything of W&B's; no address that a packet could reach."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    yield
    wandb.teardown()


def settings(mode: str) -> Config:
    config = Config()
    config.logging.wandb = mode
    config.logging.quiet = True
    return config


def wandb_mode(mode: str, folder: Path) -> str | None:
    """The mode that the W&B logger would start in; ``None`` where there is no such logger."""
    loggers = build_loggers(settings(mode), folder, "name", resumed=None)
    assert isinstance(loggers[0], CSVFileLogger)
    return loggers[1]._wandb_init["mode"] if len(loggers) > 1 else None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_credentials")
class TestMode:
    def test_auto_is_offline_without_credentials(self, tmp_path: Path) -> None:
        assert wandb_mode("auto", tmp_path) == "offline"

    def test_auto_is_online_with_a_key_in_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert wandb_mode("auto", tmp_path) == "online"

    def test_auto_is_online_with_a_key_in_netrc(self, tmp_path: Path) -> None:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
        assert wandb_mode("auto", tmp_path) == "online"

    @pytest.mark.parametrize(
        ("value", "expected"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", None), ("online", "online")]
    )
    def test_auto_follows_wandb_mode(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: str | None
    ) -> None:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", value)
        assert wandb_mode("auto", tmp_path) == expected

    def test_the_setting_goes_before_wandb_mode(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert wandb_mode("offline", tmp_path) == "offline"
        assert wandb_mode("online", tmp_path) == "online"

    def test_online_without_credentials_is_offline_with_a_warning(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="finds no API key"):
            assert wandb_mode("online", tmp_path) == "offline"


def test_off_does_not_import_wandb(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from gitlight.config import Config
from gitlight.loggers import build_loggers
config = Config()
config.logging.wandb = "off"
assert len(build_loggers(config, Path({str(tmp_path)!r}), "name", None)) == 1
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert not (tmp_path / "wandb").exists()


def wandb_logger(folder: Path, mode: str = "offline", resumed: dict[str, Any] | None = None) -> ForgivingWandbLogger:
    logger = build_loggers(settings(mode), folder, "name", resumed)[1]
    assert isinstance(logger, ForgivingWandbLogger)
    return logger


@pytest.mark.usefixtures("no_credentials")
def test_an_offline_run_is_kept_on_disk_with_its_config(tmp_path: Path) -> None:
    logger = wandb_logger(tmp_path)
    logger.log_metrics({"val/psnr": 20.0}, step=3)
    run = logger.experiment
    assert run.offline
    assert run.config["generator"]["name"] == "hybrid"
    assert run.name == "name"
    assert run.project == "gitlight"
    logger.finalize("success")
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{logger.version}.wandb"]
    assert wandb.run is None


@pytest.mark.usefixtures("no_credentials")
def test_a_resumed_run_has_the_same_id_and_a_new_run_another(tmp_path: Path) -> None:
    first = wandb_logger(tmp_path).version
    assert wandb_logger(tmp_path, resumed={"global_step": 7, "wandb_run_id": first}).version == first
    assert wandb_logger(tmp_path, resumed={"global_step": 7, "wandb_run_id": None}).version != first
    assert wandb_logger(tmp_path).version != first


@pytest.mark.usefixtures("no_credentials")
def test_two_runs_in_one_process_are_two(tmp_path: Path) -> None:
    ids = []
    for name in "ab":
        logger = wandb_logger(tmp_path / name)
        logger.log_metrics({"val/psnr": 20.0}, step=3)
        ids.append(logger.experiment.id)
        logger.finalize("success")
    assert ids[0] != ids[1]


@pytest.mark.usefixtures("no_credentials")
def test_a_server_that_cannot_be_reached_leaves_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(gitlight.loggers, "WANDB_INIT_TIMEOUT", 1.0)
    logger = wandb_logger(tmp_path, mode="online")
    with pytest.warns(UserWarning, match="logged offline"):
        logger.log_metrics({"val/psnr": 20.0}, step=3)
    assert logger.experiment.offline
    assert logger.experiment.id == logger.version
    logger.finalize("success")
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


@pytest.mark.usefixtures("no_credentials")
def test_a_wandb_that_cannot_start_at_all_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: Any) -> None:
        raise RuntimeError("wandb-core is missing")

    monkeypatch.setattr(wandb, "init", broken)
    logger = wandb_logger(tmp_path)
    with pytest.warns(UserWarning, match="cannot be used"):
        logger.log_metrics({"val/psnr": 20.0}, step=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"val/psnr": 20.0}, step=4)
        logger.log_hyperparams({"a": 1})
        logger.finalize("failed")


@pytest.mark.usefixtures("no_credentials")
def test_failures_while_logging_are_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = wandb_logger(tmp_path)
    run = logger.experiment

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the service is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run, "log", broken)
        with pytest.warns(UserWarning, match="may lack some of this run"):
            logger.log_metrics({"val/psnr": 20.0}, step=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logger.log_metrics({"val/psnr": 20.0}, step=4)
            logger.log_image("reconstructions", ["no such picture.png"])
    logger.finalize("success")
