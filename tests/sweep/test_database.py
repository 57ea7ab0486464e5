import errno
from pathlib import Path

import optuna
import pytest
from limits import largest_file
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from gitlight.errors import DatabaseError
from gitlight.sweep.database import naming_database, url_of_file
from gitlight.sweep.study import open_storage


def test_a_full_disk_is_named_and_nothing_before_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    url = f"sqlite:///{file}"
    study = optuna.create_study(storage=open_storage(url, shared=False), study_name="mine")
    study.set_user_attr("before", 1)
    with (
        largest_file(file.stat().st_size),
        pytest.raises(OSError, match="File too large") as raised,
        naming_database(url),
    ):
        study.set_user_attr("more", "x" * 100_000)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(file))
    with naming_database(url):
        study.set_user_attr("after", 2)
    assert study.user_attrs == {"before": 1, "after": 2}


def test_a_full_disk_is_named_where_a_database_is_made(tmp_path: Path) -> None:
    with largest_file(10_000), pytest.raises(OSError, match="File too large"):
        open_storage(f"sqlite:///{tmp_path / 'study.db'}", shared=False)


def test_a_database_that_is_gone_is_named_without_its_password() -> None:
    lost = OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly\nmore"))
    lost.__cause__ = lost.orig
    with (
        pytest.raises(
            DatabaseError,
            match=r"me:\*\*\*@host/name failed: server closed the connection unexpectedly\. Once it works",
        ),
        naming_database("postgresql://me:secret@host/name"),
    ):
        raise StorageInternalError("An exception is raised during the commit.") from lost


@pytest.mark.parametrize("name", ["{width}", "my%20sweeps", "which?", "#1", "50 %"])
def test_a_folder_may_have_signs_of_urls_in_its_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    url = url_of_file(folder / "study.db")
    storage = open_storage(url, shared=False)
    assert (folder / "study.db").is_file()
    study = optuna.create_study(storage=storage, study_name="mine")
    of_a_trial = open_storage(str(storage.url), shared=False)
    assert optuna.load_study(storage=of_a_trial, study_name="mine").study_name == study.study_name


def test_a_url_may_have_braces(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/{{width}}.db"
    assert open_storage(url, shared=False).url == url
    assert (tmp_path / "{width}.db").is_file()
