import subprocess
import sys
from pathlib import Path

import pytest
from limits import largest_file
from sweep_files import write_sweep

from gitlight.sweep.command import sweep_command


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program whose trials end before they train, in the folder that the sweep is run from."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "nothing.py"
    program.write_text("")
    return program


def test_help_loads_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, runpy; sys.argv = ['sweep', '--help']\n"
        "try:\n    runpy.run_module('gitlight.sweep', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'optuna'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m gitlight.sweep" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: expected a sweep file."),
        (["nowhere.yaml"], "error: nowhere.yaml: no such sweep file."),
        (["my_sweep.yaml"], "error: --trials: how many? method: random has no end. Give --trials 20, or run_cap: 20"),
        (["my_sweep.yaml", "--trials", "0"], "error: --trials: 0: expected 1 or more."),
        (["my_sweep.yaml", "--trials", "many"], "error: argument --trials: invalid int value: 'many'."),
        (["my_sweep.yaml", "--workers", "-1"], "error: --workers: -1: expected 1 or more."),
        (["my_sweep.yaml", "--trails", "3"], "error: unrecognized arguments: --trails 3."),
        (["my_sweep.yaml", "--trials", "1", "--storage", "x"], "error: --storage: 'x' cannot be opened: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path)
    assert sweep_command(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


def test_a_changed_file_is_one_line_and_exit_code_2(
    nothing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep_command([str(write_sweep(tmp_path, program=str(nothing))), "--trials", "1"]) == 1
    assert "trial 0: failed: ended before its training did" in capsys.readouterr().out
    changed = write_sweep(tmp_path, program=str(nothing), parameters="{generator.blocks: {values: [1, 2]}}")
    assert sweep_command([str(changed), "--trials", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {changed.name}" if not changed.is_absolute() else f"error: {changed}")
    assert "parameters.generator.blocks: none then" in error
    assert len(error.splitlines()) == 1


def test_a_grid_has_as_many_trials_as_combinations_and_not_more(
    nothing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_sweep(tmp_path, program=str(nothing), method="grid"))
    assert sweep_command([file, "--trials", "1"]) == 1
    assert "1 trial: 1 failed" in capsys.readouterr().out
    assert sweep_command([file, "--trials", "9"]) == 1
    assert "2 trials: 2 failed" in capsys.readouterr().out


def test_a_database_that_cannot_grow_ends_a_sweep_with_one_line(
    nothing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The database keeps all choices with every trial: more than a page.
    choices = ", ".join(f"{letter}{'x' * 2000}" for letter in "abc")
    parameters = f"{{logging.project: {{values: [{choices}]}}}}"
    file = str(write_sweep(tmp_path, program=str(nothing), method="grid", parameters=parameters))
    assert sweep_command([file, "--trials", "1"]) == 1
    database = tmp_path / "runs" / "sweeps" / "my_sweep" / "study.db"
    capsys.readouterr()
    with largest_file(database.stat().st_size):
        assert sweep_command([file, "--workers", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {database} cannot be written (File too large); ")
    assert error.endswith("Make room; the same command goes on with the sweep.\n")
    assert len(error.splitlines()) == 1
    assert sweep_command([file]) == 1
    assert "3 trials: 3 failed" in capsys.readouterr().out
