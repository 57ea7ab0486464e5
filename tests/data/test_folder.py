import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from gitlight.config import DataConfig
from gitlight.data import SOURCES, folder
from gitlight.data.images import ImageSplits, LabelledImages
from gitlight.errors import DataError

SAMPLES = Path(__file__).parents[3] / "shared" / "data"


def save(path: Path, colour: object = "red", size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, three training images and two test images of each."""
    for split, count in (("train", 3), ("test", 2)):
        for class_name in ("cat", "dog"):
            for number in range(count):
                save(tmp_path / split / class_name / f"{number}.png", (10 * number, 0, 255 * (class_name == "dog")))
    return tmp_path


def load(root: Path | None, **settings: object) -> ImageSplits:
    settings = {"image_size": 8} | settings
    return folder.load(DataConfig(name="folder", root=None if root is None else str(root), **settings))


def everything(images: LabelledImages) -> torch.Tensor:
    return images.read(range(len(images)))


def test_a_tree_is_read_in_alphabetical_order(root):
    splits = SOURCES["folder"].load()(DataConfig(name="folder", root=str(root), image_size=8))
    assert splits.class_names == ("cat", "dog")
    assert splits.validation is None
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train.labels.dtype == torch.int64
    assert list(splits.train.identifiers) == [f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(3)]
    assert splits.train.read([4, 2]).dtype == torch.uint8
    assert splits.train.read([4, 2])[:, :, 5, 5].tolist() == [[10, 0, 255], [20, 0, 0]]
    assert everything(splits.test).shape == (4, 3, 8, 8)


def test_the_order_does_not_depend_on_the_order_of_creation(root, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for path in sorted(root.rglob("*.png"), reverse=True):
        target = copy / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    one, other = load(root), load(copy)
    assert list(one.train.identifiers) == list(other.train.identifiers)
    assert torch.equal(everything(one.train), everything(other.train))


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_validation_folder_becomes_the_validation_split(root, name):
    save(root / name / "dog" / "a.jpg")
    splits = load(root)
    assert splits.validation is not None
    assert list(splits.validation.identifiers) == [f"{name}/dog/a.jpg"]
    assert splits.validation.labels.tolist() == [1]


def test_splits_may_hold_different_classes(root):
    shutil.move(root / "test" / "cat", root / "test" / "ant")
    splits = load(root)
    assert splits.class_names == ("ant", "cat", "dog")
    assert splits.train.labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert splits.test.labels.tolist() == [0, 0, 2, 2]


def test_sets_above_the_memory_limit_are_read_from_files_with_the_same_result(root):
    n_bytes = 10 * 3 * 8 * 8
    eager, lazy = load(root, memory_limit_gb=(n_bytes + 1) / 1e9), load(root, memory_limit_gb=(n_bytes - 1) / 1e9)
    assert eager.train.in_memory
    assert not lazy.train.in_memory
    for one, other in ((eager.train, lazy.train), (eager.test, lazy.test)):
        assert torch.equal(everything(one), everything(other))
        assert torch.equal(one.labels, other.labels)
        assert list(one.identifiers) == list(other.identifiers)


def test_a_lazy_split_can_be_sent_to_another_process(root):
    lazy = load(root, memory_limit_gb=0).train
    assert torch.equal(everything(pickle.loads(pickle.dumps(lazy))), everything(lazy))


def test_hidden_and_other_files_are_passed_over(root):
    (root / "train" / ".cache").mkdir()
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "train" / "cat" / "._0.png").write_bytes(b"x")
    (root / "train" / "cat" / "notes.txt").write_text("taken in May")
    (root / "train" / "README.md").write_text("cats and dogs")
    assert len(load(root).train) == 6


# What can be wrong with a tree.


def test_no_root():
    with pytest.raises(DataError, match=r"data\.root: not given.*add data\.root=ROOT"):
        load(None)


def test_a_root_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: .*nowhere does not exist.*ROOT/train/CLASS"):
        load(tmp_path / "nowhere")


def test_a_root_that_is_a_file(root):
    with pytest.raises(DataError, match=r"0\.png is a file, not a folder"):
        load(root / "train" / "cat" / "0.png")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split(root, split):
    shutil.rmtree(root / split)
    with pytest.raises(DataError, match=rf"has no folder '{split}'.*ROOT/test/CLASS.*It holds"):
        load(root)


def test_a_root_one_level_too_high_gets_the_right_one_suggested(root):
    (root / "pets").mkdir()
    for split in ("train", "test"):
        shutil.move(root / split, root / "pets" / split)
    with pytest.raises(DataError, match=r"Did you mean data\.root=.*pets\?"):
        load(root)


def test_two_validation_folders(root):
    for name in ("val", "validation"):
        save(root / name / "cat" / "0.png")
    with pytest.raises(DataError, match=r"both a folder 'validation' and a folder 'val'.*Keep one"):
        load(root)


def test_images_without_class_folders(root):
    for name in ("cat", "dog"):
        shutil.rmtree(root / "test" / name)
    save(root / "test" / "0.png")
    with pytest.raises(DataError, match=r"test has no class folders.*one folder for each class.*It holds 0\.png"):
        load(root)


def test_a_class_folder_without_images(root):
    for number in range(3):
        (root / "train" / "dog" / f"{number}.png").unlink()
    with pytest.raises(DataError, match=r"train/dog holds no images.*\.jpeg.*It is empty"):
        load(root)
    (root / "train" / "dog" / "notes.txt").write_text("gone")
    with pytest.raises(DataError, match=r"train/dog holds no images.*It holds notes\.txt"):
        load(root)


@pytest.mark.parametrize("memory_limit_gb", [2.0, 0.0], ids=["eager", "lazy"])
def test_an_empty_file_is_found_before_anything_is_read(root, memory_limit_gb):
    (root / "test" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"test/dog/1\.png cannot be read.*empty \(0 bytes\).*Replace"):
        load(root, memory_limit_gb=memory_limit_gb)


def damage(path: Path, how: str) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "other": b"not an image", "head": content[:20]}[how])


@pytest.mark.parametrize("how", ["cut", "other", "head"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_damaged_file_is_named(root, suffix, how):
    path = root / "train" / "cat" / f"bad.{suffix}"
    damage(path, how)
    with pytest.raises(DataError, match=rf"train/cat/bad\.{suffix} cannot be read as an image: .*Replace the file"):
        load(root)
    lazy = load(root, memory_limit_gb=0)
    position = list(lazy.train.identifiers).index(f"train/cat/bad.{suffix}")
    with pytest.raises(DataError, match=rf"train/cat/bad\.{suffix} cannot be read as an image: .*Replace the file"):
        lazy.train.read([position])


def test_a_file_that_vanished_is_named(root):
    lazy = load(root, memory_limit_gb=0)
    (root / "train" / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"train/cat/1\.png cannot be read"):
        lazy.train.read([1])


def test_floating_point_images_are_refused(root):
    save(root / "train" / "cat" / "0.tiff", 0.5, mode="F")
    with pytest.raises(DataError, match=r"cat/0\.tiff cannot be read.*floating-point"):
        load(root)


class OneByOne(Dataset[torch.Tensor]):
    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images.read([index])[0]


def test_worker_processes_read_lazily_and_name_a_damaged_file(root):
    lazy = load(root, memory_limit_gb=0)
    (batch,) = DataLoader(OneByOne(lazy.train), batch_size=6, num_workers=1)
    assert torch.equal(batch, everything(lazy.train))
    (root / "train" / "cat" / "1.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"train/cat/1\.png cannot be read as an image"):
        list(DataLoader(OneByOne(lazy.train), batch_size=6, num_workers=1))


@pytest.mark.skipif(
    not (SAMPLES / "imagenet_sample.zip").exists(), reason="needs the ImageNet sample beside the project"
)
def test_real_photographs_of_classes_that_differ_between_the_splits(tmp_path):
    with zipfile.ZipFile(io.BytesIO((SAMPLES / "imagenet_sample.zip").read_bytes())) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        archive.extractall(tmp_path, [*names[:10], *names[-40:]])
    splits = load(tmp_path, image_size=16)
    assert (len(splits.train), len(splits.test), len(splits.class_names)) == (40, 10, 50)
    assert not set(splits.train.labels.tolist()) & set(splits.test.labels.tolist())
    assert everything(splits.train).float().std() > 40
