"""Leaked weights from pairs, in closed form: linear least squares on what the layers above give away."""

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Ridge on the scaled normal matrix, whose diagonal is 1: only against exact singularity.
_REGULARISATION = 1e-14


class WeightFit:
    """Least squares for ``outputs ≈ patches · Wᵀ + b`` from sums over examples, in float64.

    Sums of patches' products are all that it keeps, so it is one pass over any number of pairs.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, patches: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Add equations.

        Args:
            patches: ``(B, positions, inputs)``.
            outputs: ``(B, positions, outputs)``.
            weights: ``(B,)``, how much each example counts: the inverse of its error's variance.
        """
        ones = patches.new_ones(*patches.shape[:2], 1)
        design = torch.cat([patches, ones], dim=2).flatten(0, 1)
        weighted = design * weights.repeat_interleave(patches.shape[1])[:, None]
        targets = outputs.flatten(0, 1)
        if not self._sums:
            size = design.shape[1]
            self._sums = [design.new_zeros(size, size), design.new_zeros(size, targets.shape[1]), design.new_zeros(())]
        self._sums[0] += weighted.T @ design
        self._sums[1] += weighted.T @ targets
        self._sums[2] += (weights > 0).sum() * patches.shape[1]

    def sums(self) -> list[Tensor]:
        """Normal matrix, right-hand side, number of equations per output."""
        return self._sums

    def solve(self) -> tuple[Tensor, Tensor]:
        """``W`` ``(outputs, inputs)`` and ``b`` ``(outputs,)``; forgets the sums.

        With fewer equations than unknowns it warns: the result is then one of many, and rounding decides which.
        """
        normal, right, n_equations = self._sums
        if n_equations < len(normal):
            log.warning(
                "closed-form fit of a leaked weight: %d equations for %d unknowns per output; the reconstruction will "
                "suffer. More pairs help: data.n_public_images.",
                int(n_equations),
                len(normal),
            )
        count, mean, offset = normal[-1, -1], normal[-1, :-1] / normal[-1, -1], right[-1] / normal[-1, -1]
        # Centred, then scaled to a unit diagonal: activations may vary a thousand times less than their mean, and the
        # constant would then hide their differences.
        covariance = normal[:-1, :-1] - count * torch.outer(mean, mean)
        cross = right[:-1] - count * torch.outer(mean, offset)
        scale = covariance.diagonal().clamp_min(1e-300).sqrt()
        scaled = covariance / scale[:, None] / scale
        scaled.diagonal().add_(_REGULARISATION)
        weight = (torch.linalg.solve(scaled, cross / scale[:, None]) / scale[:, None]).T.contiguous()
        self._sums = []
        return weight, offset - weight @ mean


def output_logits(delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits behind ``δ = softmax(z) − y``, up to a constant per example, for one image per leak.

    Since ``log(δ + y) = z − logsumexp(z)``, and the label ``y`` is where ``δ`` is negative.

    Args:
        delta: ``(B, classes)`` in float64.
        dtype: precision that the gradients came in, which bounds what a subtraction left of the label's probability.

    Returns:
        Centred logits ``(B, classes)``; and weights ``(B,)``: large where all probabilities are known well, zero where
        the leak is not of this form.
    """
    label = torch.zeros_like(delta).scatter_(1, delta.argmin(dim=1, keepdim=True), 1.0)
    probabilities = delta + label
    smallest = torch.finfo(torch.float32).tiny
    usable = (probabilities > smallest).all(dim=1) & torch.isfinite(delta).all(dim=1)
    probabilities = torch.where(usable[:, None], probabilities, 1.0)
    logits = probabilities.log()
    # The label's probability is 1 + δ_y: a rounding error of δ_y near −1 is relative to 1, not to the probability.
    rounding = torch.finfo(dtype).eps
    error = rounding / (probabilities * label).sum(dim=1) + 10 * rounding
    weights = torch.where(usable, (10 * rounding / error).square(), 0.0)
    return logits - logits.mean(dim=1, keepdim=True), weights
