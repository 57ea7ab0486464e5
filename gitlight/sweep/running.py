"""Runs a sweep's trials: several at a time, every one exactly once, whatever interrupts it."""

import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from gitlight.errors import ConfigError, GitlightError
from gitlight.run_lock import PATIENCE_SECONDS, is_being_written
from gitlight.sweep.devices import VISIBLE, gpus_of_trial, visible_gpus
from gitlight.sweep.processes import STOPPED, TrialProcesses, signals_as_exceptions, trial_environment
from gitlight.sweep.settings import trial_config
from gitlight.sweep.specification import Specification
from gitlight.sweep.study import (
    FINISHED,
    GIVEN_UP,
    HEARTBEAT_SECONDS,
    OWNER,
    PLACE,
    REASON,
    SURPLUS,
    best_value,
    conclude,
    fail,
    make_sampler,
    originals,
    place_of,
    suggest,
    trial_id,
    trial_of,
)
from gitlight.sweep.trial import INTERRUPTED, SweepTrial

STOP_SECONDS = 2.0
"""How much later than a trial the sweep may be told to end, for the trial to count as ended with it."""


class SurroundingsError(GitlightError):
    """A trial could not write to its disk, database or folder, through no fault of its own; nor might the next one."""


@dataclass(frozen=True)
class _Job:
    number: int
    place: int
    values: dict[str, Any]
    again: bool
    """Whether it was begun before."""


class Runner:
    """Runs what is missing of a sweep.

    Args:
        specification: the sweep.
        study: its study.
        storage: the study's database.
        folder: where trials' folders and logs go.
        n_trials: how many the sweep has in all.
        shared: whether other processes, here or elsewhere, may work on the same study.
    """

    def __init__(
        self,
        specification: Specification,
        study: optuna.Study,
        storage: RDBStorage,
        folder: Path,
        n_trials: int,
        shared: bool,
    ) -> None:
        self._specification = specification
        self._study = study
        self._storage = storage
        self._folder = folder
        self._n_trials = n_trials
        self._shared = shared
        self._choosing = threading.Lock()  # of the next trial, and all use of the study
        self._processes = TrialProcesses()
        self._interrupted: list[FrozenTrial] = []
        self._gpus: list[str] = []
        self._workers = 1

    def run(self, workers: int) -> None:
        """Run trials until the sweep has all.

        All trials' processes are gone when it ends, however it ends.

        Raises:
            SweepInterruptedError: SIGINT or SIGTERM came.
            SurroundingsError: a trial says that its disk is full, or its database lost.
            OSError, SQLAlchemyError, StorageInternalError: the same befell the sweep.
        """
        with FileLock(self._folder / ".taking_over.lock"):
            self._interrupted = self._take_over()
        environment = trial_environment(workers)
        self._workers = workers
        if workers > 1:
            self._gpus = visible_gpus()
        with signals_as_exceptions(), ThreadPoolExecutor(workers) as pool:
            try:
                waiting = {pool.submit(self._work, environment, worker) for worker in range(workers)}
                beat = time.monotonic()
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5)
                    for future in done:
                        future.result()
                    if self._shared and time.monotonic() - beat > HEARTBEAT_SECONDS:
                        beat = time.monotonic()
                        self._send_heartbeats()
            finally:
                # At the end of a sweep nothing runs any more.
                self._processes.end_all()

    def _work(self, environment: dict[str, str], worker: int = 0) -> None:
        while not self._processes.ended:
            with self._choosing:
                job = self._next()
            if job is None:
                return
            exit_code = self._run_trial(job, environment, worker)
            if exit_code in STOPPED:
                # Whoever ends everything here sends the signal to all processes, and the trial may be the first to go.
                self._processes.wait_for_end(STOP_SECONDS)
            if exit_code is None or self._processes.ended:
                return  # it stays a running trial, which the sweep takes up again when it goes on
            if exit_code == INTERRUPTED:
                log = log_path(self._folder, job.place)
                raise SurroundingsError(
                    f"trial {job.place} could not go on: {_last_error(log)} After that, the same command goes on with "
                    "the sweep."
                )
            with self._choosing:
                ended = conclude(self._study, self._storage, job.number, self._specification.metric, exit_code)
            self._say_end(job.place, ended)

    def _next(self) -> _Job | None:
        while self._interrupted:
            trial = self._interrupted.pop(0)
            if FINISHED in trial.user_attrs:
                # Killed after its training had ended, before that was written down.
                conclude(self._study, self._storage, trial.number, self._specification.metric, exit_code=0)
                continue
            return self._job(trial.number, again=True)
        if self._shared:
            fail_stale_trials(self._study)
        trials = self._study.get_trials(deepcopy=False)
        retry = any(trial.state == TrialState.WAITING for trial in trials)
        if not retry and len(originals(trials)) >= self._n_trials:
            return None
        return self._job(self._study.ask().number, again=retry)

    def _job(self, number: int, again: bool) -> _Job | None:
        identity = trial_id(self._study, self._storage, number)
        place = place_of(number, self._study.get_trials(deepcopy=False))
        if place >= self._n_trials:
            # Two machines asked for the last trial at once.
            self._storage.set_trial_user_attr(identity, SURPLUS, True)
            fail(self._study, self._storage, number, "one more than the sweep has", exit_code=None)
            return None
        self._storage.set_trial_user_attr(identity, PLACE, place)
        self._own(identity)
        self._study.sampler = make_sampler(self._specification, place)
        values = suggest(trial_of(self._study, self._storage, number), self._specification)
        return _Job(number, place, values, again)

    def _run_trial(self, job: _Job, environment: dict[str, str], worker: int) -> int | None:
        """Its exit code; None if the sweep ended before it could start."""
        folder = self._folder / f"trial-{job.place:04d}"
        command = [*self._specification.expand_command(job.values), f"output_dir={folder}"]
        if job.again:
            self._wait_for_former(job.place, folder)
        goes_on = job.again and (folder / "checkpoints" / "last.ckpt").is_file()
        if goes_on:
            command.append("trainer.resume=last")
        elif job.again and folder.exists():
            shutil.rmtree(folder)  # killed in its first epoch; there is nothing to go on from
        environment = {
            **environment,
            **SweepTrial(str(self._storage.url), self._study.study_name, job.number).environment(),
        }
        gpus = ",".join(self._own_gpus(job, worker))
        if gpus:
            environment[VISIBLE] = gpus
        where = f" on GPU {gpus}" if gpus else ""
        shown = " ".join(f"{name}={value}" for name, value in job.values.items())
        print(f"trial {job.place}: {'goes on' if goes_on else 'starts'}{where}: {shown}", flush=True)
        return self._processes.run(job.number, command, environment, log_path(self._folder, job.place))

    def _own_gpus(self, job: _Job, worker: int) -> list[str]:
        """Those that the trial is confined to; empty: to none in particular."""
        if not self._gpus:
            return []
        try:
            settings = trial_config(self._specification, job.values).trainer
        except ConfigError:  # the file has changed; the trial's own process says so
            return []
        return gpus_of_trial(self._gpus, worker, self._workers, settings)

    def _wait_for_former(self, place: int, folder: Path) -> None:
        """Until no process writes the trial's folder: one that outlived its sweep does, or another machine's.

        Raises:
            SurroundingsError: there still is one.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while is_being_written(folder) and not self._processes.ended:
            if time.monotonic() > deadline:
                raise SurroundingsError(
                    f"trial {place} could not go on: another process is still writing {folder}, perhaps one of the "
                    "sweep before, or of another machine. End it, or wait; the same command goes on with the sweep."
                )
            self._processes.wait_for_end(0.2)

    def _say_end(self, place: int, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL:
            found = f"{trial.user_attrs.get(REASON, GIVEN_UP)}; see {log_path(self._folder, place)}"
        else:
            best = best_value(trial, self._specification.goal)
            found = f"best {self._specification.metric} {best:.6g} in {len(trial.intermediate_values)} validations"
        print(f"trial {place}: {state_name(trial)}: {found}", flush=True)

    def _take_over(self) -> list[FrozenTrial]:
        """The trials that a process which is gone left running; from now on they are this one's."""
        trials = self._study.get_trials(deepcopy=False)
        # A database of this sweep's own has no other users, as one process at a time may run it.
        gone = [
            trial
            for trial in trials
            if trial.state == TrialState.RUNNING
            and (not self._shared or _is_gone(trial))
            and place_of(trial.number, trials) < self._n_trials
        ]
        for trial in gone:
            self._own(trial_id(self._study, self._storage, trial.number))
        return gone

    def _own(self, identity: int) -> None:
        owner = {"host": socket.gethostname(), "process": os.getpid()}
        self._storage.set_trial_user_attr(identity, OWNER, owner)
        if self._shared:
            self._storage.record_heartbeat(identity)

    def _send_heartbeats(self) -> None:
        for number in [*self._processes.running(), *(trial.number for trial in self._interrupted)]:
            self._storage.record_heartbeat(trial_id(self._study, self._storage, number))


def log_path(folder: Path, place: int) -> Path:
    """Where the output of a trial's process goes."""
    return folder / f"trial-{place:04d}.log"


def _last_error(log: Path) -> str:
    """What a trial said in the end, if its log had room for it."""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else f"its disk is full, or its database lost; see {log}."


def state_name(trial: FrozenTrial) -> str:
    """A trial's state in a word."""
    return {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}.get(trial.state, trial.state.name.lower())


def _is_gone(trial: FrozenTrial) -> bool:
    """Whether a trial's sweep was on this machine, and is no more. Of other machines' heartbeats tell."""
    owner = trial.user_attrs.get(OWNER)
    if owner is None:
        # It asked for the trial, and was killed before it could say who it is, or send a heartbeat.
        started = trial.datetime_start or datetime.now()
        return datetime.now() - started > timedelta(seconds=4 * HEARTBEAT_SECONDS)
    if owner["host"] != socket.gethostname() or owner["process"] == os.getpid():
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, and alive
    return False
