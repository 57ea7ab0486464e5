"""Run folders: where they are, what a new run does with an old one, and which checkpoint a run resumes from."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import rank_zero_only

from gitlight.config import Config
from gitlight.config_loading import save_config
from gitlight.disk import check_writable, writing
from gitlight.errors import BusyFolderError, CheckpointError, ConfigError, first_line
from gitlight.run_lock import PATIENCE_SECONDS, lock_path
from gitlight.sweep.trial import trial_from_environment

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
FORMAT = "gitlight_format"
VERSION = 4
"""Of a checkpoint's format; raised when a run cannot go on from checkpoints of before."""
WANDB_ID = "wandb_run_id"
_WORDS = "last, previous, best, auto, or the path of a checkpoint"


def checkpoint_path(run_folder: Path, which: str) -> Path:
    """Where a run keeps its ``last`` or ``best`` checkpoint."""
    return run_folder / CHECKPOINTS / f"{which}.ckpt"


def available_checkpoint(run_folder: Path, which: str) -> str:
    """``which`` checkpoint of another run to take: its ``last`` where no validation has chosen a ``best`` one."""
    chosen = checkpoint_path(run_folder, which)
    if chosen.is_file() or not checkpoint_path(run_folder, "last").is_file():
        return which
    log.warning("%s has no %s, as it ended before a validation: its %s is taken", run_folder, chosen.name, LAST)
    return "last"


def previous_path(last: Path, number: int) -> Path:
    """Where the checkpoint is that was ``last.ckpt`` so many checkpoints ago, from 1."""
    return last.with_name(f"{last.stem}-{number}{last.suffix}")


def former_checkpoints(last: Path) -> dict[int, Path]:
    """Those before ``last.ckpt`` that there are, by how many checkpoints ago they were it; the newest first."""
    found = ((re.fullmatch(rf"{last.stem}-(\d+){last.suffix}", path.name), path) for path in last.parent.glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that ``trainer.resume`` names, or None for a fresh run.

    Raises:
        CheckpointError: it does not exist; or none before the last can be read, for ``previous``.
    """
    named = config.trainer.resume
    if named is None:
        return None
    last = run_folder(config) / CHECKPOINTS / LAST
    if named == "previous":
        return _previous(last)
    if named == "auto" and not last.is_file():
        return None
    path = checkpoint_path(run_folder(config), named) if named in ("last", "best") else Path(named).expanduser()
    path = last if named == "auto" else path
    if path.is_dir():
        raise CheckpointError(
            f"trainer.resume: {named} is a folder. Give {_WORDS}: of a run in it, {checkpoint_path(path, 'last')}."
        )
    if not path.is_file():
        raise CheckpointError(
            f"trainer.resume: {named}: {path} does not exist. Give {_WORDS}; leave trainer.resume out to start "
            f"afresh.{previous_hint(path)}"
        )
    return path


def _previous(last: Path) -> Path:
    """The newest checkpoint before the last that can be read."""
    for path in former_checkpoints(last).values():
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s", error)
        else:
            return path
    raise CheckpointError(
        f"trainer.resume: previous: {last.parent} has no checkpoint before {last.name} that can be read, such as "
        f"{previous_path(last, 1).name}. trainer.keep_last says how many are kept. Give {_WORDS}."
    )


def previous_hint(path: Path) -> str:
    """A sentence on what to do without a run's last checkpoint, where there is one before it; else nothing."""
    former = previous_path(path, 1)
    if path.name != LAST or not former.is_file():
        return ""
    return f" trainer.resume=previous goes on from the checkpoint before it, {former.name}."


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents on the CPU; only tensors and plain values are ever unpickled.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint.
    """
    try:
        with ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise BadZipFile(f"the checksum of {damaged} is not the one written")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint; it is damaged or not one: {first_line(error)}"
        ) from error
    if not isinstance(content, dict) or not _are_weights(content.get("state_dict")):
        raise CheckpointError(
            f"{path} is not a checkpoint of a run: it has no state_dict, which maps names to weights."
        )
    return content


def _are_weights(state: Any) -> bool:
    return isinstance(state, dict) and all(
        isinstance(name, str) and (isinstance(value, torch.Tensor) or name.endswith("_extra_state"))
        for name, value in state.items()
    )


def run_folder(config: Config) -> Path:
    """The folder that a config's run writes.

    Raises:
        ConfigError: it is in the home of a user that there is not.
    """
    assert config.output_dir is not None, "load_config sets it"
    try:
        return Path(config.output_dir).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"output_dir: {config.output_dir}: {first_line(error)} Give the path without ~, or ./~ for such a name."
        ) from error


@rank_zero_only
def check_run_folder(config: Config) -> None:
    """Find out whether the run's folder can be written, before anything is computed.

    Raises:
        ConfigError: it cannot.
    """
    folder = run_folder(config)
    for place in (folder, folder.resolve().parent):  # beside it is its lock, and a former run goes there
        check_writable("output_dir", place)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs from the folder while this one writes it; ends with the process, however that ends.

    A trial of a sweep waits a minute for it: it may continue one whose process is about to end.

    Raises:
        BusyFolderError: another run is writing it.
        ConfigError: it cannot be locked.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    path = lock_path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0 if trial_from_environment() is None else PATIENCE_SECONDS)
        lock.acquire()
    except Timeout as error:
        raise BusyFolderError(
            f"output_dir: another run is writing {folder}; choose another folder, or wait."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be locked ({error.strerror}: {path}); choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


@rank_zero_only
def prepare_run_folder(config: Config, resume: Path | None) -> None:
    """Create the folder, moving a run that is there aside, and write ``config.yaml``.

    Raises:
        ConfigError: the folder holds files that are not a run's, or a run that cannot be moved.
    """
    folder = run_folder(config)
    folder = folder.resolve() if folder.is_symlink() else folder  # what a link leads to is moved, and the link stays
    is_run = (folder / "config.yaml").is_file()
    if folder.exists() and not is_run and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output_dir: {folder} exists and is not a run's folder; choose another, or empty it.")
    continues = resume is not None and resume.resolve().is_relative_to(folder.resolve())
    if is_run and not continues:
        if Path.cwd().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"output_dir: {folder} holds a run, which is not moved aside while it is the current folder. Continue "
                "it with trainer.resume=last, or start from another folder."
            )
        number = 1
        while (former := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(former)
        log.warning("%s held a run; it is now %s", folder, former)
    with writing(folder):
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    # Run again, the saved config repeats the run; a continued one from its beginning, not from its own checkpoint.
    repeatable = replace(config.trainer, resume=None if continues or resume is None else config.trainer.resume)
    save_config(replace(config, trainer=repeatable), folder / "config.yaml")
