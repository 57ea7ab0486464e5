"""The inverse rule of all operations that only move entries: flatten, reshape, permute, select, …; dropout, too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.architecture import MOVES, Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


@register_rule(*MOVES)
class MoveRule(InverseRule):
    """Every entry of the output is one entry of the input: exact where all entries of the input arrive.

    Which goes where is found by sending the numbers 0, 1, 2, … through the operation once.
    """

    inverts = "yes"
    carry_needs = "nothing"
    homogeneous = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if layer.kind.endswith("dropout") and layer.arguments["train"] and layer.arguments["p"] > 0:
            raise ArchitectureError(
                f"{layer.place} drops entries at random in evaluation mode, too: which ones, no gradient tells. "
                "With training=self.training it is off there."
            )
        # What is detached is seen, but nothing flows back: Σ δ·x is lost.
        self.homogeneous = layer.kind != "detach"  # type: ignore[misc]  # depends on the kind
        if not layer.inputs:
            return  # a parameter that is moved: there is no input to find
        self._source = _source(layer)
        self._n = _size(layer.input_shape)
        missing = self._n - len(self._source.unique())
        if missing:
            self.loses = f"{missing} of {self._n} entries of its input are dropped"

    @property
    def complete(self) -> bool:
        """Whether every entry of the input arrives in the output."""
        return not self.loses

    def moved(self, values: Tensor) -> Tensor:
        """What the operation itself does to one example: ``(*input_shape)`` to ``(*output_shape)``."""
        return values.flatten()[self._source].view(self.layer.output_shape)

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """The entries put back; unknown (infinite variance) where an entry was dropped."""
        source = self._source.to(output.value.device)
        shape = (len(output.value), self._n)
        value = output.value.new_zeros(shape)
        value[:, source] = output.value.flatten(1)
        variance = output.value.new_full(shape, torch.inf)
        variance[:, source] = output.variance.expand_as(output.value).flatten(1)
        at_most = None
        if output.at_most is not None:
            at_most = torch.zeros(shape, dtype=torch.bool, device=value.device)
            at_most[:, source] = output.at_most.flatten(1)
        return Estimate(value, variance, at_most).reshaped(self.layer.input_shape)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ`` put back; entries that were repeated add up, and nothing passes a detached one."""
        carried = delta.new_zeros(len(delta), self._n)
        if self.layer.kind == "detach":
            return carried.view(-1, *self.layer.input_shape)
        carried.index_add_(1, self._source.to(delta.device), delta.flatten(1))
        return carried.view(-1, *self.layer.input_shape)


def _source(layer: Layer) -> Tensor:
    """Which entry of the input each entry of the output is.

    An operation was traced with a batch of one in front of the input's shape; or, where attention had moved that
    dimension elsewhere, on the shape itself.
    """
    numbers = torch.arange(_size(layer.input_shape), dtype=torch.float64)
    for shape in ((1, *layer.input_shape), layer.input_shape):
        try:
            moved = layer.apply([numbers.view(shape)], {})
        except (IndexError, RuntimeError):
            continue
        if layer.output_shape == (moved.shape[1:] if moved.shape[:1] == (1,) else moved.shape):
            return moved.flatten().long()
    raise ArchitectureError(f"{layer.place} does not move entries of {layer.input_shape} to {layer.output_shape}.")


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
