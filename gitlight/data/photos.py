"""`photos`, the embedded default: crops of the photographs that scikit-image ships in its wheel.

Every photograph is cut into three strips, one for each split, and square crops are drawn from within each strip at
several scales. The data set is fixed: it depends on `data.image_size` and `data.channels`, not on the run's seed.
"""

import math
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gitlight.config import DataConfig
from gitlight.data.decoding import convert_image
from gitlight.data.images import ImageSplits, InMemoryImages
from gitlight.errors import DataError

SEED = 2024
CROPS_PER_PHOTOGRAPH = {"train": 1000, "validation": 32, "test": 125}

# The least standard deviation of a crop's grey values, of 255. A crop below it is black sky or the dark frame around
# the retina: its picture says nothing about the image, and any reconstruction of it scores well.
MINIMUM_CONTRAST = 8.0
# Draws for one crop before the one of most contrast is taken, so that drawing always ends.
MAXIMUM_DRAWS = 20
# Strips longer than this, in pixels, are shrunk to it: three quarters of the time to load would go to two photographs.
LONGEST_STRIP = 640
# Crops are at least this share of their region's shorter side: smaller ones show texture and no object.
SMALLEST_SCALE = 0.25


class Box(NamedTuple):
    """A rectangle in pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Photograph:
    """A photograph and how it is divided.

    Attributes:
        name: the name of the class.
        file: the file's name in scikit-image's `data` folder.
        axis: 0 where the strips are columns, side by side; 1 where they are rows, one above the other.
        strips: where each split's strip starts and ends along the axis, as shares of the photograph's length. The
            test strip is wherever the photograph's subject is, so that a person can tell what an attack recovered.
    """

    name: str
    file: str
    axis: int
    strips: Mapping[str, tuple[float, float]]


# motorcycle_right.png is left out on purpose. It is the stereo mate of motorcycle_left.png: it shows the same scene
# shifted sideways, so that the test strip of one would hold what the training strip of the other shows.
PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut.png", 1, {"test": (0, 0.42), "train": (0.42, 0.86), "validation": (0.86, 1)}),
    Photograph("chelsea", "chelsea.png", 0, {"test": (0, 0.45), "validation": (0.45, 0.6), "train": (0.6, 1)}),
    Photograph("coffee", "coffee.png", 1, {"test": (0, 0.48), "validation": (0.48, 0.62), "train": (0.62, 1)}),
    Photograph("hubble", "hubble_deep_field.jpg", 0, {"train": (0, 0.5), "validation": (0.5, 0.65), "test": (0.65, 1)}),
    Photograph("ihc", "ihc.png", 0, {"train": (0, 0.45), "validation": (0.45, 0.6), "test": (0.6, 1)}),
    Photograph(
        "motorcycle", "motorcycle_left.png", 0, {"train": (0, 0.42), "validation": (0.42, 0.55), "test": (0.55, 1)}
    ),
    Photograph("retina", "retina.jpg", 0, {"test": (0, 0.4), "validation": (0.4, 0.52), "train": (0.52, 1)}),
    Photograph("rocket", "rocket.jpg", 0, {"train": (0, 0.42), "test": (0.42, 0.78), "validation": (0.78, 1)}),
)


def load(settings: DataConfig) -> ImageSplits:
    """The photographs' crops: 8,000 to train, 256 to validate, 1,000 to test, as many of each photograph.

    In every split image ``i`` is of photograph ``i % 8``, so that any first part of a split is balanced too.

    Raises:
        DataError: a photograph is missing from the installed scikit-image, or damaged.
    """
    with ThreadPoolExecutor() as pool:
        crops = list(pool.map(lambda photograph: _crops_of(photograph, settings), PHOTOGRAPHS))
    splits = {}
    for split, count in CROPS_PER_PHOTOGRAPH.items():
        images = np.stack([of_photograph[split] for of_photograph in crops], axis=1)
        labels = torch.arange(len(PHOTOGRAPHS)).repeat(count)
        identifiers = [f"photos/{split}/{position}" for position in range(len(labels))]
        splits[split] = InMemoryImages(torch.from_numpy(images.reshape(-1, *images.shape[2:])), labels, identifiers)
    names = tuple(photograph.name for photograph in PHOTOGRAPHS)
    return ImageSplits(splits["train"], splits["validation"], splits["test"], names)


def _crops_of(photograph: Photograph, settings: DataConfig) -> dict[str, NDArray[np.uint8]]:
    crops = {}
    for split, strip in open_strips(photograph).items():
        boxes = draw_boxes(strip, CROPS_PER_PHOTOGRAPH[split], settings.image_size, f"{SEED}/{photograph.name}/{split}")
        converted = [convert_image(strip.crop(box), settings.image_size, settings.channels) for box in boxes]
        crops[split] = np.stack(converted)
    return crops


def open_strips(photograph: Photograph) -> dict[str, Image.Image]:
    """Each split's strip, in colour.

    Raises:
        DataError: the photograph is missing from the installed scikit-image, or damaged.
    """
    file = files("skimage").joinpath("data", photograph.file)
    try:
        with as_file(file) as path, Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise DataError(
            f"data.name=photos: {file} cannot be read ({error}). It is one of the photographs in scikit-image's wheel. "
            "Install scikit-image again: pip install --force-reinstall --no-deps scikit-image"
        ) from error
    strips = {}
    for split, region in regions(photograph, picture.size).items():
        # Cut out before it is resized: a resize's filter reads a few pixels beyond its box, from the next strip.
        strips[split] = picture.crop(region)
        strips[split].thumbnail((LONGEST_STRIP, LONGEST_STRIP))
    return strips


def regions(photograph: Photograph, size: tuple[int, int]) -> dict[str, Box]:
    """Each split's strip of a photograph of ``size`` (width, height): disjoint, and together the whole."""
    width, height = size
    boxes = {}
    for split, (start, end) in photograph.strips.items():
        first, last = (round(share * size[photograph.axis]) for share in (start, end))
        boxes[split] = Box(first, 0, last, height) if photograph.axis == 0 else Box(0, first, width, last)
    return boxes


def draw_boxes(strip: Image.Image, count: int, image_size: int, seed: str) -> list[Box]:
    """Random squares inside a strip.

    Sides are log-uniform, between a quarter of the strip's shorter side (or ``image_size``, if that is larger) and
    the whole shorter side; positions are uniform. A square whose contrast is below `MINIMUM_CONTRAST` is drawn again,
    `MAXIMUM_DRAWS` times at most; then the one of most contrast is taken.

    Args:
        strip: the part of a photograph to draw from.
        count: number of squares.
        image_size: height and width that the crops will be resized to, in pixels.
        seed: chooses the random numbers. Their generator, Python's own, gives the same numbers in every version.
    """
    generator = random.Random(seed)
    contrast = _contrast(strip)
    largest = min(strip.size)
    smallest = min(max(image_size, SMALLEST_SCALE * largest), largest)
    boxes = []
    for _ in range(count):
        drawn: list[tuple[float, Box]] = []
        while not drawn or (drawn[-1][0] < MINIMUM_CONTRAST and len(drawn) < MAXIMUM_DRAWS):
            side = round(smallest * (largest / smallest) ** generator.random())
            left = int(generator.random() * (strip.width - side + 1))
            top = int(generator.random() * (strip.height - side + 1))
            box = Box(left, top, left + side, top + side)
            drawn.append((contrast(box), box))
        boxes.append(max(drawn)[1])
    return boxes


def _contrast(strip: Image.Image) -> Callable[[Box], float]:
    # Standard deviation of the grey values in a box, from running sums of them and of their squares
    # (Crow 1984, summed-area tables), so that a draw costs the same however large the box is.
    grey = np.asarray(strip.convert("L"), dtype=np.int64)
    sums = np.zeros((2, strip.height + 1, strip.width + 1), dtype=np.int64)
    sums[:, 1:, 1:] = np.stack([grey, grey**2]).cumsum(axis=1).cumsum(axis=2)

    def contrast(box: Box) -> float:
        left, top, right, bottom = box
        total, squares = (
            int(table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]) for table in sums
        )
        pixels = (right - left) * (bottom - top)
        return math.sqrt(max(squares / pixels - (total / pixels) ** 2, 0.0))

    return contrast
