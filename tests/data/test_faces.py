from importlib.resources import files

import numpy as np
import pytest
import torch

from gitlight.config import DataConfig
from gitlight.data import SOURCES, faces
from gitlight.errors import DataError

SPLITS = ("train", "validation", "test")


def test_the_splits_are_stratified():
    splits = SOURCES["faces"].load()(DataConfig(name="faces"))
    assert splits.class_names == ("face", "not_face")
    for split, per_class in (("train", 70), ("validation", 10), ("test", 20)):
        assert getattr(splits, split).labels.bincount().tolist() == [per_class, per_class]
        assert getattr(splits, split).labels.dtype == torch.int64


def test_every_picture_is_used_once_and_the_first_hundred_are_faces():
    splits = faces.load(DataConfig(name="faces"))
    position_and_label = [
        (int(name.rsplit("/", 1)[1]), label)
        for images in (splits.train, splits.validation, splits.test)
        for name, label in zip(images.identifiers, images.labels.tolist(), strict=True)
    ]
    assert sorted(position_and_label) == [(position, int(position >= 100)) for position in range(200)]


def test_at_their_own_size_pictures_are_the_file_s_values_rounded_to_bytes():
    splits = faces.load(DataConfig(name="faces", image_size=25, channels=1))
    stored = np.load(str(files("skimage").joinpath("data", "lfw_subset.npy")))
    position = int(splits.test.identifiers[3].rsplit("/", 1)[1])
    difference = splits.test.read([3])[0, 0].numpy() / 255 - stored[position]
    assert np.abs(difference).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(("image_size", "channels"), [(32, 3), (32, 1), (16, 3)])
def test_pictures_are_resized_and_grey_is_repeated(image_size, channels):
    pictures = faces.load(DataConfig(name="faces", image_size=image_size, channels=channels)).train.read(range(140))
    assert pictures.shape == (140, channels, image_size, image_size)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures[:, 0], pictures[:, -1])


def test_loading_again_gives_the_same_bytes():
    first, second = (faces.load(DataConfig(name="faces")) for _ in range(2))
    for split in SPLITS:
        one, other = getattr(first, split), getattr(second, split)
        assert one.identifiers == other.identifiers
        assert torch.equal(one.read(range(len(one))), other.read(range(len(other))))


@pytest.mark.parametrize("content", [None, b"", b"not an array"], ids=["missing", "empty", "damaged"])
def test_an_unreadable_file_is_named_with_the_remedy(monkeypatch, tmp_path, content):
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data" / "lfw_subset.npy").write_bytes(content)
    monkeypatch.setattr(faces, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"lfw_subset\.npy cannot be read .* Install scikit-image again"):
        faces.load(DataConfig(name="faces"))
