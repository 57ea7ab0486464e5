import itertools
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import io

from gitlight.config import DataConfig
from gitlight.data import SOURCES, photos
from gitlight.data.images import ImageSplits
from gitlight.errors import DataError

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def splits() -> ImageSplits:
    return photos.load(DataConfig())


@pytest.fixture(scope="module")
def strips() -> dict[str, dict[str, Image.Image]]:
    return {photograph.name: photos.open_strips(photograph) for photograph in photos.PHOTOGRAPHS}


def test_the_splits_have_the_documented_sizes_and_bytes(splits):
    for split, count in (("train", 8000), ("validation", 256), ("test", 1000)):
        images = getattr(splits, split)
        assert len(images) == len(images.identifiers) == count
        assert images.in_memory
        assert images.labels.dtype == torch.int64
        pixels = images.read(range(count))
        assert pixels.shape == (count, 3, 32, 32)
        assert pixels.dtype == torch.uint8


def test_every_photograph_gives_as_many_images_even_at_the_start_of_a_split(splits):
    assert len(splits.class_names) == 8
    for split in SPLITS:
        labels = getattr(splits, split).labels
        assert labels.bincount().tolist() == [len(labels) // 8] * 8
        assert labels[:24].bincount().tolist() == [3] * 8


def test_identifiers_are_unique(splits):
    identifiers = [name for split in SPLITS for name in getattr(splits, split).identifiers]
    assert len(set(identifiers)) == len(identifiers)
    assert splits.test.identifiers[17] == "photos/test/17"


def test_loading_again_gives_the_same_bytes(splits):
    again = photos.load(DataConfig(batch_size=7))
    for split in SPLITS:
        images = getattr(splits, split)
        assert torch.equal(images.read(range(len(images))), getattr(again, split).read(range(len(images))))


@pytest.mark.parametrize("photograph", photos.PHOTOGRAPHS, ids=lambda photograph: photograph.name)
@pytest.mark.parametrize("size", [(512, 512), (451, 300), (37, 1000)])
def test_the_strips_of_a_photograph_are_disjoint_and_cover_it(photograph, size):
    regions = photos.regions(photograph, size)
    assert set(regions) == set(SPLITS)
    covered = np.zeros(size, dtype=int)
    for box in regions.values():
        covered[box.left : box.right, box.top : box.bottom] += 1
    assert (covered == 1).all()


def test_a_strip_holds_the_pixels_of_its_region_and_no_others(strips):
    # Small photographs' strips are not shrunk, so that they can be compared pixel by pixel.
    chelsea = next(photograph for photograph in photos.PHOTOGRAPHS if photograph.name == "chelsea")
    pixels = io.imread(str(files("skimage").joinpath("data", chelsea.file)))
    for split, box in photos.regions(chelsea, (pixels.shape[1], pixels.shape[0])).items():
        assert np.array_equal(np.asarray(strips["chelsea"][split]), pixels[box.top : box.bottom, box.left : box.right])


def test_crops_lie_inside_their_strip_at_several_scales(strips):
    for name, split in itertools.product(strips, SPLITS):
        strip = strips[name][split]
        boxes = photos.draw_boxes(strip, 200, 32, seed="a test")
        sides = [box.right - box.left for box in boxes]
        assert all(box.bottom - box.top == side for box, side in zip(boxes, sides, strict=True))
        assert min(box.left for box in boxes) >= 0
        assert min(box.top for box in boxes) >= 0
        assert max(box.right for box in boxes) <= strip.width
        assert max(box.bottom for box in boxes) <= strip.height
        assert min(sides) >= 32
        if split != "validation":
            assert max(sides) > 3 * min(sides)


def test_crops_show_something(splits):
    grey = splits.train.read(range(8000)).float().mean(dim=1).flatten(1)
    assert (grey.std(dim=1) < 3).float().mean() < 0.002


def test_drawing_ends_on_a_picture_without_contrast():
    boxes = photos.draw_boxes(Image.new("RGB", (60, 40)), 10, 32, seed="a test")
    assert len(boxes) == 10


def test_blank_parts_are_avoided():
    picture = Image.new("RGB", (400, 100))
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    picture.paste(Image.fromarray(noise), (0, 0))
    for box in photos.draw_boxes(picture, 100, 32, seed="a test"):
        assert np.asarray(picture.crop(box).convert("L")).std() >= photos.MINIMUM_CONTRAST


@pytest.mark.parametrize(("image_size", "channels"), [(8, 1), (48, 3)])
def test_image_size_and_channels_are_respected(monkeypatch, image_size, channels):
    monkeypatch.setattr(photos, "CROPS_PER_PHOTOGRAPH", {"train": 3, "validation": 2, "test": 2})
    splits = photos.load(DataConfig(image_size=image_size, channels=channels))
    assert splits.train.read([0, 5]).shape == (2, channels, image_size, image_size)
    assert splits.test.read([15]).shape == (1, channels, image_size, image_size)


def test_images_larger_than_a_strip_are_enlarged(monkeypatch):
    monkeypatch.setattr(photos, "CROPS_PER_PHOTOGRAPH", {"train": 2, "validation": 1, "test": 1})
    assert photos.load(DataConfig(image_size=256)).train.read([3]).shape == (1, 3, 256, 256)


def test_a_missing_photograph_is_named_with_the_remedy(monkeypatch):
    gone = photos.Photograph("gone", "gone.png", 0, {"train": (0, 0.5), "validation": (0.5, 0.6), "test": (0.6, 1)})
    monkeypatch.setattr(photos, "PHOTOGRAPHS", (gone,))
    with pytest.raises(DataError, match=r"gone\.png cannot be read .* Install scikit-image again"):
        photos.load(DataConfig())


def test_the_stereo_mate_of_the_motorcycle_is_not_used():
    assert "motorcycle_right.png" not in [photograph.file for photograph in photos.PHOTOGRAPHS]


def test_naming_the_sources_does_not_import_torch():
    code = "import sys, gitlight.data; assert 'torch' not in sys.modules; print(gitlight.data.SOURCES.names())"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "photos" in listed.stdout


def test_photos_is_registered():
    assert SOURCES["photos"].load() is photos.load
