"""``metrics.csv``: the numbers of a run, whatever becomes of it."""

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from gitlight.disk import sync_folder, writing


class CSVFileLogger(Logger):
    """One row for each set of metrics that Lightning logs, written at once; columns ``epoch``, ``step``, metrics.

    ``step`` counts optimiser steps from 0, as Lightning does. Lightning's own CSVLogger deletes the file of the run
    that it continues. Rows survive a kill at once, and a loss of power from the next checkpoint on, which syncs them.

    Args:
        path: the file; rank 0 writes it, from the first row on.
        resume_step: number of steps done when training goes on: rows of these steps are kept, later ones, which
            will be logged again, are dropped; ``None`` starts an empty file.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        super().__init__()
        self.path = Path(path)
        self._resume_step = resume_step
        self._columns: list[str] = []
        self._started = False

    @property
    def name(self) -> str:
        """Lightning names folders after it; here the run's folder is given."""
        return ""

    @property
    def version(self) -> str:
        """See `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: settings are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write one row.

        Args:
            metrics: name → number.
            step: optimiser steps before the one that the numbers belong to.
        """
        with writing(self.path):
            self._write(metrics, step)

    @rank_zero_only
    def sync(self) -> None:
        """Have the system write the rows so far to the disk, so that a loss of power does not take them."""
        if self._started:
            with writing(self.path), self.path.open("a") as file:
                os.fsync(file.fileno())

    def _write(self, metrics: Mapping[str, Any], step: int | None) -> None:
        if not self._started:
            self._start()
        row = {name: float(value) for name, value in metrics.items()}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        if step is not None:
            row["step"] = step
        if new := [name for name in row if name not in self._columns]:
            self._rewrite([*self._columns, *new], read_rows(self.path))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, str]] = []
        if self._resume_step is not None:
            kept = [row for row in read_rows(self.path) if row.get("step") and int(row["step"]) < self._resume_step]
        columns = dict.fromkeys(["epoch", "step", *(name for row in kept for name in row)])
        self._rewrite(list(columns), kept)
        self._started = True

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        # Synced and renamed into place, so that being killed here, or a loss of power, loses nothing.
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        sync_folder(self.path.parent)
        self._columns = columns


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of such a file, by column; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text()
    # A killed run may leave half a row; its numbers would be wrong.
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
