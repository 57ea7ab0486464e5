"""`RankWatch`: ends a run on several processes, and says so, when one of them is lost."""

import os
import signal
import sys
import threading
import time
from subprocess import Popen
from typing import Self

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from gitlight.errors import first_line

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""How long the main thread has to notice a loss by itself, and to end in order."""
_TO_LEARN_WHICH = 2.0
_FIRST = "GITLIGHT_FIRST_RANK_PROCESS"
"""Environment variable that tells the processes which Lightning starts who started them: it may be gone by then."""

_ADVICE = "The run ends, as the others cannot go on without it; trainer.resume=auto continues from the last checkpoint."


class RankWatch:
    """Looks after the processes that Lightning starts here: the first after the others, and they after it.

    Gloo fails as soon as a peer is gone; NCCL, and ranks that have not met yet, wait for many minutes. Where the main
    thread still waits some seconds after a loss, the process is ended from here. Ranks that torchrun or SLURM started
    are ended by these.

    Args:
        trainer: the run's, before it begins.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._first_rank, self._world_size = trainer.global_rank - trainer.local_rank, trainer.world_size
        self._parent: int | None = None
        self._launcher: _SubprocessScriptLauncher | None = None
        self._over = threading.Event()
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and isinstance(
            launcher.cluster_environment, LightningEnvironment
        ):
            if trainer.local_rank == 0:
                self._launcher = launcher
                os.environ[_FIRST] = str(os.getpid())
            elif _FIRST in os.environ:
                self._parent = int(os.environ[_FIRST])

    def __enter__(self) -> Self:
        """Begin to look."""
        if self._looks:
            threading.Thread(target=self._watch, name="rank_watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """The main thread has come to its end by itself."""
        self._over.set()

    @property
    def _looks(self) -> bool:
        return self._launcher is not None or self._parent is not None

    @property
    def _children(self) -> list[Popen[bytes]]:
        return [] if self._launcher is None else self._launcher.procs

    def explain(self, error: Exception) -> str:
        """What to tell of an error in communication with other ranks; nothing of any other error."""
        if self._world_size == 1 or not _of_communication(error):
            return ""
        deadline = time.monotonic() + _TO_LEARN_WHICH
        while not (lost := self._lost()) and self._looks and time.monotonic() < deadline:
            time.sleep(0.05)
        return f"{lost or 'another rank was lost (' + first_line(error) + ')'}. {_ADVICE}"

    def _lost(self) -> str:
        """Which rank is gone and how, where that can be told; else nothing."""
        if self._parent is not None and os.getppid() != self._parent:
            return f"rank {self._first_rank} (process {self._parent}) is gone"
        for rank, child in enumerate(self._children, start=self._first_rank + 1):
            code = child.poll()
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"rank {rank} (process {child.pid}) {how}"
        return ""

    def _watch(self) -> None:
        while not (lost := self._lost()):
            if self._over.wait(POLL_SECONDS):
                return
            _end_lightnings_watch()
        if self._over.wait(GRACE_SECONDS):
            return
        print(f"error: {lost}. {_ADVICE}", file=sys.stderr, flush=True)
        for child in self._children:
            child.kill()
        # Not an exit, which would wait for the thread that hangs.
        os._exit(1)


def _of_communication(error: Exception) -> bool:
    if torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
        return True
    # Gloo raises plain RuntimeErrors.
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _end_lightnings_watch() -> None:
    """Lightning's own watch kills all processes without a word."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
