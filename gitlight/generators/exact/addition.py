"""The inverse rules of sums: of two branches (a residual join), and of a branch and a parameter (an embedding)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


@register_rule("add")
class AdditionRule(InverseRule):
    """``z = x + y``: both branches have the ``δ`` of the sum; one follows from the sum and the other.

    A parameter that is added entry by entry, such as a learned position embedding, has the gradient ``δ`` itself: the
    strongest leak there is (docs/inversion.md).
    """

    inverts = "partly"
    carry_needs = "nothing"
    carries_without_weights = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if layer.arguments.get("alpha", 1) != 1:
            raise ArchitectureError(f"{layer.place} adds a multiple (alpha={layer.arguments['alpha']}): no rule.")
        self.parameter = next(iter(layer.parameters.values()), None)
        self.homogeneous = len(layer.inputs) == 2  # type: ignore[misc]  # depends on the operands
        if len(layer.inputs) == 2:
            self.loses = "how the sum is shared out between its two branches, unless one is known"

    def reveals_delta(self) -> str | None:
        """The added parameter."""
        return self.parameter

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """The sum less the other branch, or less the parameter, the buffer or the number that was added.

        Raises:
            ValueError: the other branch is not known.
            KeyError: the parameter or buffer is not.
        """
        shape = self.layer.input_shapes[position]
        if len(self.layer.inputs) == 1:
            name = next(iter((*self.layer.parameters.values(), *self.layer.constants.values())), None)
            added = self.layer.arguments["other"] if name is None else weights[name]
            return _averaged_to(Estimate(output.value - added, output.variance, output.at_most), shape)
        other = others[1 - position]
        if other is None:
            raise ValueError(f"{self.layer.place}: neither branch is known, only their sum")
        return _averaged_to(Estimate(output.value - other.value, output.variance + other.variance), shape)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ``, summed over what was repeated to fit."""
        return _sum_to(delta, self.layer.input_shapes[position])


def _averaged_to(estimate: Estimate, shape: Sequence[int]) -> Estimate:
    """One entry from all that it was repeated to; ``(B, *shape)``."""
    if estimate.value.shape[1:] == torch.Size(shape):
        return estimate
    variance = _sum_to(estimate.variance.expand_as(estimate.value), shape)
    count = estimate.value.numel() / variance.numel()
    return Estimate(_sum_to(estimate.value, shape) / count, variance / count**2)


def _sum_to(delta: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo broadcasting of ``(B, *shape)``."""
    return delta.sum_to_size(len(delta), *[1] * (delta.dim() - 1 - len(shape)), *shape).reshape(len(delta), *shape)
