"""`StopSignals`: SIGTERM, Ctrl-C and SLURM's warning SIGUSR1, as a wish that a run looks at when it can stop."""

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Never, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """While it listens, remembers the signals instead of letting them end the process; a second Ctrl-C ends it.

    As a context manager it gives the signals their former meaning at the end. Where Ctrl-C has another meaning than
    Python's, as in jobs in the background, which ignore it, it keeps that.

    Attributes:
        received: the number of the latest one, 0 if none came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._former: dict[int, Any] = {}
        self._announces = False

    def __enter__(self) -> Self:
        """Until `listen`, a warning ends the process with 1: without a checkpoint, it is not to be taken for a stop."""
        if threading.current_thread() is threading.main_thread():
            self._former = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, _nothing_to_save)}
            if _interrupts():
                self._former[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
        return self

    def listen(self, announce: bool = True) -> None:
        """Begin. Only the main thread of a process can; elsewhere signals keep their meaning.

        Args:
            announce: whether to say at a Ctrl-C that the run is about to stop; for one of several processes.
        """
        self._announces = announce
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGINT or number in self._former:
                    self._former.setdefault(number, signal.signal(number, self._remember))

    def __exit__(self, kind: object, exception: BaseException | None, traceback: object) -> None:
        """Give the signals the meaning that they had before.

        Raises:
            KeyboardInterrupt: a Ctrl-C came before `listen`.
        """
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
        if isinstance(exception, _Interrupted):
            raise KeyboardInterrupt from None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            # The system's own handler also ends a process that hangs in a library.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._announces:
                # Not printed: the signal may have come in the middle of that.
                os.write(2, b"\nSIGINT: stopping with a checkpoint after this step; another ends the run at once.\n")


class _Interrupted(BaseException):
    """For a KeyboardInterrupt, which Lightning would turn into an exit with code 1."""


def _interrupt(number: int, frame: FrameType | None) -> Never:
    raise _Interrupted


def _interrupts() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    print(
        f"error: {signal.Signals(number).name} came before the first step, and there is nothing to save. Give the job "
        "more time than its closed-form fits take.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def ignore_stop_signals() -> None:
    """For a process that is about to end because of one: another is not to change its exit code; but Ctrl-C ends it."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        if _interrupts():
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def heed_the_parent_alone(worker: int = 0) -> None:
    """For processes that read images: a signal to the whole group must reach the run, not take its images away.

    SIGTERM still ends them when their parent sends it, which is how it gets rid of them.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_the_parent_says, name="heed_the_parent", daemon=True).start()


def _end_when_the_parent_says() -> None:
    parent = multiprocessing.parent_process()  # under forkserver, not the process that forked this one
    assert parent is not None, "the run's own process does not read images"
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        pass
    os._exit(0)
