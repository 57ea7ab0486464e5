"""The inverse rule of concatenation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


@register_rule("cat")
class ConcatenationRule(InverseRule):
    """Every input is a slice of the output: value and ``δ`` alike, exactly."""

    inverts = "yes"
    carry_needs = "nothing"
    homogeneous = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if layer.parameters or layer.constants:
            raise ArchitectureError(
                f"{layer.place} takes a parameter or buffer as it is, which its inverse rule does not know. "
                "Expanded to the batch first, as models of more than one image at a time do, it works."
            )
        self._dimension = _dimension(layer)
        sizes = [shape[self._dimension - 1] for shape in layer.input_shapes]
        self._spans = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """The input's slice."""
        at_most = None if output.at_most is None else self._slice(output.at_most, position)
        variance = output.variance.expand_as(output.value)
        return Estimate(self._slice(output.value, position), self._slice(variance, position), at_most)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """The input's slice of ``δ``."""
        return self._slice(delta, position)

    def _slice(self, values: Tensor, position: int) -> Tensor:
        start, size = self._spans[position]
        return values.narrow(self._dimension, start, size)


def _dimension(layer: Layer) -> int:
    """Along which dimension of ``(B, *output_shape)``.

    The batch is the first dimension of the traced operation, or, where attention had moved it elsewhere, one that the
    shape has itself; negative dimensions count from the last, so that it does not matter.
    """
    given = int(layer.arguments["dim"])
    if given < 0:
        return given + len(layer.output_shape) + 1
    for dimension in (given, given + 1):
        meta = [torch.empty(1, *shape, device="meta") for shape in layer.input_shapes]
        try:
            joined = torch.cat(meta, dim=dimension)
        except (IndexError, RuntimeError):
            continue
        if joined.shape == (1, *layer.output_shape):
            return dimension
    raise ArchitectureError(f"{layer.place} puts the examples of a batch side by side: no rule.")
