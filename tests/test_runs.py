import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from gitlight.config import Config, TrainerConfig
from gitlight.errors import BusyFolderError, CheckpointError, ConfigError
from gitlight.run_lock import is_being_written, lock_path
from gitlight.runs import (
    check_run_folder,
    checkpoint_to_resume,
    load_checkpoint,
    prepare_run_folder,
    previous_hint,
    run_folder,
    run_lock,
)
from gitlight.sweep.trial import SweepTrial


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def save(path: Path, step: int = 0) -> None:
    torch.save({"state_dict": {"weight": torch.arange(5000)}, "global_step": step}, path)


def resume(folder: Path, named: str) -> Path | None:
    return checkpoint_to_resume(Config(output_dir=str(folder.parent), trainer=TrainerConfig(resume=named)))


def damage(path: Path) -> None:
    """One byte in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_auto_is_the_last_checkpoint_or_a_fresh_run(folder: Path) -> None:
    assert resume(folder, "auto") is None
    save(folder / "last.ckpt")
    assert resume(folder, "auto") == folder / "last.ckpt"


def test_a_folder_is_told_from_its_checkpoint(folder: Path) -> None:
    run = folder.parent
    with pytest.raises(CheckpointError, match=r"is a folder\. Give last, .*: of a run in it, .*checkpoints.last\.ckpt"):
        resume(folder, str(run))


def test_previous_is_the_newest_before_the_last_that_can_be_read(folder: Path) -> None:
    for name in ("last", "last-1", "last-2"):
        save(folder / f"{name}.ckpt")
    assert resume(folder, "previous") == folder / "last-1.ckpt"
    damage(folder / "last-1.ckpt")
    assert resume(folder, "previous") == folder / "last-2.ckpt"
    (folder / "last-1.ckpt").unlink()  # killed between two moves
    save(folder / "last-1-mine.ckpt")
    assert resume(folder, "previous") == folder / "last-2.ckpt"


@pytest.mark.parametrize("damaged", [False, True])
def test_without_one_previous_says_so(folder: Path, damaged: bool) -> None:
    save(folder / "last.ckpt")
    if damaged:
        save(folder / "last-1.ckpt")
        damage(folder / "last-1.ckpt")
    with pytest.raises(CheckpointError, match=r"resume: previous: .* no checkpoint before last\.ckpt .*keep_last"):
        resume(folder, "previous")


def test_a_changed_byte_is_found(folder: Path) -> None:
    save(folder / "last.ckpt")
    damage(folder / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read .*checksum"):
        load_checkpoint(folder / "last.ckpt")


def test_the_checkpoint_before_is_offered_where_there_is_one(folder: Path) -> None:
    assert previous_hint(folder / "last.ckpt") == ""
    save(folder / "last-1.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not exist.*resume=previous .*last-1\.ckpt"):
        resume(folder, "last")
    assert previous_hint(folder / "best.ckpt") == ""


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"weights": {}},
        {"state_dict": 3},
        {"state_dict": {1: torch.zeros(2)}},
        {"state_dict": {"layer": {"weight": torch.zeros(2)}}},
    ],
)
def test_what_holds_no_weights_is_no_checkpoint(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"foreign\.ckpt is not a checkpoint of a run: it has no state_dict"):
        load_checkpoint(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize("words", ["", "\n", " \n\n"])
def test_an_error_without_words_is_called_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise EOFError(words)

    save(tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(CheckpointError, match=r"damaged or not one: EOFError$"):
        load_checkpoint(tmp_path / "last.ckpt")


def config_of(folder: Path | str) -> Config:
    return Config(output_dir=str(folder))


def test_a_home_is_found_and_one_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder(config_of("~/runs/mine")) == tmp_path / "runs" / "mine"
    with pytest.raises(ConfigError, match=r"^output_dir: ~nobody-at-all/x: "):
        run_folder(config_of("~nobody-at-all/x"))


def test_a_run_is_locked_by_whatever_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    with run_lock(real):
        for name in (tmp_path / "link", Path(".")):
            with pytest.raises(ConfigError, match="another run is writing"), run_lock(name):
                pass
    with run_lock(Path(".")):
        pass


def test_a_trial_waits_for_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "trial-0003"
    for name, value in SweepTrial("sqlite://", "mine", 3).environment().items():
        monkeypatch.setenv(name, value)
    former = FileLock(lock_path(folder), thread_local=False)
    former.acquire()
    with monkeypatch.context() as patch:
        patch.setattr("gitlight.runs.PATIENCE_SECONDS", 0.1)
        with pytest.raises(BusyFolderError, match="another run is writing"), run_lock(folder):
            pass
    threading.Timer(0.2, former.release).start()
    with run_lock(folder):
        assert is_being_written(folder)
    assert not is_being_written(folder)


def test_a_run_behind_a_link_is_moved_and_the_link_stays(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    for _ in range(2):
        prepare_run_folder(config_of(link), None)
    assert link.is_symlink()
    assert (tmp_path / "real" / "config.yaml").is_file()
    assert (tmp_path / "real.1" / "config.yaml").is_file()


def test_the_current_folder_is_not_moved_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_run_folder(config_of("."), None)
    save(tmp_path / "checkpoints" / "last.ckpt")
    prepare_run_folder(config_of("."), Path("checkpoints") / "last.ckpt")
    with pytest.raises(ConfigError, match=r"output_dir: .* not moved aside while it is the current folder"):
        prepare_run_folder(config_of("."), None)


@pytest.mark.parametrize(("below", "reason"), [("file/run", "Not a directory"), ("a" * 300, "File name too long")])
def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path, below: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^output_dir: .* cannot be written \({reason}\)\. Choose another"):
        check_run_folder(config_of(tmp_path / below))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_cannot_be_made_is_not_another_run(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").mkdir()
    with (
        pytest.raises(ConfigError, match=r"^output_dir: .* cannot be locked \(Is a directory"),
        run_lock(tmp_path / "run"),
    ):
        pass
