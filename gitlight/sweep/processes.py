"""The processes of a sweep's trials: started, waited for, and never left behind."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from gitlight.stop_signals import STOP_SIGNALS

GRACE_SECONDS = 10.0
"""What trials have to end by themselves when their sweep is interrupted."""

STOPPED = tuple(code for number in STOP_SIGNALS for code in (128 + number, -number))
"""Exit codes of processes that a signal asked to stop, with or without a checkpoint."""

NOT_STARTED = 127
"""A shell's exit code for a command that is not there."""


class SweepInterruptedError(Exception):
    """The sweep was told to end by a signal; it can be continued."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class TrialProcesses:
    """At most one process for each trial, each in a process group of its own. Used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ended = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether `end_all` was called: nothing is started any more."""
        return self._ended.is_set()

    def wait_for_end(self, seconds: float) -> None:
        """Wait for `end_all`, so long at most."""
        self._ended.wait(seconds)

    def running(self) -> list[int]:
        """Numbers of the trials whose processes run."""
        with self._lock:
            return list(self._running)

    def run(self, number: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int | None:
        """Run a trial's command to its end.

        Args:
            number: the trial's.
            command: the program and its arguments.
            environment: the process's.
            log: the file that its output is appended to.

        Returns:
            Its exit code; None if `end_all` was called before it could start.
        """
        with self._lock, log.open("ab") as output:
            if self.ended:
                return None
            try:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,  # see gitlight.sweep.trial.end_with_the_sweep
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
            except OSError as error:
                output.write(f"{command[0]} cannot be started: {error}\n".encode())
                return NOT_STARTED
            self._running[number] = process
        exit_code = process.wait()
        assert process.stdin is not None
        process.stdin.close()  # ends what it may have left behind
        with self._lock:
            del self._running[number]
        return exit_code

    def end_all(self) -> None:
        """End all processes, at first by a signal that lets them finish what they write; start no more."""
        with self._lock:
            self._ended.set()
            processes = list(self._running.values())
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            deadline = time.monotonic() + GRACE_SECONDS
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.05)


def trial_environment(workers: int) -> dict[str, str]:
    """A trial's share of the processor, unless the number of threads is set."""
    environment = dict(os.environ)
    if workers > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    return environment


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGINT and SIGTERM raise `SweepInterruptedError` in the main thread, once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # what follows takes seconds, and must not be cut short
        raise SweepInterruptedError(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
