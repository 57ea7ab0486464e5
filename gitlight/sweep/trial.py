"""What a trial's process knows of its sweep: which trial it is, and when to end because the sweep is gone."""

import os
import signal
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STORAGE, STUDY, NUMBER = "GITLIGHT_SWEEP_STORAGE", "GITLIGHT_SWEEP_STUDY", "GITLIGHT_SWEEP_TRIAL"
"""Environment variables that a sweep sets for its trials."""

INTERRUPTED = 75
"""Exit code (sysexits' EX_TEMPFAIL) of a trial's process that a full disk, a lost database or a busy folder ended.

Its settings may be good: the sweep ends as well, and goes on with the trial later.
"""


@dataclass(frozen=True)
class SweepTrial:
    """Which trial a process is.

    Attributes:
        storage: URL of the database.
        study: the study's name in it.
        number: Optuna's number of the trial.
    """

    storage: str
    study: str
    number: int

    def environment(self) -> dict[str, str]:
        """What tells a process that it is this trial."""
        return {STORAGE: self.storage, STUDY: self.study, NUMBER: str(self.number)}


def trial_from_environment(environment: Mapping[str, str] = os.environ) -> SweepTrial | None:
    """The trial that this process is, or None."""
    if NUMBER not in environment:
        return None
    return SweepTrial(environment[STORAGE], environment[STUDY], int(environment[NUMBER]))


def agent_run_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where a run that ``wandb agent`` starts goes, unless it is told; None for other runs.

    >>> agent_run_folder({"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"}).as_posix()
    'runs/sweeps/s1/r1'
    """
    sweep, run = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
    return Path("runs") / "sweeps" / sweep / run if sweep and run else None


def end_with_the_sweep() -> None:
    """In a trial's process: end it, and what it started, as soon as the sweep's process is gone, however it ended.

    The sweep holds the other end of the standard input, and never writes. A signal on the parent's death would do for
    Linux alone, and for the first process of several alone. Asked again, it does nothing; nor where the input is no
    pipe, as in processes that Python's multiprocessing started.
    """
    if trial_from_environment() is None or _watch.is_set() or not _is_pipe(0):
        return
    _watch.set()
    threading.Thread(target=_wait_for_the_end, name="end_with_the_sweep", daemon=True).start()


_watch = threading.Event()
"""Whether the process watches already."""


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False  # it was closed


def _wait_for_the_end() -> None:
    while os.read(0, 1024):
        pass
    # Trials are started in process groups of their own.
    os.killpg(os.getpgrp(), signal.SIGKILL)
