"""What an interrupted evaluation has finished: kept on disk, so that going on repeats nothing."""

import os
from pathlib import Path
from typing import Any

import torch

from gitlight.disk import writing
from gitlight.errors import CheckpointError


class Finished:
    """Parts of one evaluation, each a file that is there whole or not at all."""

    def __init__(self, folder: Path, key: str) -> None:
        """Args: where evaluations keep their parts; what tells this evaluation from any other."""
        self._folder = folder / key

    def parts(self) -> list[dict[str, Any]]:
        """All parts that are there.

        Raises:
            CheckpointError: one cannot be read.
        """
        found = []
        for path in sorted(self._folder.glob("*.pt")):
            try:
                found.append(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:  # torch.load raises many kinds for a damaged file
                raise CheckpointError(
                    f"{path}, a part of an interrupted evaluation, cannot be read: {error}. Delete it; its images are "
                    "then attacked again."
                ) from error
        return found

    def add(self, first: int, part: dict[str, Any]) -> None:
        """Keep a part: tensors, numbers, text and lists of them; ``first`` is the number of its first leak."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{first:08d}.{os.getpid()}.partial"
        # To an open file: given its name, torch's writer does not say that the disk is full.
        with writing(partial), partial.open("wb") as file:
            torch.save(part, file)
        partial.replace(self._folder / f"{first:08d}.pt")

    def remove(self) -> None:
        """Forget them: the evaluation is complete."""
        for path in self._folder.glob("*.pt"):
            path.unlink()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
