"""From image files to bytes of one size: the conversion that every image source shares.

An image of any format that Pillow reads becomes ``(channels, image_size, image_size)`` uint8 in these steps:

1. it is turned upright as its EXIF orientation says; of an animation, the first frame counts;
2. transparent pixels are laid over white; palettes become colours; 16-bit grey keeps its upper 8 bits;
3. colour becomes grey by ITU-R 601 luma (``channels=1``), or grey is repeated to red, green and blue (``channels=3``);
4. the central square, as wide as the shorter side, is resized with an antialiased bicubic filter
   (the same as resizing the shorter side and then cropping the centre). An image that fits already is not touched.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gitlight.data.images import InMemoryImages
from gitlight.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Decoding large files gains from threads. Small files keep Python's interpreter lock busy, so that threads only get in
# each other's way: 12,000 32x32 JPEGs take half as long again with two threads as with one.
SMALL_FILE_BYTES = 16_000
FILES_PER_TASK = 32


def unreadable(path: Path, reason: object) -> DataError:
    """The error for one image file that cannot be decoded, naming the file and the remedy."""
    return DataError(
        f"{path} cannot be read as an image: {reason}. Expected a whole image file "
        f"({', '.join(IMAGE_SUFFIXES)}). Replace the file by an intact copy, or delete it."
    )


def convert_image(image: Image.Image, image_size: int, channels: int) -> NDArray[np.uint8]:
    """An image of any size and mode as bytes, by the steps at the head of this file.

    Args:
        image: the picture; it may be turned upright in place.
        image_size: height and width of the result, in pixels.
        channels: 3 for colour, 1 for grey.

    Returns:
        ``(channels, image_size, image_size)`` uint8.

    Raises:
        ValueError: the pixels are floating-point or 32-bit numbers, whose black and white are not known.

    >>> convert_image(Image.new("L", (40, 60), 7), image_size=8, channels=3).shape
    (3, 8, 8)
    """
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    pixels = np.asarray(image, dtype=np.uint8).reshape(image_size, image_size, channels)
    return pixels.transpose(2, 0, 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    # Pillow opens 16-bit grey PNGs as "I;16" or, in older versions, as "I", and clips both when it converts them.
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"its pixels are {kind} numbers, and 8 or 16 bits were expected")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def decode_file(path: Path, image_size: int, channels: int) -> NDArray[np.uint8]:
    """One image file as ``(channels, image_size, image_size)`` uint8.

    Raises:
        DataError: the file is missing, empty, damaged, cut short, or not an image; the message names it.
    """
    try:
        with Image.open(path) as image:
            # JPEGs far larger than needed are decoded at a half, a quarter or an eighth of their size, never below
            # twice the size asked for, so that the antialiased resize still decides what the result looks like.
            image.draft(None, (2 * image_size, 2 * image_size))
            return convert_image(image, image_size, channels)
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise unreadable(path, "the file is empty (0 bytes)" if empty else "its format is not known") from None
    except Exception as error:
        # Damaged files make Pillow's decoders raise almost anything: OSError, SyntaxError, struct.error, ValueError.
        raise unreadable(path, error) from error


def convert_arrays(arrays: NDArray[np.uint8], image_size: int, channels: int) -> Tensor:
    """Decoded images of one size, converted as files are.

    Args:
        arrays: ``(n, height, width)`` grey or ``(n, height, width, 3)`` colour, uint8.
        image_size: height and width of the result, in pixels.
        channels: 3 for colour, 1 for grey.

    Returns:
        ``(n, channels, image_size, image_size)`` uint8.
    """
    images = np.empty((len(arrays), channels, image_size, image_size), dtype=np.uint8)
    for position, pixels in enumerate(arrays):
        images[position] = convert_image(Image.fromarray(pixels), image_size, channels)
    return torch.from_numpy(images)


@dataclass(frozen=True)
class ImageFiles:
    """A split left in its files, each decoded whenever it is read.

    Attributes:
        root: the folder that ``identifiers`` are relative to.
        identifiers: one path per image, below ``root``, with forward slashes.
        labels: ``(n,)`` int64.
        image_size: height and width of the decoded images, in pixels.
        channels: 3 for colour, 1 for grey.
    """

    root: Path
    identifiers: Sequence[str]
    labels: Tensor
    image_size: int
    channels: int
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``: ``(len(indices), C, H, W)`` uint8.

        Raises:
            DataError: a file cannot be read; the message names it.
        """
        images = np.empty((len(indices), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for position, index in enumerate(indices):
            images[position] = decode_file(self.root / self.identifiers[index], self.image_size, self.channels)
        return torch.from_numpy(images)


def decode_all(files: ImageFiles) -> InMemoryImages:
    """The same split, decoded at once; in a thread pool where the files are large.

    Raises:
        DataError: a file cannot be read; the message names the first such file.
    """
    sample = [Path(files.root, name).stat().st_size for name in files.identifiers[:: 1 + len(files) // 100]]
    small = sum(sample) < SMALL_FILE_BYTES * len(sample)
    blocks = [range(len(files))[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    with ThreadPoolExecutor(max_workers=1 if small else os.cpu_count()) as pool:
        images = torch.cat(list(pool.map(files.read, blocks)))
    return InMemoryImages(images, files.labels, files.identifiers)
