"""In which order each rank reads images."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from gitlight.config import DataConfig


def mixed_seed(purpose: str, *numbers: int) -> int:
    """A well-spread 63-bit seed for one purpose, from small related numbers (NumPy's SeedSequence).

    PyTorch's CPU generator keeps only the lower 32 bits of a seed, so related numbers must be mixed, not packed. The
    count goes in as well, since SeedSequence does not tell trailing zeros from nothing.

    >>> mixed_seed("noise", 0) != mixed_seed("noise", 0, 0) != mixed_seed("order", 0, 0)
    True
    """
    entropy = (int.from_bytes(purpose.encode()), *numbers, 1 + len(numbers))
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def order_of_groups(n_images: int, seed: int) -> Tensor:
    """Positions of images in the order in which fits group them to client batches, ``(n_images,)``.

    ``seed`` is the run's.
    """
    return torch.randperm(n_images, generator=torch.Generator().manual_seed(mixed_seed("groups", seed)))


class LeakSampler(Sampler[int]):
    """Positions of the images that one rank reads: client batch after client batch.

    The order depends on the seed and the epoch alone. While training, every global batch of ``data.batch_size`` leaks
    holds the same images for any number of ranks, each rank taking its contiguous part, and leaks that do not fill a
    batch wait for another epoch. Otherwise nothing is repeated or dropped; ranks take turns, so their shares may differ
    by one leak. Evaluation keeps the images' order; fits draw one, the same at every pass, as client batches of
    neighbours would mostly be of one class.

    Attributes:
        epoch: the current one, from 0.
    """

    def __init__(
        self,
        n_images: int,
        settings: DataConfig,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        mixed: bool = False,
    ) -> None:
        """Number of images, batch sizes, this rank of how many, the run's seed, and what for.

        ``shuffle``: for training. ``mixed``: for fits of client batches, without it.
        """
        self._n_images = n_images
        self._settings = settings
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._shuffle = shuffle
        self._mixed = mixed
        self.epoch = 0
        self._resumed = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before every epoch."""
        self.epoch = epoch

    def go_to(self, epoch: int, batch: int) -> None:
        """Begin ``epoch`` with its global batch ``batch``, from 0; other epochs are read from their beginnings."""
        self.epoch = epoch
        self._resumed = (epoch, batch)

    @property
    def first_batch(self) -> int:
        """The global batch that the current epoch begins with."""
        epoch, batch = self._resumed
        return batch if epoch == self.epoch else 0

    def __len__(self) -> int:
        return self._mine(torch.arange(self._n_images)).numel()

    def __iter__(self) -> Iterator[int]:
        if self._shuffle:
            generator = torch.Generator().manual_seed(mixed_seed("order", self._seed, self.epoch))
            order = torch.randperm(self._n_images, generator=generator)
        elif self._mixed:
            order = order_of_groups(self._n_images, self._seed)
        else:
            order = torch.arange(self._n_images)
        return iter(self._mine(order, self.first_batch).tolist())

    def _mine(self, order: Tensor, first_batch: int = 0) -> Tensor:
        per_leak = self._settings.client_batch_size
        leaks = order[: len(order) // per_leak * per_leak].view(-1, per_leak)
        if not self._shuffle:
            return leaks[self._rank :: self._world_size].flatten()
        batch = self._settings.batch_size
        batches = leaks[: len(leaks) // batch * batch].view(-1, self._world_size, batch // self._world_size, per_leak)
        return batches[first_batch:, self._rank].flatten()
