import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

import gitlight.rank_watch
from gitlight.rank_watch import RankWatch

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29500")


def trainer(local_rank: int = 0, children: tuple[subprocess.Popen[bytes], ...] = ()) -> Any:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = list(children)
    strategy = SimpleNamespace(launcher=launcher)
    return SimpleNamespace(strategy=strategy, global_rank=local_rank, local_rank=local_rank, world_size=2)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_the_rank_that_is_lost_is_named(child: subprocess.Popen[bytes]) -> None:
    with RankWatch(trainer(children=(child,))) as watch:
        child.kill()
        message = watch.explain(GLOO)
    assert message.startswith(f"rank 1 (process {child.pid}) was killed by SIGKILL.")
    assert "trainer.resume=auto" in message


def test_the_first_rank_is_missed_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    RankWatch(trainer())  # tells those that it starts which process it is
    watch = RankWatch(trainer(local_rank=1))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert watch.explain(GLOO).startswith(f"rank 0 (process {os.getpid()}) is gone.")


def test_errors_of_another_kind_are_not_explained(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    assert RankWatch(trainer(children=(child,))).explain(RuntimeError("shapes differ")) == ""


def test_a_process_that_hangs_is_ended(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(gitlight.rank_watch, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", ended.append)
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    with RankWatch(trainer(children=(failed, child))):
        deadline = time.monotonic() + 30
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == [1]
    assert "error: rank 1 " in capfd.readouterr().err
    assert child.wait(10) < 0, "the other one is ended, too"


def test_one_that_ends_in_order_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    monkeypatch.setattr(gitlight.rank_watch, "_TO_LEARN_WHICH", 0.1)
    assert RankWatch(trainer(children=(done,))).explain(GLOO).startswith("another rank was lost")
