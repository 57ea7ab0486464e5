"""`faces`, embedded: the 200 small grey pictures of scikit-image's `lfw_subset`, half of them faces.

From Labeled Faces in the Wild (Huang et al. 2007): 25x25 pixels, resized to `data.image_size`.
"""

import random
from importlib.resources import as_file, files

import numpy as np
import torch
from numpy.typing import NDArray

from gitlight.config import DataConfig
from gitlight.data.decoding import convert_arrays
from gitlight.data.images import ImageSplits, InMemoryImages
from gitlight.errors import DataError

SEED = 2024
CLASS_NAMES = ("face", "not_face")
IMAGES_PER_CLASS = 100
# Positions in each class's shuffled order at which the splits begin and end: 70, 10 and 20 % of each class.
SPLITS = {"train": (0, 70), "validation": (70, 80), "test": (80, 100)}


def load(settings: DataConfig) -> ImageSplits:
    """The 200 pictures, split once and for all: 140 to train, 20 to validate, 40 to test, half of each class.

    Identifiers end with the picture's position in `lfw_subset`. Within a split the two classes alternate.

    Raises:
        DataError: the file is missing from the installed scikit-image, or damaged.
    """
    images = convert_arrays(_read_pictures(), settings.image_size, settings.channels)
    order = np.array([_shuffled(first) for first in (0, IMAGES_PER_CLASS)])
    splits = {}
    for split, (start, stop) in SPLITS.items():
        positions = torch.from_numpy(order[:, start:stop].T.reshape(-1).copy())
        identifiers = [f"faces/{split}/{position}" for position in positions.tolist()]
        splits[split] = InMemoryImages(images[positions], positions // IMAGES_PER_CLASS, identifiers)
    return ImageSplits(splits["train"], splits["validation"], splits["test"], CLASS_NAMES)


def _shuffled(first: int) -> list[int]:
    # Sorting by random() rather than shuffle(): only random() promises the same numbers in every version of Python.
    generator = random.Random(SEED)
    return sorted(range(first, first + IMAGES_PER_CLASS), key=lambda _: generator.random())


def _read_pictures() -> NDArray[np.uint8]:
    # (200, 25, 25) uint8; the file holds floats in [0, 1].
    file = files("skimage").joinpath("data", "lfw_subset.npy")
    try:
        with as_file(file) as path:
            pictures = np.load(path, allow_pickle=False)
        if pictures.shape != (len(CLASS_NAMES) * IMAGES_PER_CLASS, 25, 25):
            raise ValueError(f"200 pictures of 25x25 were expected, its shape is {pictures.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"data.name=faces: {file} cannot be read ({error}). It comes with scikit-image's wheel. "
            "Install scikit-image again: pip install --force-reinstall --no-deps scikit-image"
        ) from error
    as_bytes: NDArray[np.uint8] = np.rint(pictures * 255).clip(0, 255).astype(np.uint8)
    return as_bytes
