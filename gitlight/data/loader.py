"""`LeakLoader`: a loader that knows how far it is in an epoch, and can begin there."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from gitlight.data.sampling import LeakSampler


class LeakLoader(DataLoader[Any]):
    """A loader that tells its epoch and batch, under the names that Lightning knows resumable loaders by.

    The position counts batches of all ranks together, so that a run can go on with another number of them.
    """

    def __init__(
        self, images: Dataset[Any], sampler: LeakSampler, between_batches: Callable[[], None], **settings: Any
    ) -> None:
        """Set up as a `DataLoader`.

        Args:
            images: what to read.
            sampler: in which order.
            between_batches: is called before every batch but an epoch's first.
            settings: `DataLoader`'s.
        """
        super().__init__(images, sampler=sampler, **settings)
        self._between_batches = between_batches
        self._leak_sampler = sampler
        self._batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The epoch's batches from the sampler's position on.

        Nothing is read before the first is asked for: Lightning says which epoch it is after it has the iterator, and
        workers would have begun with another.
        """
        self._batches = self._leak_sampler.first_batch
        for batch in super().__iter__():
            if self._batches > self._leak_sampler.first_batch:
                self._between_batches()
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, from 0, and how many of its batches were read."""
        return {"epoch": self._leak_sampler.epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin there."""
        self._leak_sampler.go_to(state["epoch"], state["batches"])
