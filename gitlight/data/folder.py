"""`folder`: any tree of images with one folder for each class.

    ROOT/train/CLASS/*         public images
    ROOT/validation/CLASS/*    optional; may be called val
    ROOT/test/CLASS/*          private images

The images may have any size and any format that Pillow reads; `gitlight.data.decoding` says how they are converted.
Labels count the class names of all splits together, in alphabetical order, so that a split need not hold every class:
the private images may well be of classes that no public image shows. Hidden files and files without an image's suffix
(such as notes.txt) are passed over; a file with one that cannot be decoded is an error.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from gitlight.config import DataConfig
from gitlight.data.decoding import IMAGE_SUFFIXES, ImageFiles, decode_all, unreadable
from gitlight.data.images import ImageSplits, LabelledImages
from gitlight.errors import DataError

LAYOUT = "Expected ROOT/train/CLASS/* and ROOT/test/CLASS/*, ROOT being data.root"


def load(settings: DataConfig) -> ImageSplits:
    """The image folder at `data.root`.

    Images are decoded at once where all splits together, decoded, fit into `data.memory_limit_gb` (1 GB = 1e9 bytes);
    otherwise each is decoded whenever it is read.

    Raises:
        DataError: the tree is not as described at the head of this file, or an image is empty or damaged; the message
            names the folder or the file.
    """
    root = existing_root(settings)
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise DataError(
                f"data.root: {root} has no folder '{split}'. {LAYOUT}. {_describe(root)}{_nested_root(root)}"
            )
    present = [name for name in ("validation", "val") if (root / name).is_dir()]
    if len(present) > 1:
        raise DataError(f"data.root: {root} has both a folder 'validation' and a folder 'val'. Keep one of the two.")
    folders = {"train": "train", "test": "test"}
    if present:
        folders["validation"] = present[0]
    listed, class_names = list_splits(root, folders, settings)
    n_images = sum(len(split) for split in listed.values())
    fits = n_images * settings.channels * settings.image_size**2 <= settings.memory_limit_gb * 1e9
    splits: dict[str, LabelledImages] = {name: decode_all(files) if fits else files for name, files in listed.items()}
    return ImageSplits(splits["train"], splits.get("validation"), splits["test"], class_names)


def existing_root(settings: DataConfig, expected: str = LAYOUT) -> Path:
    """`data.root` as a path, a leading ~ replaced by the home folder.

    Args:
        settings: names the source and its root.
        expected: what has to be in the root and where to get it, for the message.

    Raises:
        DataError: it is not given, or not a folder.
    """
    if settings.root is None:
        raise DataError(
            f"data.root: not given. data.name={settings.name} needs a folder: add data.root=ROOT. {expected}."
        )
    root = Path(settings.root).expanduser()
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else f"does not exist (looked from {Path.cwd()})"
        raise DataError(f"data.root: {root} {problem}. Give an existing folder. {expected}.")
    return root


def list_splits(
    root: Path, folders: Mapping[str, str], settings: DataConfig
) -> tuple[dict[str, ImageFiles], tuple[str, ...]]:
    """The images below ``root``, not yet decoded.

    Args:
        root: the folder that holds the splits' folders.
        folders: split → name of its folder.
        settings: image size and channels.

    Returns:
        Split → its images, in alphabetical order of their paths; and the class names, of all splits together.

    Raises:
        DataError: a split has no class folders, a class no images, or an image file is empty.
    """
    classes = {split: _list_classes(root / folder) for split, folder in folders.items()}
    class_names = tuple(sorted(set().union(*classes.values())))
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    splits = {}
    for split, files_of in classes.items():
        pairs = [(class_name, file) for class_name, files in files_of.items() for file in files]
        labels = torch.tensor([label_of[class_name] for class_name, _ in pairs], dtype=torch.int64)
        identifiers = [f"{folders[split]}/{class_name}/{file}" for class_name, file in pairs]
        splits[split] = ImageFiles(root, identifiers, labels, settings.image_size, settings.channels)
    return splits, class_names


def _list_classes(folder: Path) -> dict[str, list[str]]:
    try:
        class_folders = [entry for entry in _entries(folder) if entry.is_dir()]
        if not class_folders:
            raise DataError(
                f"data.root: {folder} has no class folders. {LAYOUT}: one folder for each class, also where there is "
                f"only one class. {_describe(folder)}"
            )
        return {entry.name: _list_images(Path(entry.path)) for entry in class_folders}
    except OSError as error:
        raise DataError(f"data.root: {folder} cannot be listed: {error}. Make it readable to this user.") from error


def _list_images(folder: Path) -> list[str]:
    names = []
    for entry in _entries(folder):
        if not entry.name.lower().endswith(IMAGE_SUFFIXES) or not entry.is_file():
            continue
        # A copy that was cut off often leaves empty files. Seen here, they cost no hour of training.
        if entry.stat().st_size == 0:
            raise unreadable(Path(entry.path), "the file is empty (0 bytes)")
        names.append(entry.name)
    if not names:
        raise DataError(
            f"data.root: the class folder {folder} holds no images. Expected files ending in "
            f"{', '.join(IMAGE_SUFFIXES)} directly inside it. {_describe(folder)} Add images, or delete the folder."
        )
    return names


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    # What is not hidden, in alphabetical order: that of the file system differs between machines.
    return sorted(
        (entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name
    )


def _describe(folder: Path) -> str:
    names = [entry.name + "/" * entry.is_dir() for entry in _entries(folder)]
    if not names:
        return "It is empty."
    return f"It holds {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}."


def _nested_root(root: Path) -> str:
    # Archives often unpack into a folder of their own, one level further down.
    for entry in _entries(root):
        if Path(entry, "train").is_dir() and Path(entry, "test").is_dir():
            return f" Did you mean data.root={entry.path}?"
    return ""
