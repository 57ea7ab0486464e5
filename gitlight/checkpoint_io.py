"""Checkpoints that survive being killed while they are written, and that are read without running code in them."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from gitlight.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads tensors and plain values only.

    Lightning's own writer collects the file in the system's temporary folder and moves it, which is a copy, and so can
    be cut short, wherever that folder is on another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``: at any moment the file there is the old one or the new one, whole.

        Args:
            checkpoint: what ``torch.save`` accepts.
            path: a local path; missing folders are made.
            storage_options: part of Lightning's signature; not used.

        Raises:
            OSError: the file cannot be written (the old one is still there).
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A fixed name: what a killed run leaves behind is overwritten by the next save, not added to.
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

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
                f"{str(error).splitlines()[0]}"
            ) from error
        except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise CheckpointError(f"The checkpoint {path} cannot be read; it may be damaged: {error}") from error
        if not isinstance(checkpoint, dict):
            raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint.")
        return checkpoint


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is written; some file systems cannot sync a folder.
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
