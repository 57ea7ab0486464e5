import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gitlight.disk import cannot_write, writing


def test_a_file_is_named_where_an_error_does_not() -> None:
    with pytest.raises(OSError, match=r"device: 'metrics\.csv'") as raised, writing(Path("metrics.csv")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == "metrics.csv"
    with pytest.raises(OSError, match="'other'"), writing(Path("metrics.csv")):
        raise OSError(errno.ENOENT, "No such file or directory", "other")


def test_the_reason_and_the_room_that_is_left_are_said(tmp_path: Path) -> None:
    error = OSError(errno.EFBIG, "File too large")
    assert cannot_write(tmp_path / "x", error).startswith(f"{tmp_path / 'x'} cannot be written (File too large); ")
    assert cannot_write(tmp_path / "x", error).endswith(" GB are free there")
    assert cannot_write(tmp_path / "gone" / "x", error).endswith("; its folder is not there")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full on this system")
def test_a_process_whose_output_is_on_a_full_disk_keeps_its_exit_code() -> None:
    code = (
        "import sys; from gitlight.disk import say_last; sys.stdout.write('x'); say_last('error: full'); sys.exit(75)"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full, env=environment, check=False)
    assert ended.returncode == 75
