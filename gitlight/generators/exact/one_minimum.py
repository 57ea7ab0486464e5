"""Inverse rules of activation functions with one minimum: GELU, SiLU, Mish, Hardswish."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gitlight.architecture import Layer
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


class OneMinimum(InverseRule):
    """Such functions fall to a minimum and rise from there: an output above zero has one input, one below has two.

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
class GELURule(OneMinimum):
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
class SiLURule(OneMinimum):
    """``z · sigmoid(z)``."""

    lowest = -1.2784645427610738

    @override
    def function(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.silu(inputs)

    @override
    def slope(self, inputs: Tensor) -> Tensor:
        gate = torch.sigmoid(inputs)
        return gate * (1 + inputs * (1 - gate))


@register_rule("mish")
class MishRule(OneMinimum):
    """``z · tanh(log(1 + exp z))``."""

    lowest = -1.1924312012340293

    @override
    def function(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.mish(inputs)

    @override
    def slope(self, inputs: Tensor) -> Tensor:
        gate = torch.tanh(torch.nn.functional.softplus(inputs))
        return gate + inputs * (1 - gate.square()) * torch.sigmoid(inputs)


@register_rule("hardswish")
class HardswishRule(OneMinimum):
    """``z · min(max(z + 3, 0), 6) / 6``: below -3 it is zero, as at zero, which is taken for it."""

    lowest = -1.5

    @override
    def function(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.hardswish(inputs)

    @override
    def slope(self, inputs: Tensor) -> Tensor:
        between = (2 * inputs + 3) / 6
        return torch.where(inputs >= 3, 1.0, torch.where(inputs <= -3, 0.0, between))
