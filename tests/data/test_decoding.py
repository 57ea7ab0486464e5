from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gitlight.data.decoding import convert_image, decode_file


def save(path: Path, colour: object, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Path:
    Image.new(mode, size, colour).save(path)
    return path


def central_pixel(path: Path, channels: int = 3) -> list[int]:
    return decode_file(path, 8, channels)[:, 4, 4].tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("LA", (77, 255), [77, 77, 77]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
        ("I;16", 0x4D00, [77, 77, 77]),
    ],
)
def test_modes_become_colour(tmp_path, mode, colour, expected):
    path = save(tmp_path / "0.png", colour, mode=mode)
    assert central_pixel(path) == expected


def test_colour_becomes_grey_by_itu_r_601_luma(tmp_path):
    path = save(tmp_path / "0.png", (200, 100, 50))
    assert central_pixel(path, channels=1) == [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]


def test_a_palette_is_converted_and_its_transparent_entry_is_white(tmp_path):
    image = Image.new("P", (12, 12), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    path = tmp_path / "0.png"
    image.save(path)
    assert central_pixel(path) == [10, 20, 30]
    image.save(path, transparency=1)
    assert central_pixel(path) == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["bmp", "gif", "JPEG", "jpg", "png", "ppm", "tiff", "webp"])
def test_formats(tmp_path, suffix):
    path = save(tmp_path / f"0.{suffix}", (200, 100, 50), size=(30, 20))
    assert np.abs(np.array(central_pixel(path)) - [200, 100, 50]).max() <= 8


def test_exif_orientation_is_honoured():
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))
    image.getexif()[0x0112] = 6  # stored lying on its side: to be turned a quarter clockwise
    turned = convert_image(image, 8, 1)[0]
    assert turned[:, 5:].min() == 255
    assert turned[:, :3].max() == 0


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (9, 9), (3, 5), (8, 8)])
def test_the_central_square_is_kept(size):
    width, height = size
    ramp = np.linspace(0, 255, max(size))
    grey = np.broadcast_to(ramp if width > height else ramp[:, None], (height, width)).astype(np.uint8)
    converted = convert_image(Image.fromarray(grey), 8, 1)[0]
    side, longer = min(size), max(size)
    start = (longer - side) // 2
    expected = grey[:side, start : start + side] if width > height else grey[start : start + side, :side]
    assert abs(converted.mean() - expected.mean()) < 3


def test_an_image_that_fits_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(convert_image(Image.fromarray(pixels), 8, 3), pixels.transpose(2, 0, 1))


def test_shrinking_is_antialiased():
    chequers = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(convert_image(Image.fromarray(chequers), 8, 1).astype(float) - 127.5).max() < 3


def test_a_large_jpeg_decodes_to_what_its_full_size_gives(tmp_path):
    rows, columns = np.indices((600, 800)) / 100
    grey = (127 + 60 * np.sin(rows * 3) + 60 * np.cos(columns * 2)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "0.jpg", quality=95)
    decoded = decode_file(tmp_path / "0.jpg", 32, 1).astype(int)
    assert np.abs(decoded - convert_image(Image.fromarray(grey), 32, 1)).max() <= 4
