"""Inverse rules of operations that scale entries and add to them: by numbers, buffers or parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


class EntrywiseAffineRule(InverseRule):
    """``y = s x + t``, entry by entry: invertible where ``s`` and ``t`` are known, and ``s`` is not zero."""

    inverts = "yes"
    carry_needs = "nothing"

    def affine(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """``s`` and ``t``, of shapes that fit ``(B, *input_shape)``.

        Args:
            weights: must hold the parameters and buffers that these are made of.

        Raises:
            KeyError: one of them is not known.
        """
        raise NotImplementedError

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """``x = (y − t)/s``; unknown where ``s`` is zero. Upper bounds stay what they are where ``s`` is positive."""
        scale, shift = (part.to(output.value.device) for part in self.affine(weights))
        seen = scale != 0
        variance = torch.where(seen, output.variance / scale.square(), torch.inf)
        at_most = None if output.at_most is None else output.at_most & (scale > 0)
        return Estimate((output.value - shift) / torch.where(seen, scale, 1.0), variance, at_most)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ · s``."""
        scale, _ = self.affine(weights)
        return delta * scale.to(delta.device)


class _WithAnother(EntrywiseAffineRule):
    """An operation on an input and one number, buffer or parameter."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if len(layer.inputs) != 1:
            raise ArchitectureError(f"{layer.place} takes {len(layer.inputs)} results of other layers: no rule.")
        if layer.output_shape != layer.input_shape:
            raise ArchitectureError(f"{layer.place} repeats its input to another shape: no rule.")
        self._role = layer.roles[0]

    def other(self, weights: Weights) -> Tensor:
        """What the input is combined with, float64."""
        names = {**self.layer.parameters, **self.layer.constants}
        role = "other" if self._role == "self" else "self"
        if role in names:
            return weights[names[role]]
        return torch.tensor(self.layer.arguments[role], dtype=torch.float64)


@register_rule("mul", "div")
class ScaleRule(_WithAnother):
    """``c x``, ``x / c``."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if layer.kind == "div" and (self._role != "self" or layer.arguments.get("rounding_mode") is not None):
            raise ArchitectureError(f"{layer.place} divides by its input, or rounds: no rule.")

    def affine(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """``c`` or ``1/c``, and zero."""
        other = self.other(weights)
        return (other if self.layer.kind == "mul" else 1 / other), torch.zeros((), dtype=torch.float64)


@register_rule("sub", "rsub")
class DifferenceRule(_WithAnother):
    """``x − α c``, ``c − α x``."""

    carries_without_weights = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._alpha = float(layer.arguments.get("alpha", 1))
        # rsub(x, c) is c − α x.
        self._is_subtracted = (self._role == "self") != (layer.kind == "sub")
        self._scale = -self._alpha if self._is_subtracted else 1.0

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ``, or ``−α δ``, whatever ``c`` is."""
        return delta * self._scale

    def affine(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """One and ``−α c``; or ``−α`` and ``c``."""
        other = self.other(weights)
        shift = other if self._is_subtracted else -self._alpha * other
        return torch.tensor(self._scale, dtype=torch.float64), shift


@register_rule("neg")
class NegationRule(EntrywiseAffineRule):
    """``−x``."""

    def affine(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Minus one, and zero."""
        return torch.tensor(-1.0, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
