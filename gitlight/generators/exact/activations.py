"""Inverse rules of activation functions, from their output."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule

_CLOSEST = 1e-12
# How close to a bound an output of sigmoid or tanh is taken for what it is: rounding of float64 gradients and of the
# solves gives outputs to about 1e-13. What noise does to an output is in its variance, not here.


_SURE = 4.0
"""Standard deviations from zero beyond which a value's sign is not in doubt."""


class _InvertibleActivation(InverseRule):
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
class SigmoidRule(_InvertibleActivation):
    """``z = log a/(1−a)``, ``σ' = a(1−a)``."""

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        return torch.logit(outputs)

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return outputs * (1 - outputs)

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(_CLOSEST, 1 - _CLOSEST)

    @override
    def saturated(self, output: Estimate) -> Tensor:
        return _share_at_bounds(torch.minimum(output.value, 1 - output.value), output.variance)


@register_rule("tanh")
class TanhRule(_InvertibleActivation):
    """``z = artanh a``, ``σ' = 1 − a²``."""

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        return torch.atanh(outputs)

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return (1 - outputs) * (1 + outputs)

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(-1 + _CLOSEST, 1 - _CLOSEST)

    @override
    def saturated(self, output: Estimate) -> Tensor:
        return _share_at_bounds(1 - output.value.abs(), output.variance)


@register_rule("leaky_relu")
class LeakyReLURule(_InvertibleActivation):
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


class _OneMinimum(InverseRule):
    """GELU and SiLU fall to a minimum and rise from there: an output above zero has one input, one below has two.

    The larger of the two, on the rising branch, is taken: inputs below the minimum are wrong, and with them their
    ``σ'``. The walk therefore does not call what follows exact.
    """

    inverts = "partly"
    carry_needs = "output"
    carry_exact = False
    lowest: float
    loses = "which of two inputs gave an output below zero"

    def function(self, inputs: Tensor) -> Tensor:
        """The activation function."""
        raise NotImplementedError

    def slope(self, inputs: Tensor) -> Tensor:
        """Its derivative."""
        raise NotImplementedError

    def inverse(self, outputs: Tensor) -> Tensor:
        """The input on the rising branch, by Newton's method with bisection for safety."""
        low = torch.full_like(outputs, self.lowest)
        high = outputs.clamp_min(0) + 1.0
        guess = 0.5 * (low + high)
        for _ in range(80):
            above = self.function(guess) > outputs
            high, low = torch.where(above, guess, high), torch.where(above, low, guess)
            step = (self.function(guess) - outputs) / self.slope(guess)
            newton = guess - step
            guess = torch.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
        return guess

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """The larger of the inputs; unknown where the output is below zero, with the minimum as no bound."""
        value = self.inverse(output.value)
        slope = self.slope(value).clamp_min(1e-12)
        variance = torch.where(output.value > 0, output.variance / slope.square(), torch.inf)
        return Estimate(value, variance)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ ⊙ σ'`` on the rising branch."""
        assert output is not None, "carry_needs says so"
        return delta * self.slope(self.inverse(output.value))


@register_rule("gelu")
class GELURule(_OneMinimum):
    """``z Φ(z)``, or its tanh approximation."""

    lowest = -0.7517915246935645

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._approximate: Literal["none", "tanh"] = layer.arguments.get("approximate", "none")
        if self._approximate == "tanh":
            self.lowest = -0.7524614220710163

    @override
    def function(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.gelu(inputs, approximate=self._approximate)

    @override
    def slope(self, inputs: Tensor) -> Tensor:
        if self._approximate == "tanh":
            scale = math.sqrt(2 / math.pi)
            inner = torch.tanh(scale * (inputs + 0.044715 * inputs**3))
            return 0.5 * (1 + inner) + 0.5 * inputs * (1 - inner**2) * scale * (1 + 3 * 0.044715 * inputs**2)
        density = torch.exp(-0.5 * inputs.square()) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(inputs) + inputs * density


@register_rule("silu")
class SiLURule(_OneMinimum):
    """``z · sigmoid(z)``."""

    lowest = -1.2784645427610738

    @override
    def function(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.silu(inputs)

    @override
    def slope(self, inputs: Tensor) -> Tensor:
        gate = torch.sigmoid(inputs)
        return gate * (1 + inputs * (1 - gate))


def _share_at_bounds(distance: Tensor, variance: Tensor) -> Tensor:
    # Also without any error: float64 cannot tell a bound from what is within _CLOSEST of it.
    lost = distance <= torch.maximum(variance.expand_as(distance).sqrt(), torch.full_like(distance, 2 * _CLOSEST))
    return lost.flatten(1).double().mean(dim=1)
