"""Inverse rules of activation functions that are clipped at two bounds: Hardtanh, ReLU6, Hardsigmoid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


@register_rule("hardtanh", "relu6", "hardsigmoid")
class ClippedRule(InverseRule):
    """``min(max(s z + t, low), high)``: known between the bounds, where the slope is ``s``; beyond, it is zero."""

    inverts = "partly"
    carry_needs = "output"
    loses = "how far beyond its bounds a unit is"

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._slope, self._shift = (1 / 6, 0.5) if layer.kind == "hardsigmoid" else (1.0, 0.0)
        bounds = {"hardsigmoid": (0.0, 1.0), "relu6": (0.0, 6.0)}
        if layer.kind == "hardtanh":
            bounds["hardtanh"] = (float(layer.arguments["min_val"]), float(layer.arguments["max_val"]))
        self._low, self._high = bounds[layer.kind]
        if self._low >= self._high:
            raise ArchitectureError(f"{layer.place} has bounds {self._low:g} and {self._high:g}, and gives one number.")

    def between(self, output: Estimate) -> Tensor:
        """Which units are between the bounds, by more than rounding, or by more than half of their error."""
        # One bound may be far beyond all values, as of nn.Hardtanh(0, 1e9).
        largest = (output.value - self._low).flatten(1).abs().amax(dim=1)
        rounding = 1e-7 * largest.clamp(1e-300, self._high - self._low)
        distance = torch.minimum(output.value - self._low, self._high - output.value)
        return distance > torch.maximum(rounding.view(-1, *[1] * (distance.dim() - 1)), 2 * output.variance.sqrt())

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """``(a − t)/s`` between the bounds; below, the lower one's input as a bound; above, unknown."""
        between = self.between(output)
        value = (output.value.clamp(self._low, self._high) - self._shift) / self._slope
        variance = torch.where(between, output.variance / self._slope**2, torch.inf)
        below = ~between & (output.value - self._low < self._high - output.value)
        return Estimate(value, variance, below)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``s δ`` between the bounds, zero beyond."""
        assert output is not None, "carry_needs says so"
        return self._slope * delta * self.between(output)
