"""Memory that is used again: for results, once nobody holds them; for what a rule makes on its way to a result.

On CPUs the system clears every page of a large new tensor, which can take longer than computing what is in it. On GPUs
PyTorch itself keeps freed memory.
"""

from collections.abc import Mapping
from functools import cache
from math import prod

import torch
from torch import Tensor

_MOST = 2
"""Buffers kept: while one batch is trained on, the next is made."""

_SMALLEST_BYTES = 1e6
"""Smaller ones cost little to clear."""


@cache
def keep_freed_memory() -> None:
    """Have the C library keep freed memory instead of handing it back, once a process.

    glibc hands back what is free at the end of its heap beyond twice the largest block that was ever freed, 32 MB at
    most. Until a program has freed a large one, the tensors of each call get fresh pages, which the system has to
    clear: LeNet's gradients take half as long again.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class ResultBuffers:
    """Buffers that are handed out again only if no other tensor shares their storage.

    Whoever keeps a result, or a view of one, keeps it as it is.

    >>> buffers = ResultBuffers()
    >>> first = buffers.empty({"weight": (3000, 3000)}, torch.float32, torch.device("cpu"))
    >>> place = first["weight"].data_ptr()
    >>> second = buffers.empty({"weight": (3000, 3000)}, torch.float32, torch.device("cpu"))
    >>> second["weight"].data_ptr() == place
    False
    >>> del first
    >>> buffers.empty({"weight": (3000, 3000)}, torch.float32, torch.device("cpu"))["weight"].data_ptr() == place
    True
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def empty(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Tensors of these shapes, whose entries are to be written before they are read."""
        sizes = [prod(shape) for shape in shapes.values()]
        if device.type != "cpu" or sum(sizes) * dtype.itemsize < _SMALLEST_BYTES or not _can_count():
            return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        whole = self._buffer(sum(sizes), dtype)
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), whole.split(sizes), strict=True)}

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        fitting = [kept for kept in self._kept if kept.numel() == size and kept.dtype == dtype]
        for kept in fitting:
            if _n_sharing(kept) == 1:
                return kept.view(size)  # a tensor of its own, or results could not be told from the buffer
        buffer = torch.empty(size, dtype=dtype)
        # Buffers of another size are of another model or batch: the memory limit is for this one.
        self._kept = [*fitting, buffer][-_MOST:]
        return buffer.view(size)


class Scratch:
    """Memory that rules write to one after the other, by purpose; each tensor holds until the next for its purpose.

    >>> scratch = Scratch()
    >>> like = torch.empty(0)
    >>> place = scratch.empty("unfolded", (3, 4), like).data_ptr()
    >>> scratch.empty("unfolded", (2, 5), like).data_ptr() == place
    True
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of this shape, of the precision and on the device of ``like``, to be written before it is read."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        key, size = (purpose, like.dtype), prod(shape)
        if key not in self._kept or self._kept[key].numel() < size:
            self._kept[key] = like.new_empty(size)
        return self._kept[key][:size].view(shape)


def _can_count() -> bool:
    return hasattr(torch._C, "_storage_Use_Count")


def _n_sharing(tensor: Tensor) -> int:
    """Tensors that share a tensor's storage, itself among them."""
    storage = tensor.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1  # one is the object that asks
