"""``trainer.virtual_ranks``: training that is the same, bit for bit, on every number of processes.

The work of a step and of a fit is divided among virtual ranks, whatever the number of processes, and each process does
that of several. Rounding depends on the shapes that are computed with and on the order of sums: shapes are those of a
virtual rank, and sums are made in pairs, pairs of pairs, and so on (as with the virtual workers of Li et al. 2023,
EasyScale).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import GradBucket, P2POp, batch_isend_irecv  # type: ignore[attr-defined]

from gitlight.data.pair import GradientPair
from gitlight.errors import ConfigError


class Share(NamedTuple):
    """What one virtual rank does of all; without virtual ranks each process has one."""

    number: int
    of: int


@dataclass(frozen=True)
class DividedBatch:
    """A process's part of a batch, divided among its virtual ranks: of one at a time there are pairs.

    Attributes:
        parts: the images of each, as the loaders give them.
        make: turns a part into pairs.
        n_leaks: of all parts together, which is the batch's length.
    """

    parts: tuple[Any, ...]
    make: Callable[[Any], GradientPair]
    n_leaks: int

    def __len__(self) -> int:
        return self.n_leaks


class PairwiseSum:
    """Adds up tensors, a power of two of each, in pairs, pairs of pairs, and so on.

    >>> total = PairwiseSum()
    >>> for number in (1.0, 2.0, 3.0, 4.0):
    ...     total.add([torch.tensor(number), None])
    >>> total.result()
    [tensor(10.), None]
    """

    def __init__(self) -> None:
        self._stack: list[tuple[int, list[Tensor | None]]] = []

    def add(self, values: Sequence[Tensor | None]) -> None:
        """Add one of each; None counts as zero."""
        level, summed = 0, list(values)
        while self._stack and self._stack[-1][0] == level:
            _, former = self._stack.pop()
            summed = [_plus(one, other) for one, other in zip(former, summed, strict=True)]
            level += 1
        self._stack.append((level, summed))

    def result(self) -> list[Tensor | None]:
        """The sums; None of nothing but None."""
        ((_, summed),) = self._stack
        return summed


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def n_processes() -> int:
    """Processes of this run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _rank() -> int:
    return torch.distributed.get_rank() if n_processes() > 1 else 0


_current: Share | None = None


@contextmanager
def working_on(share: Share) -> Iterator[None]:
    """Within, `current_share` is this one."""
    global _current
    former, _current = _current, share
    try:
        yield
    finally:
        _current = former


def current_share() -> Share:
    """The one that is worked on; outside of `working_on`, this process of all."""
    return Share(_rank(), n_processes()) if _current is None else _current


def add_up(value: Tensor, in_pairs: bool = True) -> Tensor:
    """Add up a tensor over processes, in place; in pairs of pairs where their number is a power of two."""
    count = n_processes()
    if count == 1:
        return value
    if count == 2 or count & (count - 1) or not in_pairs:
        torch.distributed.all_reduce(value)
        return value
    total, step = value.contiguous(), 1
    while step < count:
        partner, theirs = _rank() ^ step, torch.empty_like(total)
        exchange = P2POp(torch.distributed.isend, total, partner), P2POp(torch.distributed.irecv, theirs, partner)
        for request in batch_isend_irecv(list(exchange)):
            request.wait()
        total = total + theirs
        step *= 2
    return value.copy_(total)


def sum_here(values: Sequence[Tensor]) -> Tensor:
    """The sum of what each of this process's shares gives; may be differentiated."""
    total = PairwiseSum()
    for value in values:
        total.add([value])
    (summed,) = total.result()
    assert summed is not None
    return summed


def sum_over_processes(values: Sequence[Tensor]) -> Tensor:
    """The sum of what all shares of all processes give; of a single value here, that value is changed in place."""
    return add_up(sum_here(values))


def mean_gradients(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's communication, by `add_up`: its own adds up in no order that could be told."""
    gradients = bucket.buffer().div_(n_processes())
    done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[gradients.device] if gradients.is_cuda else [])
    done.set_result(add_up(gradients))
    return done


def fanned_out(value: Tensor, n_shares: int) -> Sequence[Tensor]:
    """A trained value once for each share: the shares' gradients are added up in pairs, not in autograd's order."""
    copies: tuple[Tensor, ...] = _FannedOut.apply(value, n_shares)
    return copies


class _FannedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, n_shares: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for _ in range(n_shares))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None]:
        total = PairwiseSum()
        for gradient in upstream:
            total.add([gradient])
        return total.result()[0], None


def mean_loss(losses: Iterable[Callable[[], Tensor]], parameters: Mapping[str, Tensor]) -> Tensor:
    """The mean of the shares' losses, each differentiated by itself.

    Args:
        losses: make the loss of each share, ``()``; a power of two of them, and more than one.
        parameters: what is trained, by name. The result's gradient by these is the mean of the losses' gradients.

    Raises:
        ConfigError: the losses do not depend on some parameter.
    """
    total, count = PairwiseSum(), 0
    for make in losses:
        loss = make()
        # As outside of a training step, where Lightning differentiates.
        with torch.autocast(loss.device.type, enabled=False):
            own = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        total.add([loss.detach(), *own])
        count += 1
    # Sums of two and more are nobody else's.
    mean, *gradients = (None if summed is None else summed.div_(count) for summed in total.result())
    if unused := [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]:
        raise ConfigError(
            f"trainer.virtual_ranks: the loss does not depend on {unused[0]}. Take it out of the generator, set its "
            "requires_grad to false, or leave trainer.virtual_ranks out."
        )
    result: Tensor = _Differentiated.apply(mean, gradients, *parameters.values())
    return result


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # once, in place: they may be large
        return None, None, *(gradient.mul_(upstream[0]) for gradient in gradients)
