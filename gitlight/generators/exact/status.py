"""What became of one leak: solved, or why not."""

from enum import IntEnum

import torch
from torch import Tensor

from gitlight.data.pair import Gradients, as_rows


class Status(IntEnum):
    """From the best to the worst; a leak has the worst that applies."""

    EXACT = 0
    ESTIMATE = 1
    SATURATED = 2
    UNSEEN = 3
    ROUNDED = 4
    SINGULAR = 5
    SEVERAL_IMAGES = 6
    ZERO_GRADIENT = 7
    NOT_FINITE = 8

    @property
    def words(self) -> str:
        """For people."""
        return _WORDS[self]

    @property
    def failed(self) -> bool:
        """Whether there is no image worth showing."""
        return self >= Status.ROUNDED


_WORDS = {
    Status.EXACT: "determined by the equations",
    Status.ESTIMATE: "estimate: the equations leave directions open, a prior filled them",
    Status.SATURATED: "estimate: units are saturated, their inputs are lost to rounding or noise",
    Status.UNSEEN: "estimate: units are on that hardly any public image switched on, so that their weights are unknown",
    Status.ROUNDED: "failed: the label's probability was rounded to one, and the output error with it",
    Status.SINGULAR: "failed: the equations have no solution that is finite",
    Status.SEVERAL_IMAGES: "failed: the gradient is an average over several images",
    Status.ZERO_GRADIENT: "failed: the gradient is zero (a saturated or perfectly fitted example)",
    Status.NOT_FINITE: "failed: the gradient holds NaN or infinity",
}


def screen(gradients: Gradients) -> Tensor:
    """``(B,)`` int64 statuses of leaks by their gradients alone: `EXACT`, `ZERO_GRADIENT` or `NOT_FINITE`."""
    first = next(iter(gradients.values()))
    finite = torch.ones(len(first), dtype=torch.bool, device=first.device)
    nonzero = torch.zeros_like(finite)
    for gradient in gradients.values():
        finite &= as_rows(torch.isfinite(gradient)).all(dim=1)
        nonzero |= as_rows(gradient != 0).any(dim=1)
    status = torch.full((len(first),), int(Status.EXACT), dtype=torch.int64, device=first.device)
    status[~nonzero] = Status.ZERO_GRADIENT
    status[~finite] = Status.NOT_FINITE
    return status


def worsen(status: Tensor, where: Tensor, to: Status) -> Tensor:
    """Statuses, no better than ``to`` where ``where`` holds."""
    return torch.where(where, status.clamp_min(int(to)), status)
