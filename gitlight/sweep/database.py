"""A sweep's database when it fails: a full disk under it, or a server that is gone, in words."""

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from gitlight.disk import FULL
from gitlight.errors import DatabaseError, first_line


@contextmanager
def naming_database(url: str) -> Iterator[None]:
    """Errors of reading and writing a database become those of the project.

    Args:
        url: SQLAlchemy's.

    Raises:
        OSError: the disk of an SQLite file is full; the file is named, as in errors of any other file.
        DatabaseError: anything else keeps the database from working.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        if full := full_disk(url, error):
            raise full from error
        raise DatabaseError(
            f"The sweep's database {shown_url(url)} failed: {first_line(_cause(error)).rstrip('.')}. Once it works "
            "again, the same command goes on with the sweep."
        ) from error


def full_disk(url: str, error: BaseException) -> OSError | None:
    """What the system says of an SQLite file that cannot grow; None where that is not what is wrong.

    SQLite itself tells a full disk alone, not a quota or the largest size of a file, from a broken one.
    """
    cause = _cause(error)
    if not isinstance(cause, sqlite3.Error):
        return None
    file = Path(make_url(url).database or "")
    kind = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # without the finer distinctions
    if kind == sqlite3.SQLITE_FULL:
        number: int | None = errno.ENOSPC
    elif kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        number = _why_no_growth(file)
    else:
        number = None
    return None if number not in FULL else OSError(number, os.strerror(number or 0), str(file))


def _why_no_growth(file: Path) -> int | None:
    import resource  # Unix has it, and sweeps need Unix

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    page = 4096
    if limit != resource.RLIM_INFINITY and file.is_file() and file.stat().st_size + page > limit:
        return errno.EFBIG
    try:
        with tempfile.TemporaryFile(dir=file.parent) as beside:
            beside.write(bytes(page))
            beside.flush()
            os.fsync(beside.fileno())
    except OSError as error:
        return error.errno
    return None


def url_of_file(file: Path) -> str:
    """SQLAlchemy's URL of an SQLite file, whose path may have signs that mean something in a URL."""
    return URL.create("sqlite", database=str(file.absolute())).render_as_string()


def shown_url(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return repr(url)


def _cause(error: BaseException) -> BaseException:
    """The driver's own error, which Optuna and SQLAlchemy wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
