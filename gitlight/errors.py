"""Errors that are the user's to mend: the command lines print them as one message, without a traceback."""

import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FEW = 3
"""Names and problems that a message has room for."""


class GitlightError(Exception):
    """A mistake in what the user gave; its message says what, where, what was expected and what to do."""


class ConfigError(GitlightError):
    """A setting is unknown, of the wrong type, or has a value that is not allowed."""


class BusyFolderError(ConfigError):
    """Another process is writing the run's folder; it may be free later."""


class DataError(GitlightError):
    """Images are missing, unreadable, or do not fit the settings."""


class ArchitectureError(GitlightError):
    """A leaked model contains an operation that the chosen generator cannot handle."""


class CheckpointError(GitlightError):
    """A checkpoint or a run folder is missing, damaged, or belongs to another set-up."""


class UnwrittenError(CheckpointError):
    """A checkpoint cannot be written, as on a full disk; those that were there are as they were."""


class DatabaseError(GitlightError):
    """A sweep's database cannot be read or written."""


class LostRankError(Exception):
    """A process of a run on several was lost, so that the others cannot go on; not the user's mistake."""


class RunStopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked a run to stop; it wrote a checkpoint first.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int, checkpoint: Path, step: int) -> None:
        self.signal_number = signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f"{name}: stopped at step {step}; {checkpoint} continues from there (trainer.resume=last).")

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal ends: 143 for SIGTERM, 138 for SIGUSR1 on Linux."""
        return 128 + self.signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of our own; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def misfit(error: RuntimeError) -> str:
    """What `load_state_dict` found not to fit, in a line: of many names and problems, the first and how many more."""
    problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [first_line(error)]
    shown = [_shortened(problem) for problem in problems[:_FEW]]
    return " ".join(shown) + (f" (and {len(problems) - _FEW} more)" if len(problems) > _FEW else "")


def _shortened(problem: str) -> str:
    names = re.findall(r'"[^"]+"', problem)
    if len(names) <= _FEW:
        return problem
    return f"{problem.partition(names[0])[0]}{', '.join(names[:_FEW])} and {len(names) - _FEW} more."


def differences(former: Mapping[str, Any], now: Mapping[str, Any], where: str) -> str:
    """Which settings have changed, for messages; empty if none.

    Args:
        former: by name.
        now: the same, perhaps with others.
        where: what to call the former's place or time.

    >>> differences({"seed": 0, "task": "leaked"}, {"seed": 1, "task": "leaked", "new": 2}, "then")
    'seed: 0 then, 1 now; new: none then, 2 now'
    """
    keys = [*former, *(key for key in now if key not in former)]
    return "; ".join(
        f"{key}: {former.get(key, 'none')} {where}, {now.get(key, 'none')} now"
        for key in keys
        if former.get(key) != now.get(key)
    )
