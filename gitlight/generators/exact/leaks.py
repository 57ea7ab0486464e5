"""`Leaks`: those of a batch that can be inverted, how noisy they are, and whether rounding spoiled their ``δ``."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.data.pair import Gradients
from gitlight.generators.exact.factor import by_factor, rank_one_factor
from gitlight.generators.exact.noise import SUMMED, entry_size, rank_one
from gitlight.generators.exact.rule import InverseRule
from gitlight.generators.exact.status import Status, screen

_MOST_IMBALANCED = 0.1
"""Share of ``δ`` that may fail to add up to zero: what rounding of a probability near one leaves."""

_SURELY = 6.0
"""Standard deviations of noise beyond which it is not noise."""


class Leaks(NamedTuple):
    """Leaks that can be inverted.

    Attributes:
        gradients: those that the walk uses, in float64, finite, not zero.
        noise: ``(B,)``, standard deviation of the error of an entry.
        which: ``(B,)``, their positions in the batch that they came from.
        dtype: precision that they came in.
        entry_size: ``(B,)``, root mean square of all entries.
    """

    gradients: Gradients
    noise: Tensor
    which: Tensor
    dtype: torch.dtype
    entry_size: Tensor

    def where(self, wanted: Tensor) -> "Leaks":
        """Those of them for which ``(B,)`` bool holds."""
        gradients = {name: gradient[wanted] for name, gradient in self.gradients.items()}
        return Leaks(gradients, self.noise[wanted], self.which[wanted], self.dtype, self.entry_size[wanted])

    @property
    def n(self) -> int:
        """``B``, which may be zero."""
        return len(self.which)

    @property
    def relative_noise(self) -> Tensor:
        """``(B,)``: over the root mean square of the leak's entries."""
        return self.noise / self.entry_size

    @property
    def rounding(self) -> Tensor:
        """``(B,)``: the error that the precision alone leaves on an entry of typical size."""
        return torch.finfo(self.dtype).eps * self.entry_size


def invertible(gradients: Gradients) -> tuple[Tensor, Tensor]:
    """Positions of the leaks that are finite and not zero, and the root mean square of each of these, float64."""
    size = entry_size(gradients)
    if bool((torch.isfinite(size) & (size > 0)).all()):  # one pass over large gradients, instead of several
        return torch.arange(len(size), device=size.device), size
    which = (screen(gradients) == Status.EXACT).nonzero().squeeze(1)
    return which, size[which]


def usable_leaks(gradients: Gradients, used: Collection[str], noise: float | None, last_weight: str | None) -> Leaks:
    """The leaks that are finite and not zero, in float64, with their noise: that of rounding at least.

    Args:
        gradients: of all parameters, or sketches of some.
        used: names of the parameters whose gradients the walk uses.
        noise: over the root mean square of a leak's entries; None: what ``last_weight``'s gradient shows.
        last_weight: the last layer's weight, whose gradient has rank one but for noise; None where there is none, or a
            sketch of it alone: rounding is all that is known then.
    """
    which, size = invertible(gradients)
    first = next(iter(gradients.values()))
    dtype = first.dtype
    # Of large models a walk may use the last layer's alone: all others in double take longer than it does.
    kept = {name: gradient for name, gradient in gradients.items() if name in used}
    if len(which) < len(first):
        kept = {name: gradient[which] for name, gradient in kept.items()}
    kept = {name: gradient.double() for name, gradient in kept.items()}
    deviation = SUMMED * torch.finfo(dtype).eps * size
    if noise is not None:
        deviation = torch.maximum(deviation, noise * size)
    elif last_weight is not None:
        deviation = torch.maximum(deviation, rank_one(kept[last_weight]).noise)
    return Leaks(kept, deviation, which, dtype, size)


def last_delta(rule: InverseRule, leaks: Leaks) -> Tensor:
    """``δ`` of the last layer, ``(B, classes)``: its bias gradient, or the factor of its weight's, in its units.

    Without either no fit is made.
    """
    if by_factor(rule):
        assert rule.weight is not None
        factor = rank_one_factor(leaks.gradients[rule.weight])
        return factor.delta * factor.inputs.norm(dim=1, keepdim=True)
    name = rule.reveals_delta()
    assert name is not None
    return leaks.gradients[name]


def imbalance(delta: Tensor) -> Tensor:
    """``|Σ δ| / Σ |δ|`` of the last layer's ``(B, classes)``, zero but for rounding and noise: ``(B,)``.

    Where the label's probability is rounded to one, its ``δ`` is zero and the sum is not: the leaked model itself
    went on with a ``δ`` that depends on a row common to all classes, which no fit of differences can see.
    """
    return delta.sum(dim=1).abs() / delta.abs().sum(dim=1).clamp_min(1e-300)


def rounded(delta: Tensor, noise: Tensor) -> Tensor:
    """Whether ``δ`` of the last layer fails to add up to zero by more than noise would explain: ``(B,)`` bool.

    Args:
        delta: ``(B, classes)``.
        noise: ``(B,)``, standard deviation of the error of an entry.
    """
    of_noise = noise * delta.shape[1] ** 0.5
    beyond = delta.sum(dim=1).abs() > _SURELY * of_noise
    return beyond & (imbalance(delta) > _MOST_IMBALANCED)
