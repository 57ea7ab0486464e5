from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_files import write_sweep

from gitlight.config import TrainerConfig
from gitlight.sweep.command import sweep_command
from gitlight.sweep.devices import gpus_of_trial, gpus_of_worker, visible_gpus


@pytest.mark.parametrize(
    ("n_gpus", "workers", "devices", "expected"),
    [
        (4, 4, 1, ["0", "1", "2", "3"]),
        (4, 2, "auto", ["01", "23"]),
        (4, 2, -1, ["01", "23"]),
        (5, 2, "auto", ["01", "23"]),
        (4, 2, "1", ["0", "2"]),
        (2, 4, "auto", ["0", "1", "0", "1"]),
        (3, 2, 2, ["01", "20"]),
        (2, 2, 4, ["01", "01"]),
        (4, 2, [1, 3], ["0123", "0123"]),
        (4, 2, "1,3", ["0123", "0123"]),
    ],
)
def test_workers_have_as_many_gpus_each(n_gpus: int, workers: int, devices: Any, expected: list[str]) -> None:
    visible = list(map(str, range(n_gpus)))
    found = [gpus_of_worker(visible, worker, workers, devices) for worker in range(workers)]
    assert list(map("".join, found)) == expected


def test_trials_of_different_sizes_have_blocks_of_their_own() -> None:
    assert gpus_of_worker("0123", 0, 2, 2) == ["0", "1"]
    assert gpus_of_worker("0123", 1, 2, 1) == ["2"]


def test_one_worker_and_cpus_are_left_alone() -> None:
    assert gpus_of_trial("01", 1, 2, TrainerConfig(devices=1)) == ["1"]
    assert gpus_of_trial("01", 0, 1, TrainerConfig(devices=1)) == []
    assert gpus_of_trial("", 1, 2, TrainerConfig(devices=1)) == []
    assert gpus_of_trial("01", 1, 2, TrainerConfig(accelerator="cpu", devices=1)) == []


def test_visible_gpus_are_those_that_the_sweep_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-5ae, GPU-77"}) == ["GPU-5ae", "GPU-77"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-5,MIG-6, MIG-7,"}) == ["MIG-5", "MIG-6", "MIG-7"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,1,9"}) == ["3", "1"]  # of those named, CUDA finds two


@pytest.fixture
def saying_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A sweep from here over trials that say which GPUs they see, wait for each other, and train nothing."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "seen.py"
    program.write_text(
        "import os, time\nprint('sees', os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)\ntime.sleep(0.5)\n"
    )
    command = str(write_sweep(tmp_path).read_text()).split("command: ")[1].splitlines()[0]
    with_devices = command.replace('"${args', 'trainer.devices=1, "${args')
    return str(write_sweep(tmp_path, program=str(program), command=with_devices))


def seen(folder: Path) -> list[str]:
    return [log.read_text().split("sees ")[1].strip() for log in sorted(folder.glob("runs/sweeps/*/trial-*.log"))]


def test_trials_at_the_same_time_see_gpus_of_their_own(
    saying_gpus: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sweep_command([saying_gpus, "--trials", "4", "--workers", "2"])
    assert set(seen(tmp_path)[:2]) == {"4", "7"}
    assert set(seen(tmp_path)) == {"4", "7"}
    said = capsys.readouterr().out
    assert "starts on GPU 4: generator.channels=" in said
    assert "starts on GPU 7: generator.channels=" in said


def test_a_trial_alone_sees_all(saying_gpus: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sweep_command([saying_gpus, "--trials", "1"])
    assert seen(tmp_path) == ["4,7"]


def test_a_config_that_is_spoilt_meanwhile_fails_trials_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = tmp_path / "mine.yaml"
    config.write_text("generator: {name: coarse}\n")
    program = tmp_path / "spoiling.py"
    program.write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).write_text('generatr: {}')\n")
    command = f'["${{interpreter}}", "${{program}}", {config}, trainer.devices=1, "${{args_no_hyphens}}"]'
    file = write_sweep(tmp_path, program=str(program), command=command)
    code = sweep_command([str(file), "--trials", "4", "--workers", "2"])
    said = capsys.readouterr()
    assert (code, said.err) == (1, "")
    assert "4 trials: 4 failed" in said.out
    assert "trial 3: starts: generator.channels=" in said.out
