"""Sweeps in real processes: interrupted in every way, each trial is run once."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from filelock import FileLock
from optuna.trial import TrialState
from small_run import SMALL

from gitlight.sweep.study import OWNER, REASON, load_study, open_storage

ROOT = Path(__file__).parent.parent.parent
QUICK = Path(__file__).parent / "quick_trial.py"
CONFIG = ROOT / "configs" / "demo.yaml"
RATES = [0.01 * number for number in range(1, 9)]


class Sweeping:
    """Runs ``python -m gitlight.sweep`` in a folder, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs" / "sweeps" / "sweep"
        self._cwd = folder
        without = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "GITLIGHT_"))}
        self._environment = {**without, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def write(self, program: Path, parameters: str, settings: list[str] | None = None, **more: str) -> None:
        command = ["${env}", "${interpreter}", "${program}", str(CONFIG), *(settings or []), "${args_no_hyphens}"]
        content = {
            "program": str(program),
            "command": str(command),
            "method": "grid",
            "metric": "{name: val/psnr, goal: maximize}",
            "parameters": parameters,
            **more,
        }
        (self._cwd / "sweep.yaml").write_text("".join(f"{key}: {value}\n" for key, value in content.items()))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "gitlight.sweep", "sweep.yaml", *arguments],
            cwd=self._cwd,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output
        return output

    def wait_for(self, process: subprocess.Popen[str], name: str) -> None:
        """Until a file is in the sweep's folder."""
        deadline = time.monotonic() + 200
        while not (self.folder / name).exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{name} never came"
            time.sleep(0.01)

    def table(self) -> list[dict[str, str]]:
        with (self.folder / "table.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study().trials]

    def study(self, url: str | None = None) -> optuna.Study:
        return load_study(open_storage(url or f"sqlite:///{self.folder / 'study.db'}", shared=False), "sweep")

    def alive(self) -> list[int]:
        """Processes of quick trials."""
        return [number for path in self.folder.glob("*/process.txt") if exists(number := int(path.read_text()))]


def exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def sweep(tmp_path):
    return Sweeping(tmp_path)


def quick(rates: list[float]) -> str:
    return f"{{optimizer.learning_rate: {{values: {rates}}}}}"


def assert_each_ran_once(sweep: Sweeping, n_trials: int, n_epochs: int) -> None:
    table = sweep.table()
    assert [(row["trial"], row["state"]) for row in table] == [(str(place), "finished") for place in range(n_trials)]
    assert sweep.states() == ["COMPLETE"] * n_trials
    assert [float(row["optimizer.learning_rate"]) for row in table] == RATES[:n_trials]
    assert [row["validations"] for row in table] == [str(n_epochs)] * n_trials
    folders = sorted(path.name for path in sweep.folder.glob("trial-*") if path.is_dir())
    assert folders == [f"trial-{place:04d}" for place in range(n_trials)]


def assert_all_gone(sweep: Sweeping) -> None:
    deadline = time.monotonic() + 5
    while sweep.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sweep.alive() == []


@pytest.mark.parametrize(("how", "n_trials"), [("SIGKILL", 8), pytest.param("SIGTERM", 5, marks=pytest.mark.slow)])
def test_a_sweep_whose_process_is_ended_runs_every_trial_once(sweep: Sweeping, how: str, n_trials: int) -> None:
    sweep.write(QUICK, quick(RATES[:n_trials]))
    process = sweep.start("--workers", "2")
    sweep.wait_for(process, "trial-0002/epochs.txt")
    assert sweep.alive()
    process.send_signal(signal.Signals[how])  # to it alone
    output, _ = process.communicate(timeout=30)
    assert_all_gone(sweep)
    if how == "SIGTERM":
        assert process.returncode == 128 + signal.SIGTERM
        assert "interrupted by SIGTERM; the same command goes on with the sweep" in output
    before = sweep.states()
    assert 0 < before.count("COMPLETE") < n_trials
    assert "RUNNING" in before

    assert "trial 2: goes on: " in sweep("--workers", "2")
    assert_each_ran_once(sweep, n_trials, n_epochs=4)
    for row in sweep.table():
        epochs = (sweep.folder / f"trial-{int(row['trial']):04d}" / "epochs.txt").read_text().split()
        assert sorted(set(epochs)) == ["1", "2", "3", "4"]
        assert len(epochs) <= 5  # the epoch of the kill at most is done twice
        assert float(row["val/psnr"]) == pytest.approx(float(row["optimizer.learning_rate"]) + 4)


def test_trials_that_fail_are_shown_and_do_not_stop_a_sweep(sweep: Sweeping) -> None:
    sweep.write(QUICK, quick([0.1, 101, 0.2]))
    output = sweep()
    assert "trial 1: failed: exit code 1; see runs/sweeps/sweep/trial-0001.log" in output
    assert "3 trials: 2 finished, 1 failed" in output
    assert [(row["state"], row["exit_code"]) for row in sweep.table()] == [
        ("finished", ""),
        ("failed", "1"),
        ("finished", ""),
    ]
    assert "this rate is too large" in (sweep.folder / "trial-0001.log").read_text()
    # It is not tried again, and the sweep is over.
    assert "starts" not in sweep()
    assert sweep.states() == ["COMPLETE", "FAIL", "COMPLETE"]


NO_ROOM = """
import pathlib, sys
folder = pathlib.Path(sys.argv[-1].removeprefix("output_dir="))
if not pathlib.Path("room").exists():
    folder.mkdir()
    print("error: last.ckpt cannot be written (No space left on device). Make room.")
    sys.exit(75)
sys.argv[0] = QUICK
exec(pathlib.Path(QUICK).read_text())
"""


def test_a_full_disk_ends_a_sweep_and_none_of_its_trials(sweep: Sweeping, tmp_path: Path) -> None:
    program = tmp_path / "no_room.py"
    program.write_text(NO_ROOM.replace("QUICK", repr(str(QUICK))))
    sweep.write(program, quick(RATES[:3]))
    output = sweep("--workers", "2", code=2)
    assert output.splitlines()[-1] in [
        f"error: trial {place} could not go on: last.ckpt cannot be written (No space left on device). Make room. "
        "After that, the same command goes on with the sweep."
        for place in (0, 1)
    ]
    assert set(sweep.states()) == {"RUNNING"}
    (tmp_path / "room").touch()
    sweep("--workers", "2")
    assert_each_ran_once(sweep, 3, n_epochs=4)


def test_a_sweep_runs_once_at_a_time_unless_its_database_is_shared(sweep: Sweeping) -> None:
    sweep.write(QUICK, quick([0.1, 60]))
    process = sweep.start("--workers", "2")
    sweep.wait_for(process, "trial-0000/epochs.txt")
    output = sweep(code=2)
    assert output.startswith("error: The sweep sweep is running already")
    assert len(output.splitlines()) == 1
    # A trial that ignores SIGTERM is killed in the end; nobody waits for that here.
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert_all_gone(sweep)


@pytest.mark.slow
def test_two_processes_share_a_database_and_one_is_killed(sweep: Sweeping) -> None:
    sweep.write(QUICK, quick(RATES[:6]))
    storage = ("--storage", f"sqlite:///{sweep.folder.parent / 'shared.db'}")
    sweep.folder.mkdir(parents=True)
    killed, other = (sweep.start(*storage) for _ in range(2))
    sweep.wait_for(other, "trial-0002/epochs.txt")
    while not any(
        trial.state == TrialState.RUNNING and trial.user_attrs.get(OWNER, {}).get("process") == killed.pid
        for trial in sweep.study(storage[1]).trials
    ):
        assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    outputs = [process.communicate(timeout=120)[0] for process in (killed, other)]
    assert other.returncode == 0, outputs
    outputs.append(sweep(*storage))
    # Six trials, and the one that was killed a second time: from its checkpoint, if it had one by then.
    taken_up = outputs[-1].count(": starts: ") + outputs[-1].count(": goes on: ")
    assert taken_up == 1
    assert sum(output.count(": starts: ") for output in outputs[:2]) == 6
    table = sweep.table()
    assert [row["state"] for row in table] == ["finished"] * 6
    assert [float(row["optimizer.learning_rate"]) for row in table] == RATES[:6]


TINY = [*SMALL, "data.n_public_images=48", "data.image_size=16", "generator.name=mlp", "generator.hidden_size=8"]


@pytest.mark.slow
def test_training_is_killed_and_goes_on_is_pruned_and_fails_in_a_sweep(sweep: Sweeping) -> None:
    parameters = "{trainer.strategy: {values: [auto, nonsense]}, optimizer.learning_rate: {values: [1.0e-4, 10.0]}}"
    early = "{type: hyperband, min_iter: 1, eta: 3}"
    settings = [*TINY, "trainer.max_epochs=6"]
    sweep.write(ROOT / "train.py", parameters, settings, early_terminate=early, run_cap="3")
    process = sweep.start()
    sweep.wait_for(process, "trial-0000/checkpoints/last.ckpt")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with FileLock(sweep.folder / ".trial-0000.lock", timeout=5):
        pass  # the run's process is gone
    assert sweep.states() == ["RUNNING"]

    output = sweep()
    assert "trial 0: goes on: " in output
    assert "3 trials: 1 finished, 1 pruned, 1 failed" in output
    table = sweep.table()
    assert [row["state"] for row in table] == ["finished", "pruned", "failed"]
    assert [row["validations"] for row in table] == ["6", "1", "0"]
    assert sweep.study().trials[2].user_attrs[REASON] == "exit code 2"
    assert "nonsense" in (sweep.folder / "trial-0002.log").read_text()
    for place in (0, 1):
        run = sweep.folder / f"trial-{place:04d}"
        with (run / "metrics.csv").open(newline="") as file:
            values = [float(row["val/psnr"]) for row in csv.DictReader(file) if row["val/psnr"]]
        assert list(sweep.study().trials[place].intermediate_values.values()) == pytest.approx(values, rel=1e-6)
        assert float(table[place]["val/psnr"]) == pytest.approx(max(values), rel=1e-6)
        assert (run / "config.yaml").is_file()
        assert (run / "checkpoints" / "last.ckpt").is_file()
