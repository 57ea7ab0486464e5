"""`ImageDataModule`, which yields images of any source, split and in batches."""

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gitlight.architecture import ImageShape
from gitlight.config import DataConfig
from gitlight.data import SOURCES
from gitlight.data.images import ImageSplits, LabelledImages
from gitlight.data.loader import LeakLoader
from gitlight.data.sampling import LeakSampler, mixed_seed
from gitlight.data.splits import divided
from gitlight.errors import ConfigError
from gitlight.stop_signals import heed_the_parent_alone
from gitlight.virtual_ranks import Share

Batch = tuple[Tensor, Tensor, Tensor]
"""Images ``(leaks · N, C, H, W)``, bytes from the loaders and [0, 1] after the transfer; labels; indices."""


def load_images(settings: DataConfig) -> ImageSplits:
    """The image source that ``data.name`` names, loaded.

    Raises:
        DataError: the images are missing or unreadable.
    """
    with (
        FileLock(Path(settings.root).expanduser() / ".gitlight.lock")
        if settings.download and settings.root
        else nullcontext()
    ):
        # One rank downloads, the others wait and then find the files.
        splits = SOURCES[settings.name].load()(settings)
    assert isinstance(splits, ImageSplits)
    return splits


def image_shape(settings: DataConfig) -> ImageShape:
    """``(C, H, W)`` of the images."""
    return (settings.channels, settings.image_size, settings.image_size)


class ImageDataModule(LightningDataModule):
    """Public images for training and validation, private images for the attack; never the same image in both.

    Public images come from the source's training split, private ones from its test split.

    Attributes:
        class_names: name of each label.
        virtual_ranks: among how many every batch is divided, whatever the number of devices; None: the devices.
        between_batches: called in training before every batch but an epoch's first, when Lightning has counted and
            logged the one before: the moment to save a checkpoint within an epoch.
    """

    def __init__(self, loaded: ImageSplits, settings: DataConfig, seed: int) -> None:
        """Divide the images of a source (`load_images`).

        Raises:
            DataError: they are too few for the settings.
            ConfigError: a class name is unknown, or the numbers of images asked for do not fit.
        """
        super().__init__()
        self.settings = settings
        self.class_names = loaded.class_names
        self.between_batches = _nothing
        self.virtual_ranks: int | None = None
        self._seed = seed
        self._train_loader: LeakLoader | None = None
        self._position = {"epoch": 0, "batches": 0}
        self._splits = divided(loaded, settings, seed)

    def split(self, name: str) -> LabelledImages:
        """The images of ``train``, ``validation`` or ``test``."""
        return self._splits[name]

    def n_leaks(self, name: str) -> int:
        """Client batches in a split; images left over form none."""
        return len(self.split(name)) // self.settings.client_batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's part of every global batch, shuffled afresh each epoch."""
        self._check_train_shares(self._world_size)
        self._train_loader = self._loader("train", shuffle=True)
        self._train_loader.load_state_dict(self._position)
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's part of the public images held out."""
        self._check_validation_shares(self._world_size)
        return self._loader("validation", shuffle=False)

    def check_shares(self, world_size: int, limit_train_batches: Any = None, limit_val_batches: Any = None) -> None:
        """Find out before a run begins whether its batches can be shared out.

        Args:
            world_size: number of devices.
            limit_train_batches: batches (int) or share (float) of an epoch; None: all.
            limit_val_batches: the same, of what is validated on.

        Raises:
            ConfigError: they cannot, or a device would have none.
        """
        self._check_train_shares(world_size)
        self._check_validation_shares(world_size)
        _check_limit("limit_train_batches", limit_train_batches, self.n_leaks("train") // self.settings.batch_size)
        # Lightning asks each device alone, and those that have enough would wait for the others.
        fewest = self.n_leaks("validation") // world_size
        _check_limit("limit_val_batches", limit_val_batches, -(-fewest // self._leaks_per_rank(world_size)))

    def _check_train_shares(self, world_size: int) -> None:
        if self.virtual_ranks is not None and self.settings.batch_size % self.virtual_ranks:
            raise ConfigError(
                f"data.batch_size: {self.settings.batch_size} leaks a step cannot be shared equally by "
                f"{self.virtual_ranks} virtual ranks (trainer.virtual_ranks); give a multiple of {self.virtual_ranks}."
            )
        if self.settings.batch_size % world_size:
            raise ConfigError(
                f"data.batch_size: {self.settings.batch_size} leaks a step cannot be shared equally by {world_size} "
                f"devices; give a multiple of {world_size}."
            )
        if self.n_leaks("train") < self.settings.batch_size:
            raise ConfigError(
                f"data.batch_size: {self.settings.batch_size} leaks a step, but only {self.n_leaks('train')} can be "
                "made of the public images; lower data.batch_size."
            )

    def _check_validation_shares(self, world_size: int) -> None:
        if self.n_leaks("validation") < world_size:
            raise ConfigError(
                f"data.n_validation: {self.n_leaks('validation')} leaks to validate on are fewer than the "
                f"{world_size} devices, which need at least one each."
            )

    def state_dict(self) -> dict[str, Any]:
        """How far training is in its images.

        Lightning keeps it, too, but restores it too late: a schedule that asks for the number of steps has the loader
        made before.
        """
        return {"position": self._position if self._train_loader is None else self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin there."""
        self._position = state_dict["position"]

    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's part of the private images."""
        return self._loader("test", shuffle=False)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Any:
        """Bytes to [0, 1], mirrored at random where asked for."""
        return self.prepare(batch, self._stage, self._epoch)

    def prepare(self, batch: Batch, split: str, epoch: int) -> Any:
        """What a step receives of a batch that is on its device already."""
        images, labels, indices = batch
        images = images.float() / 255
        if split == "train" and self.settings.horizontal_flip:
            generator = torch.Generator().manual_seed(mixed_seed("mirror", self._seed, epoch))
            coins = torch.rand(len(self.split("train")), generator=generator)[indices.cpu()] < 0.5
            images = torch.where(coins.to(images.device)[:, None, None, None], images.flip(3), images)
        elif split == "fit" and epoch == 1:
            images = images.flip(3)
        return images, labels, indices

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _leaks_per_rank(self, world_size: int) -> int:
        return -(-self.settings.batch_size // world_size)

    @property
    def _stage(self) -> str:
        assert self.trainer is not None
        if self.trainer.training:
            return "train"
        return "validation" if self.trainer.validating or self.trainer.sanity_checking else "test"

    @property
    def _epoch(self) -> int:
        assert self.trainer is not None
        return int(self.trainer.current_epoch)

    @property
    def shares(self) -> tuple[Share, ...]:
        """What this process does of each batch: one share, or those of its virtual ranks."""
        rank = self.trainer.global_rank if self.trainer is not None else 0
        world_size = self._world_size
        count = world_size if self.virtual_ranks is None else self.virtual_ranks
        here = count // world_size
        return tuple(Share(number, count) for number in range(rank * here, (rank + 1) * here))

    def _loader(self, name: str, shuffle: bool, share: Share | None = None, mixed: bool = False) -> LeakLoader:
        """Of this rank's part, or of a share; ``shuffle`` and ``mixed`` as of `LeakSampler`."""
        rank = self.trainer.global_rank if self.trainer is not None else 0
        number, of = share or (rank, self._world_size)
        split, settings = self.split(name), self.settings
        workers = self._n_workers(split)
        return LeakLoader(
            _Readable(split),
            LeakSampler(len(split), settings, number, of, self._seed, shuffle, mixed),
            self._between_batches if shuffle else _nothing,
            batch_size=self._leaks_per_rank(of) * settings.client_batch_size,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=heed_the_parent_alone,
            # Of its own, so that beginning an epoch draws nothing from the process's random numbers.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def _between_batches(self) -> None:
        self.between_batches()

    def _n_workers(self, split: LabelledImages) -> int:
        if self.settings.num_workers is not None:
            return self.settings.num_workers
        if split.in_memory:
            return 0
        ranks_here = getattr(self.trainer, "num_devices", 1) if self.trainer is not None else 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // ranks_here)


def _check_limit(key: str, limit: Any, n_batches: int) -> None:
    if isinstance(limit, float) and 0 < limit < 1 and int(limit * n_batches) == 0:
        raise ConfigError(
            f"trainer.{key}: {limit} of {n_batches} batches a device is none; give at least "
            f"{math.ceil(1000 / n_batches) / 1000}, or a number of batches."
        )


def _nothing() -> None:
    pass


class _Readable(Dataset[Batch]):
    """Reads whole batches at once: in memory that is one indexing operation instead of one per image."""

    def __init__(self, images: LabelledImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        positions = torch.tensor(indices)
        return self._images.read(indices), self._images.labels[positions], positions


def _as_it_is(batch: Any) -> Any:
    return batch
