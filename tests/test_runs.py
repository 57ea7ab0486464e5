from pathlib import Path

import pytest
import torch

from gitlight.config import Config, TrainerConfig
from gitlight.errors import CheckpointError
from gitlight.runs import checkpoint_to_resume, load_checkpoint, previous_hint


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


def test_previous_is_the_newest_before_the_last_that_can_be_read(folder: Path) -> None:
    for name in ("last", "last-1", "last-2"):
        save(folder / f"{name}.ckpt")
    assert resume(folder, "previous") == folder / "last-1.ckpt"
    damage(folder / "last-1.ckpt")
    assert resume(folder, "previous") == folder / "last-2.ckpt"
    (folder / "last-1.ckpt").unlink()  # killed between two moves
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
