"""The command line ``python -m gitlight.sweep``."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from filelock import FileLock, Timeout

from gitlight.disk import FULL, cannot_write, check_writable, say_last
from gitlight.errors import ConfigError, GitlightError

if TYPE_CHECKING:
    from gitlight.sweep.specification import Specification

USER_ERROR = 2
"""Exit code for mistakes in what the user gave."""

SWEEPS = Path("runs") / "sweeps"

USAGE = """\
usage: python -m gitlight.sweep SWEEP.yaml [--trials N] [--workers N] [--storage URL]

Run a sweep over settings, each trial a process and a run of its own, in
runs/sweeps/NAME/trial-0000 and so on; NAME is the file's. The file is in W&B's format:
`wandb sweep` and `wandb agent` run it as it is. Run again, a sweep goes on where it was
interrupted. At its end, and after an interruption: table.csv and importances.png.

  python -m gitlight.sweep configs/sweeps/lenet_hybrid.yaml --trials 20
  python -m gitlight.sweep configs/sweeps/lenet_coarse_grid.yaml --workers 2

  --trials N     trials in all, those of former calls included; by default the file's
                 run_cap, or the size of a grid
  --workers N    trials at a time (1)
  --storage URL  database of the trials, in SQLAlchemy's form, which several machines may
                 share; by default SQLite, in runs/sweeps/NAME/study.db
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. `python -m gitlight.sweep --help` says what is possible.")


def sweep_command(arguments: Sequence[str]) -> int:
    """``python -m gitlight.sweep``; returns the exit code.

    0: all trials are done; 1: all of them failed; 2: a mistake in what was given, or a full disk; 128 and the signal's
    number: a signal interrupted it.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("file")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--storage")
    try:
        if not arguments:
            raise ConfigError("expected a sweep file. `python -m gitlight.sweep --help` says what is possible.")
        options = parser.parse_args(arguments)
        for name in ("trials", "workers"):
            if (value := getattr(options, name)) is not None and value < 1:
                raise ConfigError(f"--{name}: {value}: expected 1 or more.")
        return _sweep(options.file, options.trials, options.workers, options.storage)
    except GitlightError as error:
        say_last(f"error: {error}")
        return USER_ERROR
    except OSError as error:
        if error.errno not in FULL:
            raise
        said = cannot_write(Path(error.filename or SWEEPS), error)
        say_last(f"error: {said}. Make room; the same command goes on with the sweep.")
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _sweep(file: str, trials: int | None, workers: int, storage_url: str | None) -> int:
    from optuna.trial import TrialState

    from gitlight.sweep.database import naming_database, url_of_file
    from gitlight.sweep.processes import SweepInterruptedError
    from gitlight.sweep.report import write_report
    from gitlight.sweep.running import Runner
    from gitlight.sweep.specification import load_specification
    from gitlight.sweep.study import by_place, open_storage, open_study, quieten_optuna

    quieten_optuna()
    specification = load_specification(file)
    n_trials = _number_of_trials(specification, trials)
    folder = SWEEPS / specification.name
    check_writable("sweep", folder)
    folder.mkdir(parents=True, exist_ok=True)
    url = storage_url or url_of_file(folder / "study.db")
    with _alone(folder, specification.name, shared=storage_url is not None), naming_database(url):
        storage = open_storage(url, shared=storage_url is not None)
        study = open_study(specification, storage)
        interruption = None
        try:
            Runner(specification, study, storage, folder, n_trials, shared=storage_url is not None).run(workers)
        except SweepInterruptedError as signalled:
            interruption = signalled
        print(f"\n{write_report(specification, study, folder)}", flush=True)
        states = {trial.state for trial in by_place(study.get_trials(deepcopy=False)).values()}
    if interruption is not None:
        print(f"interrupted by {interruption}; the same command goes on with the sweep", file=sys.stderr)
        return 128 + interruption.signal_number
    return 1 if states == {TrialState.FAIL} else 0


def _number_of_trials(specification: "Specification", asked: int | None) -> int:
    limits = [number for number in (asked or specification.run_cap,) if number is not None]
    if specification.method == "grid":
        limits.append(specification.grid_size())
    if not limits:
        raise ConfigError(
            f"--trials: how many? method: {specification.method} has no end. Give --trials 20, or run_cap: 20 in "
            f"{specification.file}."
        )
    return min(limits)


@contextmanager
def _alone(folder: Path, name: str, shared: bool) -> Iterator[None]:
    """Keeps a second process from the sweep, unless its database is made for several."""
    if shared:
        yield
        return
    lock = FileLock(folder / ".sweep.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ConfigError(
            f"The sweep {name} is running already: another process has {folder}. Wait for it, or give more --workers; "
            "with --storage several processes can share a sweep."
        ) from error
