"""Folders and files that cannot be written: found early if possible, and named with the reason and the room left."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gitlight.errors import ConfigError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of an OSError: the disk, the user's share of it, or a file is as large as it can be."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file in errors of writing it, which do not say which it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Have the system write a folder: a renamed file is durable only then. Where it cannot, that is no error."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: BaseException) -> str:
    """A sentence's beginning that says which file, why, and how much room there is."""
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e9:.3g} GB are free there"
    except OSError:
        free = "its folder is not there"
    return f"{path} cannot be written ({_reason(error)}); {free}"


def _reason(error: BaseException) -> str:
    """What the system says, also where PyTorch's writer only says that a file is shorter than it should be."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
        one = one.__context__
    return first_line(error)


def say_last(message: str) -> None:
    """Print a process's last words on standard error, also where that is a file on a full disk.

    What cannot be written is dropped: Python would end with an exit code of its own, 120, as it fails to write it.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_writable(key: str, folder: Path) -> None:
    """Find out whether a folder can be written, or made, without making it.

    Args:
        key: what names the folder, for the message.
        folder: which one.

    Raises:
        ConfigError: it cannot.
    """
    try:
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{key}: {folder} cannot be written ({reason}). Choose another folder.") from error
