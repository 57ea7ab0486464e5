"""`StopSignals`: SIGTERM, and SLURM's warning SIGUSR1, as a wish that a run looks at when it can stop."""

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While it listens, remembers the signals instead of letting them end the process.

    As a context manager it gives the signals their former meaning at the end.

    Attributes:
        received: the number of the latest one, 0 if none came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Until `listen`, a warning ends the process with 1: without a checkpoint, it is not to be taken for a stop."""
        if threading.current_thread() is threading.main_thread():
            self._former = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, _nothing_to_save)}
        return self

    def listen(self) -> None:
        """Begin. Only the main thread of a process can; elsewhere signals keep their meaning."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._former.setdefault(number, signal.signal(number, self._remember))

    def __exit__(self, *exception: object) -> None:
        """Give the signals the meaning that they had before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    print(
        f"error: {signal.Signals(number).name} came before the first step, and there is nothing to save. Give the job "
        "more time than its closed-form fits take.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def ignore_stop_signals() -> None:
    """For a process that is about to end because of one: another is not to change its exit code."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def heed_the_parent_alone(worker: int = 0) -> None:
    """For processes that read images: a signal to the whole group must reach the run, not take its images away.

    SIGTERM still ends them when their parent sends it, which is how it gets rid of them.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_the_parent_says, name="heed_the_parent", daemon=True).start()


def _end_when_the_parent_says() -> None:
    parent = multiprocessing.parent_process()  # under forkserver, not the process that forked this one
    assert parent is not None, "the run's own process does not read images"
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        pass
    os._exit(0)
