"""How many labels an image source has, found without reading an image."""

import os
from pathlib import Path
from typing import NamedTuple

from gitlight.config import DataConfig

_DEFAULT = 10
_FIXED = {"cifar10": 10, "cifar100": 100, "mnist": 10, "fashion_mnist": 10, "celeba": 2, "imagenet": 1000}


class ClassCount(NamedTuple):
    """A number of labels, and whether it was assumed because the source's folder is not there."""

    n_classes: int
    assumed: bool


def count_classes(settings: DataConfig) -> ClassCount:
    """The number of labels of the source that ``data.name`` names; 10 where only missing files could tell.

    >>> count_classes(DataConfig(name="cifar100"))
    ClassCount(n_classes=100, assumed=False)
    >>> count_classes(DataConfig(name="folder"))
    ClassCount(n_classes=10, assumed=True)
    """
    if settings.name == "photos":
        from gitlight.data.photos import PHOTOGRAPHS

        return ClassCount(len(PHOTOGRAPHS), assumed=False)
    if settings.name == "faces":
        from gitlight.data.faces import CLASS_NAMES

        return ClassCount(len(CLASS_NAMES), assumed=False)
    if settings.name in ("folder", "imagenet") and settings.root is not None:
        names = _class_folders(Path(settings.root).expanduser())
        if names:
            return ClassCount(len(names), assumed=False)
    if settings.name in _FIXED:
        return ClassCount(_FIXED[settings.name], assumed=False)
    return ClassCount(_DEFAULT, assumed=True)


def _class_folders(root: Path) -> set[str]:
    """Names of the class folders of all splits together, as `gitlight.data.folder` counts them."""
    splits = [root / name for name in ("train", "validation", "val", "test")]
    return {
        entry.name
        for split in splits
        if split.is_dir()
        for entry in os.scandir(split)
        if entry.is_dir() and not entry.name.startswith(".")
    }
