import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gitlight.checkpoint_io import AtomicCheckpointIO
from gitlight.errors import CheckpointError


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state": torch.arange(3), "epoch": 2}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state"], torch.arange(3))
    assert loaded["epoch"] == 2
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of processes on this system")
def test_a_full_disk_leaves_the_old_checkpoints_and_one_message(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO(keep_last=3)
    for epoch in (1, 2):
        io.save_checkpoint({"epoch": epoch}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write on, as on a full disk, in the middle of the weights.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"last\.ckpt cannot be written \(File too large\); .*GB are free"
        ) as failure:
            io.save_checkpoint({"epoch": 3, "state": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "as they were" in str(failure.value)
    assert io.load_checkpoint(path) == {"epoch": 2}
    assert io.load_checkpoint(tmp_path / "last-1.ckpt") == {"epoch": 1}
    assert sorted(os.listdir(tmp_path)) == ["last-1.ckpt", "last.ckpt"]


@pytest.mark.parametrize("links", [True, False])
def test_the_latest_checkpoints_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*paths: object) -> None:
            raise OSError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    io = AtomicCheckpointIO(keep_last=3)
    for epoch in range(5):
        io.save_checkpoint({"epoch": epoch}, tmp_path / "last.ckpt")
        io.save_checkpoint({"epoch": epoch}, tmp_path / "best.ckpt")
    kept = {path.name: io.load_checkpoint(path)["epoch"] for path in tmp_path.iterdir()}
    assert kept == {"best.ckpt": 4, "last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}


@pytest.mark.parametrize("keep_last", [1, 2])
def test_checkpoints_of_when_more_were_kept_are_deleted(tmp_path: Path, keep_last: int) -> None:
    before = AtomicCheckpointIO(keep_last=5)
    for step in range(5):
        before.save_checkpoint({"step": step}, tmp_path / "last.ckpt")
    (tmp_path / "last-3-mine.ckpt").touch()
    io = AtomicCheckpointIO(keep_last=keep_last, last_is_good=False)
    io.save_checkpoint({"step": 9}, tmp_path / "best.ckpt")
    io.save_checkpoint({"step": 9}, tmp_path / "last.ckpt")
    assert (tmp_path / "last-4.ckpt").exists(), "where the last one was damaged, others may be"
    io.save_checkpoint({"step": 10}, tmp_path / "last.ckpt")
    kept = ["last-1.ckpt"] * (keep_last - 1)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", *kept, "last-3-mine.ckpt", "last.ckpt"]


def test_a_disk_that_is_full_of_former_checkpoints_moves_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    io = AtomicCheckpointIO(keep_last=3)
    for step in range(3):
        io.save_checkpoint({"step": step}, tmp_path / "last.ckpt")
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*resume=last goes on; or .*resume=.*last\.ckpt"):
        io.save_checkpoint({"step": 3}, tmp_path / "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["last-1.ckpt", "last-2.ckpt", "last.ckpt"]
    kept = [io.load_checkpoint(tmp_path / name)["step"] for name in ("last.ckpt", "last-1.ckpt", "last-2.ckpt")]
    assert kept == [2, 1, 0]


def test_after_a_full_disk_only_what_is_there_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"best\.ckpt cannot be written .* no last\.ckpt yet") as failure:
            AtomicCheckpointIO().save_checkpoint({}, tmp_path / "best.ckpt")
    assert "trainer.resume" not in str(failure.value)
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"best\.ckpt cannot be written .* trainer\.resume=.*last\.ckpt\.$"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match="start it as before"):  # with what it went on from
        AtomicCheckpointIO(last_is_good=False).save_checkpoint({}, tmp_path / "best.ckpt")


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_last_checkpoint_that_a_run_did_not_go_on_from_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"damaged")
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "last-1.ckpt")
    io = AtomicCheckpointIO(keep_last=2, last_is_good=False)
    io.save_checkpoint({"epoch": 2}, tmp_path / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "last-1.ckpt") == {"epoch": 1}
    io.save_checkpoint({"epoch": 3}, tmp_path / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "last-1.ckpt") == {"epoch": 2}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 1}, path)
    # The child stalls in the middle of torch.save, where it is killed.
    code = f"""
import time, torch
from gitlight.checkpoint_io import AtomicCheckpointIO
def stall(checkpoint, file):
    file.write(b"half a checkpoint"); file.flush(); time.sleep(60)
torch.save = stall
AtomicCheckpointIO().save_checkpoint({{"epoch": 2}}, {str(path)!r})
"""
    root = Path(__file__).parents[1]
    child = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    try:
        partial = tmp_path / ".last.ckpt.partial"
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert partial.stat().st_size > 0
    finally:
        child.kill()
        child.wait()
    assert io.load_checkpoint(path) == {"epoch": 1}
    io.save_checkpoint({"epoch": 3}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(path) == {"epoch": 3}


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*gone\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "gone.ckpt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt .*damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_cut_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"last\.ckpt .*damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for path, write in ((tmp_path / "a.ckpt", torch.save), (tmp_path / "b.ckpt", None)):
        if write is None:
            path.write_bytes(pickle.dumps({"x": Payload()}, protocol=2))
        else:
            write({"x": Payload()}, path)
        with pytest.raises(CheckpointError, match="not read"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "ran").exists()
