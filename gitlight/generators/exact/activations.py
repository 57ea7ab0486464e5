"""Inverse rules of activation functions, from their output."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule

CLOSEST = 1e-12
# How close to a bound an output of sigmoid or tanh is taken for what it is: rounding of float64 gradients and of the
# solves gives outputs to about 1e-13. What noise does to an output is in its variance, not here.


_SURE = 4.0
"""Standard deviations from zero beyond which a value's sign is not in doubt."""


class InvertibleActivation(InverseRule):
    """One to one: ``z = σ⁻¹(a)``, and ``σ'(z)`` follows from ``a``."""

    inverts = "yes"
    carry_needs = "output"

    def inverse(self, outputs: Tensor) -> Tensor:
        """``σ⁻¹(a)``."""
        raise NotImplementedError

    def derivative(self, outputs: Tensor) -> Tensor:
        """``σ'(z)`` from ``a = σ(z)``."""
        raise NotImplementedError

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """``σ⁻¹(a)``; an error of ``a`` grows by ``1/σ'``, which is how saturation shows."""
        slope = self.derivative(self._inside(output.value))
        return Estimate(self.inverse(self._inside(output.value)), output.variance / slope.square())

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ ⊙ σ'``, with ``σ'`` from the output."""
        assert output is not None, "carry_needs says so"
        return delta * self.derivative(self._inside(output.value))

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs

    def saturated(self, output: Estimate) -> Tensor:
        """``(B,)``: the share of entries whose error is as large as their distance to where the slope vanishes."""
        return output.value.new_zeros(len(output.value))


@register_rule("sigmoid")
class SigmoidRule(InvertibleActivation):
    """``z = log a/(1−a)``, ``σ' = a(1−a)``."""

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        return torch.logit(outputs)

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return outputs * (1 - outputs)

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(CLOSEST, 1 - CLOSEST)

    @override
    def saturated(self, output: Estimate) -> Tensor:
        return share_at_bounds(torch.minimum(output.value, 1 - output.value), output.variance)


@register_rule("tanh")
class TanhRule(InvertibleActivation):
    """``z = artanh a``, ``σ' = 1 − a²``."""

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        return torch.atanh(outputs)

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return (1 - outputs) * (1 + outputs)

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(-1 + CLOSEST, 1 - CLOSEST)

    @override
    def saturated(self, output: Estimate) -> Tensor:
        return share_at_bounds(1 - output.value.abs(), output.variance)


@register_rule("leaky_relu")
class LeakyReLURule(InvertibleActivation):
    """``z = a`` or ``a / slope``, ``σ' = 1`` or ``slope``, by the sign of ``a``.

    Where an error may have changed that sign, one layer's equations settle it: `gitlight.generators.exact.signs`.
    """

    homogeneous = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.slope = float(layer.arguments["negative_slope"])
        self.slopes = (1.0, self.slope)
        if self.slope <= 0:
            raise ArchitectureError(
                f"{layer.place} has negative_slope={self.slope:g}: its input does not follow from its output, as "
                "it does for a slope above zero. A slope of zero is relu."
            )

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        return torch.where(outputs > 0, outputs, outputs / self.slope)

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return torch.where(outputs > 0, 1.0, self.slope).to(outputs.dtype)

    @override
    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """By the sign; where that is not sure, with the larger of the two errors."""
        found = super().invert(output, position, others, weights)
        unsure = output.value.square() < _SURE**2 * output.variance
        return Estimate(found.value, torch.where(unsure, output.variance / min(1.0, self.slope) ** 2, found.variance))


@register_rule("relu")
class ReLURule(InverseRule):
    """Known where the unit is on, at most zero where it is off; ``σ'`` is known everywhere."""

    inverts = "partly"
    carry_needs = "output"
    homogeneous = True
    loses = "how far below zero a unit is that is off"

    def on(self, output: Estimate) -> Tensor:
        """Which units are on: above zero by more than rounding, or by more than half of their error."""
        largest = output.value.flatten(1).abs().amax(dim=1).clamp_min(1e-300)
        rounding = 1e-7 * largest.view(-1, *[1] * (output.value.dim() - 1))
        # A minimum-error decision between 0 and a positive value puts the threshold between the two.
        return output.value > torch.maximum(rounding, 2 * output.variance.sqrt())

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """``z = a`` where on; elsewhere the bound 0."""
        on = self.on(output)
        value = torch.where(on, output.value, 0.0)
        return Estimate(value, torch.where(on, output.variance, torch.inf), ~on)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ`` where on, zero elsewhere."""
        assert output is not None, "carry_needs says so"
        return delta * self.on(output)


def share_at_bounds(distance: Tensor, variance: Tensor) -> Tensor:
    """``(B,)``: the share of entries no farther from a bound than their error, or than float64 can tell."""
    # Also without any error: float64 cannot tell a bound from what is within CLOSEST of it.
    lost = distance <= torch.maximum(variance.expand_as(distance).sqrt(), torch.full_like(distance, 2 * CLOSEST))
    return lost.flatten(1).double().mean(dim=1)
