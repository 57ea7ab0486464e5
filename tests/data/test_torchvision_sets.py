import gzip
import pickle
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from gitlight.config import DataConfig
from gitlight.data import SOURCES, torchvision_sets
from gitlight.data.images import ImageSplits
from gitlight.errors import DataError

SMALL_SETS = ("cifar10", "cifar100", "mnist", "fashion_mnist")


def load(name: str, root: Path | None, **settings: object) -> ImageSplits:
    config = DataConfig(name=name, root=None if root is None else str(root), **settings)
    return SOURCES[name].load()(config)


def write_mnist(folder: Path) -> np.ndarray:
    """Genuine IDX files of 12 training and 5 test digits; gives the training pixels."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for prefix, images in (("train", pixels), ("t10k", pixels[:5])):
        labels = np.arange(len(images), dtype=np.uint8) % 10
        header = struct.pack(">IIII", 0x0803, len(images), 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x0801, len(labels)) + labels.tobytes())
    return pixels


def write_cifar(dataset: type, root: Path, labels: str, names: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """CIFAR's pickles, 3 images in each; gives the first pickle's rows. Only the md5 sums are not CIFAR's."""
    folder = root / dataset.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    first = None
    for name, _ in dataset.train_list + dataset.test_list:
        rows = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        first = rows if first is None else first
        (folder / name).write_bytes(pickle.dumps({"data": rows, labels: [0, 1, 2]}))
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps({names: ["ant", "bee", "cat"]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    return first


@pytest.mark.parametrize(
    ("name", "dataset", "labels", "names", "n_train"),
    [
        ("cifar10", torchvision.datasets.CIFAR10, "labels", "label_names", 15),
        ("cifar100", torchvision.datasets.CIFAR100, "fine_labels", "fine_label_names", 3),
    ],
)
def test_cifar_keeps_its_pixels(monkeypatch, tmp_path, name, dataset, labels, names, n_train):
    rows = write_cifar(dataset, tmp_path, labels, names, monkeypatch)
    splits = load(name, tmp_path)
    assert (len(splits.train), splits.validation, len(splits.test)) == (n_train, None, 3)
    assert splits.class_names == ("ant", "bee", "cat")
    assert splits.train.in_memory
    assert splits.train.labels[:3].tolist() == [0, 1, 2]
    assert splits.train.labels.dtype == torch.int64
    assert splits.train.identifiers[1] == f"{name}/train/1"
    assert np.array_equal(splits.train.read([0, 1, 2]).numpy(), rows.reshape(3, 3, 32, 32))


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")])
def test_mnist_is_resized_and_repeated(tmp_path, name, folder):
    pixels = write_mnist(tmp_path / folder)
    splits = load(name, tmp_path)
    assert splits.train.read([0]).shape == (1, 3, 32, 32)
    assert splits.train.read([0]).dtype == torch.uint8
    assert splits.train.labels.tolist() == [*range(10), 0, 1]
    assert len(splits.test) == 5
    assert len(set(splits.class_names)) == 10
    as_stored = load(name, tmp_path, image_size=28, channels=1)
    assert np.array_equal(as_stored.train.read(range(12))[:, 0].numpy(), pixels)


def test_class_names_can_be_typed_on_a_command_line(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    assert load("mnist", tmp_path).class_names == tuple("0123456789")
    assert {"T-shirt_top", "Ankle_boot"} <= set(load("fashion_mnist", tmp_path).class_names)


@pytest.mark.parametrize("name", SMALL_SETS)
def test_a_small_set_that_is_absent_is_not_downloaded_unasked(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} is not in {tmp_path}.*Set data\.download=true"):
        load(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*SMALL_SETS, "celeba", "imagenet"])
def test_every_set_needs_a_root(name):
    with pytest.raises(DataError, match=rf"data\.root: not given\. data\.name={name}.*add data\.root="):
        load(name, None)


def test_a_damaged_small_set_is_an_error_that_names_it(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"cut off")
    with pytest.raises(DataError, match=rf"mnist is not in {tmp_path}, or not whole.*MNIST/raw"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", SMALL_SETS)
def test_a_failed_download_names_the_set_and_the_remedy(monkeypatch, tmp_path, name):
    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    # The one door through which torchvision reaches the network.
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError, match=rf"downloading {name} into {tmp_path} failed.*Check the network"):
        load(name, tmp_path, download=True)


def test_download_reads_a_set_that_is_there_already(monkeypatch, tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("went to the network"))
    assert len(load("mnist", tmp_path, download=True).train) == 12


def test_mnist_s_archives_are_not_enough_without_download(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    for path in list(folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(DataError, match="mnist is not in"):
        load("mnist", tmp_path)


# ImageNet: ROOT/train/SYNSET, ROOT/val/SYNSET.


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two synsets, two training images and one validation image of each, and the devkit's table."""
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",)}
    torch.save((names, ["n01440764", "n01443537"]), tmp_path / "meta.bin")
    for split, count in (("train", 2), ("val", 1)):
        for position, synset in enumerate(names):
            (tmp_path / split / synset).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (50, 40), (0, 200 * position, 0))
                image.save(tmp_path / split / synset / f"{synset}_{number}.JPEG")
    return tmp_path


def test_imagenet_is_read_from_files_with_val_as_the_test_split(imagenet):
    splits = load("imagenet", imagenet, image_size=16)
    assert splits.class_names == ("n01440764", "n01443537")
    assert splits.validation is None
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    assert list(splits.test.identifiers) == [f"val/{name}/{name}_0.JPEG" for name in splits.class_names]
    assert not splits.train.in_memory
    assert splits.test.read([1, 0]).shape == (2, 3, 16, 16)
    assert (splits.test.read([1])[0, 1] > 150).all()


def test_imagenet_has_the_labels_that_torchvision_gives_it(imagenet):
    reference = torchvision.datasets.ImageNet(str(imagenet), split="train")
    splits = load("imagenet", imagenet)
    assert [
        (str(imagenet / name), label)
        for name, label in zip(splits.train.identifiers, splits.train.labels.tolist(), strict=True)
    ] == reference.imgs


def test_an_absent_imagenet_says_what_to_get(tmp_path):
    with pytest.raises(
        DataError, match=rf"{tmp_path} has no folder 'train'.*ILSVRC2012_img_train\.tar.*image-net\.org"
    ):
        load("imagenet", tmp_path, download=True)
    with pytest.raises(DataError, match=r"nowhere does not exist.*ILSVRC2012_img_train\.tar"):
        load("imagenet", tmp_path / "nowhere")


def test_an_unsorted_val_folder_is_explained(imagenet):
    for folder in list((imagenet / "val").iterdir()):
        for path in list(folder.iterdir()):
            path.rename(imagenet / "val" / path.name)
        folder.rmdir()
    with pytest.raises(DataError, match=r"val has no class folders.*It holds n01440764_0\.JPEG"):
        load("imagenet", imagenet)


# CelebA: ROOT/celeba.


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Seven faces: three to train, two to validate, two to test."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    attributes, partition = ["7", "Bald Smiling Young "], []
    for number, split in enumerate((0, 0, 0, 1, 1, 2, 2), start=1):
        name = f"{number:06}.jpg"
        Image.new("RGB", (178, 218), (30 * number, 0, 0)).save(folder / "img_align_celeba" / name)
        attributes.append(f"{name} -1  {1 if number % 2 else -1} 1")
        partition.append(f"{name} {split}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return tmp_path


def test_celeba_has_its_own_partition_and_smiling_as_label(celeba):
    splits = load("celeba", celeba, image_size=32)
    assert splits.class_names == ("not_smiling", "smiling")
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert splits.validation is not None
    assert splits.validation.labels.tolist() == [0, 1]
    assert list(splits.test.identifiers) == [f"celeba/img_align_celeba/00000{number}.jpg" for number in (6, 7)]
    assert not splits.test.in_memory
    assert splits.test.read([0]).shape == (1, 3, 32, 32)
    assert abs(int(splits.test.read([0])[0, 0, 16, 16]) - 180) < 6


def test_celeba_has_the_partition_and_labels_that_torchvision_gives_it(monkeypatch, celeba):
    for table in ("identity_CelebA.txt", "list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        header = "" if "identity" in table else "7\nx\n"
        rows = "".join(f"{number:06}.jpg 1\n" for number in range(1, 8))
        (celeba / "celeba" / table).write_text(header + rows)
    monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", lambda path, md5=None: Path(path).is_file())
    splits = load("celeba", celeba)
    for split, images in (("train", splits.train), ("valid", splits.validation), ("test", splits.test)):
        reference = torchvision.datasets.CelebA(str(celeba), split=split)
        assert [Path(name).name for name in images.identifiers] == reference.filename
        assert images.labels.tolist() == reference.attr[:, reference.attr_names.index("Smiling")].tolist()


@pytest.mark.parametrize("missing", ["list_attr_celeba.txt", "list_eval_partition.txt"])
def test_an_absent_celeba_table_is_named(celeba, missing):
    (celeba / "celeba" / missing).unlink()
    with pytest.raises(DataError, match=rf"celeba lacks {missing}.*mmlab\.ie\.cuhk\.edu\.hk"):
        load("celeba", celeba, download=True)


def test_an_absent_celeba_says_what_to_get(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}/celeba lacks img_align_celeba, .*img_align_celeba\.zip"):
        load("celeba", tmp_path)


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("list_attr_celeba.txt", "", "names no attribute Smiling"),
        ("list_attr_celeba.txt", "1\nBald Smiling\n000001.jpg -1", "rows that are cut off"),
        ("list_attr_celeba.txt", "1\nBald Smiling\n000001.jpg -1 1", "gives the train split 000002.jpg, which"),
        ("list_eval_partition.txt", "000001.jpg 0", "gives the validation split no images"),
    ],
)
def test_a_damaged_celeba_table_is_named(celeba, table, content, message):
    (celeba / "celeba" / table).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        load("celeba", celeba)
    assert table in str(raised.value)


def test_a_missing_celeba_image_is_named_when_it_is_read(celeba):
    (celeba / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(DataError, match=r"000002\.jpg cannot be read"):
        load("celeba", celeba).train.read([1])


def test_all_six_sets_are_registered():
    for name in (*SMALL_SETS, "celeba", "imagenet"):
        assert SOURCES[name].load() is torchvision_sets.load
