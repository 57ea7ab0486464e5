"""What an evaluation leaves in its folder."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

from gitlight.config import Config

Load = Callable[..., Config]
"""Overrides to the config of a run of its own."""

N_PRIVATE = 40
"""Private images that are kept of the photographs."""


def folder_of(config: Config) -> Path:
    return Path(str(config.output_dir)) / "evaluation"


def entries(config: Config) -> list[dict]:
    return json.loads((folder_of(config) / "metrics.json").read_text())["results"]


def rows(config: Config) -> list[dict[str, str]]:
    with (folder_of(config) / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))
