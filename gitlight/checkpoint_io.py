"""Checkpoints that survive being killed while they are written, and that are read without running code in them."""

import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from gitlight.disk import cannot_write, sync_folder
from gitlight.errors import CheckpointError, UnwrittenError, first_line
from gitlight.runs import LAST, former_checkpoints, previous_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads tensors and plain values only.

    Lightning's own writer collects the file in the system's temporary folder and moves it, which is a copy, and so can
    be cut short, wherever that folder is on another file system.

    Args:
        keep_last: how many of the latest checkpoints to keep: where ``last.ckpt`` is replaced, the one before becomes
            ``last-1.ckpt``, and so on; those beyond, which a run may have from when it kept more, are deleted.
        last_is_good: whether the ``last.ckpt`` that is there already is worth keeping. It is not if a run continues
            from another one, as it may be damaged, and must not push out one that can be read.
    """

    def __init__(self, keep_last: int = 1, last_is_good: bool = True) -> None:
        super().__init__()
        self._keep_last = keep_last
        self._last_is_good = last_is_good

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``: at any moment the file there is the old one or the new one, whole.

        Args:
            checkpoint: what ``torch.save`` accepts.
            path: a local path; missing folders are made.
            storage_options: part of Lightning's signature; not used.

        Raises:
            UnwrittenError: the file cannot be written, as on a full disk; those that were there are as they were.
        """
        target = Path(path)
        follows_good = target.name == LAST and self._last_is_good
        # A fixed name: what a killed run leaves behind is overwritten by the next save, not added to.
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if follows_good:
                self._keep_former(target)
            os.replace(partial, target)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            _former_of(target).unlink(missing_ok=True)
            if _of_writing(error):
                raise UnwrittenError(self._cannot_write(target, error)) from error
            raise
        self._last_is_good |= target.name == LAST
        sync_folder(target.parent)
        if follows_good:
            self._delete_old(target)

    def _delete_old(self, last: Path) -> None:
        for number, path in former_checkpoints(last).items():
            if number >= self._keep_last:
                with suppress(OSError):  # no reason to stop a run
                    path.unlink()

    def _keep_former(self, last: Path) -> None:
        """Move former checkpoints on by one, without a moment in which ``last.ckpt`` is not there."""
        if not last.exists() or self._keep_last < 2:
            return
        linked = _former_of(last)
        linked.unlink(missing_ok=True)
        try:
            os.link(last, linked)
        except OSError:  # a file system without hard links
            shutil.copyfile(last, linked)  # may find the disk full: before any file has moved
        for number in range(self._keep_last - 1, 1, -1):
            if (newer := previous_path(last, number - 1)).exists():
                os.replace(newer, previous_path(last, number))
        os.replace(linked, previous_path(last, 1))

    def _cannot_write(self, target: Path, error: BaseException) -> str:
        last = target.with_name(LAST)
        if last.is_file() and self._last_is_good:
            advice = (
                "Those written before are as they were. Make room, and trainer.resume=last goes on; or give another "
                f"output_dir and trainer.resume={last}."
            )
        else:
            advice = (
                f"This run has written no {LAST} yet to go on from. Make room, or give another output_dir, and start "
                "it as before."
            )
        return f"The checkpoint {cannot_write(target, error)}. {advice}"

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint: tensors and plain values, never code.

        Args:
            path: a local path.
            map_location: where tensors go, as in ``torch.load``; on the CPU unless given.
            weights_only: part of Lightning's signature; always on.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: there is no such file, it is damaged, or it holds more than tensors and plain values.
        """
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"There is no checkpoint {path}.") from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"The checkpoint {path} is damaged, or holds more than tensors and plain values, and is not read: "
                f"{first_line(error)}"
            ) from error
        except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint {path} cannot be read; it may be damaged: {first_line(error)}"
            ) from error
        if not isinstance(checkpoint, dict):
            raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint.")
        return checkpoint


def _former_of(last: Path) -> Path:
    """A second name of ``last.ckpt`` while others move on."""
    return last.with_name(f".{last.name}.former")


def _of_writing(error: BaseException) -> bool:
    """On a full disk `torch.save` raises an OSError, or its writer a RuntimeError, as does a GPU that fails."""
    of_the_writer = any(name in str(error) for name in ("inline_container", "PytorchStreamWriter"))
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and of_the_writer)
