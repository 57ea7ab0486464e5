"""The public data sets: `cifar10`, `cifar100`, `mnist`, `fashion_mnist`, `celeba` and `imagenet`.

Each lies where torchvision would keep it, below `data.root`. The first four are small: torchvision reads them (and
downloads them with `data.download=true`), and they are held in memory. MNIST's and Fashion-MNIST's 28x28 pixels are
resized to `data.image_size`, like everything else (`gitlight.data.decoding`).

CelebA and ImageNet cannot be downloaded without an agreement, so that the user must have them, and decoding them takes
many minutes, so that they stay in their files whatever `data.memory_limit_gb` says:

    ROOT/celeba/img_align_celeba/*.jpg, ROOT/celeba/list_eval_partition.txt, ROOT/celeba/list_attr_celeba.txt
    ROOT/train/SYNSET/*.JPEG, ROOT/val/SYNSET/*.JPEG

ImageNet's `val` is the test split, its own test images having no labels. CelebA's label is its attribute `Smiling`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets

from gitlight.config import DataConfig
from gitlight.data.decoding import ImageFiles, convert_arrays
from gitlight.data.folder import existing_root, list_splits
from gitlight.data.images import ImageSplits, InMemoryImages
from gitlight.errors import DataError

# torchvision's class, and the folder below data.root in which it looks.
SMALL_SETS: dict[str, tuple[Any, str]] = {
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python"),
    "mnist": (torchvision.datasets.MNIST, "MNIST/raw"),
    "fashion_mnist": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw"),
}
IMAGENET_LAYOUT = (
    "Expected ROOT/train/SYNSET/*.JPEG and ROOT/val/SYNSET/*.JPEG. ImageNet cannot be downloaded for you: get "
    "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from https://image-net.org, put "
    "them into ROOT and unpack them with torchvision.datasets.ImageNet(ROOT, split), split 'train' and then 'val'"
)
CELEBA_LAYOUT = (
    "Expected ROOT/celeba/img_align_celeba/*.jpg (unpacked from img_align_celeba.zip), "
    "ROOT/celeba/list_eval_partition.txt and ROOT/celeba/list_attr_celeba.txt. CelebA cannot be downloaded for you: "
    "get the three from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
)
CELEBA_ATTRIBUTE = "Smiling"
CELEBA_CLASS_NAMES = ("not_smiling", "smiling")
CELEBA_PARTITION = {"train": "0", "validation": "1", "test": "2"}


def load(settings: DataConfig) -> ImageSplits:
    """The set that `data.name` names.

    Raises:
        DataError: `data.root` is not given, the set is not there or not whole, or its download failed; the message
            says which, and what to do.
    """
    if settings.name == "celeba":
        return _load_celeba(settings)
    if settings.name == "imagenet":
        return _load_imagenet(settings)
    return _load_small_set(settings)


def _load_small_set(settings: DataConfig) -> ImageSplits:
    if settings.root is None:
        raise DataError(
            f"data.root: not given. data.name={settings.name} lies in a folder: add data.root=PATH, "
            "and data.download=true to download it there."
        )
    root = Path(settings.root).expanduser()
    train = _read_small_set(settings, root, train=True)
    test = _read_small_set(settings, root, train=False)
    # MNIST's classes are "0 - zero", Fashion-MNIST's "T-shirt/top": names that no command line would take unquoted.
    names = tuple(name.split(" - ")[0].replace("/", "_").replace(" ", "_") for name in train.classes)
    return ImageSplits(
        _in_memory(train, f"{settings.name}/train", settings),
        None,
        _in_memory(test, f"{settings.name}/test", settings),
        names,
    )


def _read_small_set(settings: DataConfig, root: Path, train: bool) -> Any:
    dataset, folder = SMALL_SETS[settings.name]
    try:
        return dataset(root, train=train, download=settings.download)
    except Exception as error:
        # torchvision lets through whatever the network, the archive or the file system raises.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if settings.download:
            raise DataError(
                f"data.download: downloading {settings.name} into {root} failed ({reason}). Check the network and that "
                f"{root} can be written, or copy {folder} there from another machine."
            ) from error
        raise DataError(
            f"data.root: {settings.name} is not in {root}, or not whole ({reason}). Expected {root / folder}. "
            "Set data.download=true to download it there, or data.root to the folder that has it."
        ) from error


def _in_memory(dataset: Any, prefix: str, settings: DataConfig) -> InMemoryImages:
    images = convert_arrays(np.asarray(dataset.data), settings.image_size, settings.channels)
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64)
    return InMemoryImages(images, labels, [f"{prefix}/{position}" for position in range(len(labels))])


def _load_imagenet(settings: DataConfig) -> ImageSplits:
    root = existing_root(settings, IMAGENET_LAYOUT)
    for folder in ("train", "val"):
        if not (root / folder).is_dir():
            raise DataError(f"data.root: {root} has no folder '{folder}'. {IMAGENET_LAYOUT}.")
    splits, class_names = list_splits(root, {"train": "train", "test": "val"}, settings)
    return ImageSplits(splits["train"], None, splits["test"], class_names)


def _load_celeba(settings: DataConfig) -> ImageSplits:
    # Not by torchvision's class: it wants five tables, of which two are needed, and reads them anew for each split.
    root = existing_root(settings, CELEBA_LAYOUT)
    folder = root / "celeba"
    expected = ("img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt")
    missing = [name for name in expected if not (folder / name).exists()]
    if missing:
        raise DataError(f"data.root: {folder} lacks {', '.join(missing)}. {CELEBA_LAYOUT}.")
    labels = _celeba_labels(folder / "list_attr_celeba.txt")
    partition = [line.split() for line in (folder / "list_eval_partition.txt").read_text().splitlines() if line]
    splits = {}
    for split, code in CELEBA_PARTITION.items():
        names = [row[0] for row in partition if row[-1] == code]
        unlabelled = [name for name in names if name not in labels]
        if unlabelled or not names:
            raise DataError(
                f"{folder / 'list_eval_partition.txt'} gives the {split} split "
                + (f"{unlabelled[0]}, which list_attr_celeba.txt lacks. " if unlabelled else "no images. ")
                + "Get both tables again."
            )
        splits[split] = ImageFiles(
            root,
            [f"celeba/img_align_celeba/{name}" for name in names],
            torch.tensor([labels[name] for name in names], dtype=torch.int64),
            settings.image_size,
            settings.channels,
        )
    return ImageSplits(splits["train"], splits["validation"], splits["test"], CELEBA_CLASS_NAMES)


def _celeba_labels(table: Path) -> dict[str, int]:
    # Line 1 is the number of images, line 2 the attributes' names, then a file name and -1 or 1 for each attribute.
    lines = table.read_text().splitlines()
    header = lines[1].split() if len(lines) > 1 else []
    if CELEBA_ATTRIBUTE not in header:
        raise DataError(f"{table} names no attribute {CELEBA_ATTRIBUTE} in its second line. Get the table again.")
    column = header.index(CELEBA_ATTRIBUTE) + 1
    try:
        return {row[0]: int(row[column] == "1") for row in (line.split() for line in lines[2:] if line)}
    except IndexError:
        raise DataError(f"{table} has rows that are cut off. Get the table again.") from None
