"""Runs a sweep's trials: each a process of its own, several at a time, every one exactly once."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from gitlight.runs import checkpoint_path
from gitlight.sweep.specification import Specification
from gitlight.sweep.study import (
    FINISHED,
    HEARTBEAT_SECONDS,
    OWNER,
    PLACE,
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
from gitlight.sweep.trial import SweepTrial

GRACE_SECONDS = 10.0
"""What trials have to end by themselves when their sweep is interrupted."""


_NOT_STARTED = 127
"""A shell's exit code for a command that is not there."""


class Interrupted(Exception):
    """The sweep was told to end by a signal; it can be continued."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


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
        self._starting = threading.Lock()  # of processes
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._stopping = False
        self._interrupted: list[FrozenTrial] = []

    def run(self, workers: int) -> None:
        """Run trials until the sweep has all.

        Raises:
            Interrupted: SIGINT or SIGTERM came; all trials' processes are gone.
        """
        with FileLock(self._folder / ".taking_over.lock"):
            self._interrupted = self._take_over()
        environment = _environment(workers)
        with _signals_as_exceptions(), ThreadPoolExecutor(workers) as pool:
            try:
                waiting = {pool.submit(self._work, environment) for _ in range(workers)}
                beat = time.monotonic()
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5)
                    for future in done:
                        future.result()
                    if self._shared and time.monotonic() - beat > HEARTBEAT_SECONDS:
                        beat = time.monotonic()
                        self._send_heartbeats()
            finally:
                # Nothing runs any more at the end of a sweep.
                self._end_processes()

    def _work(self, environment: dict[str, str]) -> None:
        while not self._stopping:
            with self._choosing:
                job = self._next()
            if job is None:
                return
            exit_code = self._run_trial(job, environment)
            if exit_code is None or self._stopping:
                return  # it stays a running trial, which the sweep takes up again when it goes on
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
        retries = any(trial.state == TrialState.WAITING for trial in trials)
        if not retries and len(originals(trials)) >= self._n_trials:
            return None
        return self._job(self._study.ask().number, again=retries)

    def _job(self, number: int, again: bool) -> _Job | None:
        identity = trial_id(self._study, self._storage, number)
        place = place_of(number, self._study.get_trials(deepcopy=False))
        if place >= self._n_trials:
            # Two machines asked for the last trial at once.
            self._storage.set_trial_user_attr(identity, SURPLUS, True)
            fail(self._study, self._storage, number, "one more than the sweep has", exit_code=None)
            return None
        self._storage.set_trial_user_attr(identity, PLACE, place)
        self._storage.set_trial_user_attr(identity, OWNER, _this_process())
        if self._shared:
            self._storage.record_heartbeat(identity)
        self._study.sampler = make_sampler(self._specification, place)
        values = suggest(trial_of(self._study, self._storage, number), self._specification)
        return _Job(number, place, values, again)

    def _run_trial(self, job: _Job, environment: dict[str, str]) -> int | None:
        """Its exit code; None if the sweep ends before it could start."""
        folder = self._folder / f"trial-{job.place:04d}"
        command = [*self._specification.expand_command(job.values), f"output_dir={folder}"]
        goes_on = job.again and checkpoint_path(folder, "last").is_file()
        if goes_on:
            command.append("trainer.resume=last")
        elif job.again and folder.exists():
            shutil.rmtree(folder)  # killed in its first epoch; there is nothing to go on from
        trial = SweepTrial(self._url, self._study.study_name, job.number)
        with self._starting:
            if self._stopping:
                return None
            print(f"trial {job.place}: {'goes on' if goes_on else 'starts'}: {_shown(job.values)}", flush=True)
            with log_path(self._folder, job.place).open("ab") as log:
                try:
                    process = subprocess.Popen(
                        command,
                        env={**environment, **trial.environment()},
                        stdin=subprocess.PIPE,  # see gitlight.sweep.trial.end_with_the_sweep
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        process_group=0,
                    )
                except OSError as error:
                    log.write(f"{command[0]} cannot be started: {error}\n".encode())
                    return _NOT_STARTED
            self._processes[job.number] = process
        exit_code = process.wait()
        assert process.stdin is not None
        process.stdin.close()  # ends what it may have left behind
        with self._starting:
            del self._processes[job.number]
        return exit_code

    @property
    def _url(self) -> str:
        return str(self._storage.url)

    def _say_end(self, place: int, trial: FrozenTrial) -> None:
        metric = self._specification.metric
        best = best_value(trial, self._specification.goal)
        found = f"best {metric} {best:.6g} in {len(trial.intermediate_values)} validations" if best is not None else ""
        if trial.state == TrialState.FAIL:
            found = f"{trial.user_attrs['reason']}; see {log_path(self._folder, place)}"
        print(f"trial {place}: {state_name(trial)}: {found}", flush=True)

    def _take_over(self) -> list[FrozenTrial]:
        """The trials that a process which is gone left running; from now on they are this one's."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # A database of this sweep's own has no other users, as one process at a time may run it.
        gone = [
            trial
            for trial in running
            if (not self._shared or _is_gone(trial.user_attrs.get(OWNER)))
            and place_of(trial.number, self._study.get_trials(deepcopy=False)) < self._n_trials
        ]
        for trial in gone:
            identity = trial_id(self._study, self._storage, trial.number)
            self._storage.set_trial_user_attr(identity, OWNER, _this_process())
            if self._shared:
                self._storage.record_heartbeat(identity)
        return gone

    def _send_heartbeats(self) -> None:
        with self._starting:
            numbers = [*self._processes, *(trial.number for trial in self._interrupted)]
        for number in numbers:
            self._storage.record_heartbeat(trial_id(self._study, self._storage, number))

    def _end_processes(self) -> None:
        self._stopping = True
        with self._starting:
            processes = list(self._processes.values())
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            deadline = time.monotonic() + GRACE_SECONDS
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.05)


def log_path(folder: Path, place: int) -> Path:
    """Where the output of a trial's process goes."""
    return folder / f"trial-{place:04d}.log"


def state_name(trial: FrozenTrial) -> str:
    """A trial's state in a word."""
    return {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}.get(trial.state, trial.state.name.lower())


def _shown(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _environment(workers: int) -> dict[str, str]:
    """Of a trial's process: its share of the processor, unless the number of threads is set."""
    environment = dict(os.environ)
    if workers > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    return environment


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid()}


def _is_gone(owner: dict[str, Any] | None) -> bool:
    """Whether a trial's process was on this machine, and is no more. Of others, heartbeats tell."""
    if owner is None or owner["host"] != socket.gethostname() or owner["process"] == os.getpid():
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # another user's, alive
    return False


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` in the main thread, once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # what follows takes seconds, and must not be cut short
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
