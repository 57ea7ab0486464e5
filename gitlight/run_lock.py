"""Whether a process is writing a run's folder (`gitlight.runs.run_lock`); without torch, as sweeps ask, too."""

from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE_SECONDS = 60.0
"""How long a sweep and its trials wait for a folder that another process has: one of their own may be about to end."""


def lock_path(folder: Path) -> Path:
    """The file beside a run's folder that is locked while the run is written; one, whatever the folder is called."""
    real = folder.resolve()
    return real.parent / f".{real.name}.lock"


def is_being_written(folder: Path) -> bool:
    """Whether another process has the folder now; False where a lock cannot be made, which the run itself will say."""
    try:
        with FileLock(lock_path(folder), timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False
