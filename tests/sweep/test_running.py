import threading
from pathlib import Path

import pytest
from filelock import FileLock
from optuna.trial import TrialState
from sweep_files import write_sweep

import gitlight.sweep.running
from gitlight.run_lock import lock_path
from gitlight.sweep.running import Runner, SurroundingsError
from gitlight.sweep.specification import load_specification
from gitlight.sweep.study import open_storage, open_study


@pytest.mark.parametrize("exit_code", [143, 138, -15])
@pytest.mark.parametrize("sweep_ends", [True, False])
def test_a_trial_stopped_with_its_sweep_is_to_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, sweep_ends: bool
) -> None:
    specification = load_specification(write_sweep(tmp_path))
    storage = open_storage(f"sqlite:///{tmp_path}/study.db", shared=False)
    study = open_study(specification, storage)
    runner = Runner(specification, study, storage, tmp_path, n_trials=1, shared=False)
    monkeypatch.setattr(gitlight.sweep.running, "STOP_SECONDS", 30 if sweep_ends else 0.01)
    ends = [threading.Timer(0.1, runner._processes.end_all)] if sweep_ends else []

    def stopped(job: object, environment: object, worker: int) -> int:
        for timer in ends:
            timer.start()
        return exit_code

    monkeypatch.setattr(runner, "_run_trial", stopped)
    runner._work({})
    assert study.trials[0].state == (TrialState.RUNNING if sweep_ends else TrialState.FAIL)


def test_a_trial_whose_folder_is_still_written_is_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nothing.py"
    program.touch()
    specification = load_specification(write_sweep(tmp_path, program=str(program)))
    storage = open_storage(f"sqlite:///{tmp_path}/study.db", shared=False)
    study = open_study(specification, storage)
    former = Runner(specification, study, storage, tmp_path, n_trials=1, shared=False)
    assert former._next() is not None  # and is killed

    runner = Runner(specification, study, storage, tmp_path, n_trials=1, shared=False)
    runner._interrupted = runner._take_over()
    orphan = FileLock(lock_path(tmp_path / "trial-0000"), thread_local=False)
    orphan.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(gitlight.sweep.running, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(
            SurroundingsError, match=r"trial 0 could not go on: another process is still writing .*0000"
        ):
            runner._work({})
    assert study.trials[0].state == TrialState.RUNNING
    runner._interrupted = runner._take_over()
    threading.Timer(0.3, orphan.release).start()
    runner._work({})
    assert study.trials[0].state == TrialState.FAIL  # the program did nothing
    assert not orphan.is_locked
