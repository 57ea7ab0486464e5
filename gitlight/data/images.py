"""What an image source gives: three splits of labelled images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LabelledImages(Protocol):
    """One split: images by position, as bytes, already of the size and the number of channels asked for."""

    @property
    def labels(self) -> Tensor:
        """``(n,)`` int64 on the CPU, known without decoding an image."""
        ...

    @property
    def identifiers(self) -> Sequence[str]:
        """One short name per image (a path below the root, or ``photos/test/17``), for results."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether images are decoded already, so that reading them needs no worker process."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``: ``(len(indices), C, H, W)`` uint8."""
        ...


@dataclass(frozen=True)
class ImageSplits:
    """An image source, loaded.

    Attributes:
        train: public images, from which pairs are made.
        validation: public images held out, or None where the source has no split of its own
            (then the data module holds some of ``train`` out).
        test: private images, which are attacked; never in ``train`` or ``validation``.
        class_names: name of each label.
    """

    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class InMemoryImages:
    """A split held decoded in memory. ``images``: ``(n, C, H, W)`` uint8."""

    images: Tensor
    labels: Tensor
    identifiers: Sequence[str]
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``: ``(len(indices), C, H, W)`` uint8."""
        return self.images[torch.as_tensor(indices, dtype=torch.int64)]


@dataclass(frozen=True)
class ImageSubset:
    """Some of another split's images, by their positions in it."""

    source: LabelledImages
    positions: Tensor

    @property
    def labels(self) -> Tensor:
        """``(n,)`` int64."""
        return self.source.labels[self.positions]

    @property
    def identifiers(self) -> Sequence[str]:
        """One short name per image."""
        identifiers = self.source.identifiers  # once: of a subset of a subset it is made anew at each access
        return [identifiers[position] for position in self.positions.tolist()]

    @property
    def in_memory(self) -> bool:
        """Whether images are decoded already."""
        return self.source.in_memory

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``: ``(len(indices), C, H, W)`` uint8."""
        return self.source.read(self.positions[torch.as_tensor(indices, dtype=torch.int64)].tolist())
