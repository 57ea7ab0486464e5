"""The equations of one layer's weight that a batch gives, divided into shares, with the weights of this moment."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from gitlight.generators.exact.equations import conservation_equations, logit_equations, output_equations
from gitlight.generators.exact.fits import FitStep, Way
from gitlight.generators.exact.leaks import Leaks
from gitlight.generators.exact.weights import log_probabilities_of, with_ones
from gitlight.virtual_ranks import n_processes, sum_over_processes

if TYPE_CHECKING:
    from gitlight.generators.exact.inversion import Inversion
    from gitlight.generators.exact.walk import Found


class LayerEquations(NamedTuple):
    """``Σ_n rows[g, e, n] W[o, n] = targets[e, o]``, ``g`` being ``o``, or 0 where all outputs share their rows.

    Attributes:
        rows: ``(1 or outputs, E, n)``.
        targets: ``(E, outputs)``.
        weights: ``(E, outputs)``, how much each counts: from 0 to 1.
        up_to_constant: whether targets are known up to a number common to all outputs of an equation.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor
    up_to_constant: bool = False

    def residual(self, matrix: Tensor) -> Tensor:
        """What a weight ``(outputs, n)`` leaves of the targets, ``(E, outputs)``."""
        made = torch.einsum("gen,on->eo" if len(self.rows) == 1 else "oen,on->eo", self.rows, matrix)
        residual = made - self.targets
        if self.up_to_constant:
            weights = self.weights
            shared = (residual * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp_min(1e-300)
            residual = residual - shared
        return residual


class Walked(NamedTuple):
    """One share of a batch, and what the layers above give away of it.

    Attributes:
        leaks: those that can be used.
        found: the walk's.
        images: theirs, ``(B, C, H, W)``.
    """

    leaks: Leaks
    found: "Found"
    images: Tensor


def equations_of(inversion: "Inversion", walked: Walked, step: FitStep) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, targets and weights of one share with at least one leak."""
    leaks, found, images = walked
    if step.way is Way.LOGITS:
        inputs, delta, noise = logit_equations(leaks, found, step.layer)
        logarithms, variance = log_probabilities_of(delta, noise, torch.finfo(leaks.dtype).eps)
        return with_ones(inputs).unsqueeze(0), logarithms, torch.where(variance < 1, 1 / variance, 0.0)
    if step.way is Way.CONSERVED:
        rows, targets, weights = conservation_equations(inversion, leaks, step.layer)
        size = rows.norm(dim=2).clamp_min(1e-300)  # leaks of any loss count alike
        return (rows / size.unsqueeze(2)).transpose(0, 1), targets / size, weights * size.square()
    public = images if step.way is Way.FROM_BELOW else None
    patches, outputs, weights = output_equations(inversion, found, step.layer, public)
    targets = outputs.flatten(0, 1)
    return with_ones(patches).flatten(0, 1).unsqueeze(0), targets, weights.reshape(-1, 1).expand_as(targets)


def evenly_weighed(made: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
    """Logit equations of all shares with one weight for all classes, if enough are usable for all of them.

    Then the step is that of least squares for each class.
    """
    least = [weights.amin(dim=1, keepdim=True) for _, _, weights in made]
    if int(sum_over_processes([(its > 0).sum() for its in least])) <= 2 * (made[0][0].shape[2] - 1):
        return made
    return [(rows, targets, its.expand_as(targets)) for (rows, targets, _), its in zip(made, least, strict=True)]


def usable_equations(
    made: Sequence[tuple[Tensor, Tensor, Tensor]], up_to_constant: bool = False
) -> list[LayerEquations]:
    """Without what is not finite. The better half counts in full, so that no few equations count for all."""
    counting = []
    for rows, targets, weights in made:
        finite = torch.isfinite(rows).all(dim=2).T & torch.isfinite(targets)
        counting.append(torch.where(finite, weights, 0.0))
    together = _gathered(torch.cat([weights[weights > 0] for weights in counting]))  # for one median on all devices
    typical = together.median() if together.numel() else together.new_zeros(())
    return [
        LayerEquations(
            torch.nan_to_num(rows, posinf=0.0, neginf=0.0),
            targets.nan_to_num(),
            (weights / typical.clamp_min(1e-300)).clamp_max(1),
            up_to_constant,
        )
        for (rows, targets, _), weights in zip(made, counting, strict=True)
    ]


def _gathered(values: Tensor) -> Tensor:
    """``(n,)`` of each device, which may differ in number, as one, the same on all."""
    if n_processes() == 1:
        return values
    largest = torch.tensor(len(values), device=values.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    padded = torch.cat([values, values.new_full((int(largest) - len(values),), torch.nan)])
    parts = [torch.empty_like(padded) for _ in range(n_processes())]
    torch.distributed.all_gather(parts, padded)
    together = torch.cat(parts)
    return together[~torch.isnan(together)]
