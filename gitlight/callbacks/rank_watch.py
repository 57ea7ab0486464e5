"""`RankWatch`: ends a run on several processes, and says so, when one of them is lost."""

import os
import signal
import sys
import threading
import time
from subprocess import Popen

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from gitlight.stop_signals import STOP_SIGNALS

POLL_SECONDS = 0.2
GRACE_SECONDS = 15.0
"""How long the main thread has to notice a loss by itself, and to end in order."""
_TO_LEARN_WHICH = 2.0

_IN_ORDER = (0, *(128 + number for number in STOP_SIGNALS))
_ADVICE = "The run ends, as the others cannot go on without it; trainer.resume=auto continues from the last checkpoint."


class RankWatch(Callback):
    """Looks after the processes that Lightning started on this machine: the first after the others, they after it.

    Gloo fails as soon as a peer is gone; NCCL waits for many minutes. Where the main thread still waits some seconds
    after a loss, the process is ended from here. Ranks that torchrun or SLURM started are ended by these.
    """

    def __init__(self) -> None:
        self._first_rank = 0
        self._world_size = 1
        self._children: list[Popen[bytes]] = []
        self._parent: int | None = None
        self._over = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to look, when all ranks have found each other."""
        self._first_rank, self._world_size = trainer.global_rank - trainer.local_rank, trainer.world_size
        launcher = trainer.strategy.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return
        if launcher.procs:
            self._children = launcher.procs
            _end_lightnings_watch()
        elif isinstance(launcher.cluster_environment, LightningEnvironment) and trainer.local_rank > 0:
            self._parent = os.getppid()
        else:
            return
        threading.Thread(target=self._watch, name="rank_watch", daemon=True).start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The main thread ends by itself."""
        self._over.set()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run is over."""
        self._over.set()

    def explain(self, error: Exception) -> str:
        """What to tell of an error in communication with other ranks; nothing of any other error."""
        if self._world_size == 1 or not _of_communication(error):
            return ""
        deadline = time.monotonic() + _TO_LEARN_WHICH
        while not (lost := self._lost()) and (self._children or self._parent) and time.monotonic() < deadline:
            time.sleep(0.05)
        return f"{lost or 'another rank was lost (' + str(error).splitlines()[0] + ')'}. {_ADVICE}"

    def _lost(self) -> str:
        """Which rank is gone and how, where that can be told; else nothing."""
        if self._parent is not None and os.getppid() != self._parent:
            return f"rank {self._first_rank} (process {self._parent}) is gone"
        for rank, child in enumerate(self._children, start=self._first_rank + 1):
            code = child.poll()
            if code is not None and code not in _IN_ORDER:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"rank {rank} (process {child.pid}) {how}"
        return ""

    def _watch(self) -> None:
        while not (lost := self._lost()):
            if self._over.wait(POLL_SECONDS):
                return
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
    """Lightning's own watch kills all processes without a word, also those that end in order after a signal."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
