import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gitlight.training
from gitlight.config import Config
from gitlight.sweep.trial import SweepTrial

WATCHES = "from gitlight.sweep.trial import end_with_the_sweep as watch; watch(); watch(); print(flush=True); "
MULTIPROCESSING = "import os; os.close(0); os.open(os.devnull, os.O_RDONLY); "  # what it does in a child
LONG = "import time; time.sleep(600)"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **SweepTrial("sqlite://", "mine", 3).environment()}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
        text=True,
    )


def test_a_trial_ends_with_its_sweep(started: list[subprocess.Popen[str]]) -> None:
    started.append(process := start(WATCHES + LONG))
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(10) == -9


def test_what_has_no_pipe_from_the_sweep_does_not_watch(started: list[subprocess.Popen[str]]) -> None:
    started.append(process := start(MULTIPROCESSING + WATCHES + LONG))
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    assert process.poll() is None


def test_training_in_a_program_of_ones_own_ends_with_the_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    monkeypatch.setattr(gitlight.training, "end_with_the_sweep", lambda: done.append("watches"))
    monkeypatch.setattr(gitlight.training, "_train", lambda *_: done.append("trains") or tmp_path)
    gitlight.training.train(Config(output_dir=str(tmp_path / "run")))
    assert done == ["watches", "trains"]
