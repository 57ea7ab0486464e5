"""Inverse rules of activation functions that end in an exponential: ELU, SELU, CELU, softplus, log-sigmoid.

Each is one to one, towards a bound that it never reaches. Units there are lost to rounding as those of a sigmoid, but
pass next to nothing of ``δ``: what is found below comes from the others, and is no estimate for them.
"""

import torch
from torch import Tensor
from typing_extensions import override

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.activations import CLOSEST, InvertibleActivation
from gitlight.generators.exact.rule import register_rule

_SELU = (1.6732632423543772, 1.0507009873554805)
"""``α`` and scale (Klambauer et al. 2017)."""

_LEAST_THRESHOLD = 15.0
"""Of softplus: it jumps by ``log(1 + exp(−threshold))/β`` there, 3e-7 for this one, and 2e-9 for the usual 20."""


@register_rule("elu", "selu", "celu")
class ELURule(InvertibleActivation):
    """``s z`` above zero and ``s α (exp(c z) − 1)`` below, whose slope is ``c (a + s α)``."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        given = layer.arguments
        if layer.kind == "selu":
            alpha, scale, input_scale = *_SELU, 1.0
        elif layer.kind == "celu":
            alpha, scale, input_scale = float(given["alpha"]), 1.0, 1 / float(given["alpha"])
        else:
            alpha, scale, input_scale = (float(given[name]) for name in ("alpha", "scale", "input_scale"))
        if min(alpha, scale, input_scale) <= 0:
            raise ArchitectureError(
                f"{layer.place} has alpha={alpha:g}: its input does not follow from its output, as it does for one "
                "above zero."
            )
        self._scale, self._input_scale, self._depth = scale, input_scale, scale * alpha

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        below = torch.log1p(outputs.clamp_max(0) / self._depth) / self._input_scale
        return torch.where(outputs > 0, outputs / self._scale, below)

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return torch.where(outputs > 0, self._scale, self._input_scale * (outputs + self._depth))

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs.clamp_min(-self._depth * (1 - CLOSEST))


@register_rule("softplus")
class SoftplusRule(InvertibleActivation):
    """``log(1 + exp(β z))/β``, or ``z`` itself where ``β z`` is above the threshold."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._beta, self._threshold = (float(layer.arguments[name]) for name in ("beta", "threshold"))
        if self._beta <= 0:
            raise ArchitectureError(f"{layer.place} has beta={self._beta:g}: there is a rule for one above zero.")
        if self._threshold < _LEAST_THRESHOLD:
            raise ArchitectureError(
                f"{layer.place} has threshold={self._threshold:g}: it jumps there, and outputs near it have two "
                f"inputs each. There is a rule for one of {_LEAST_THRESHOLD:g} or more."
            )

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        curved = outputs + torch.log(-torch.expm1(-self._beta * outputs)) / self._beta
        return torch.where(self._straight(outputs), outputs, curved)

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return torch.where(self._straight(outputs), 1.0, -torch.expm1(-self._beta * outputs))

    def _straight(self, outputs: Tensor) -> Tensor:
        return outputs * self._beta > self._threshold

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs.clamp_min(CLOSEST)


@register_rule("log_sigmoid")
class LogSigmoidRule(InvertibleActivation):
    """``−log(1 + exp(−z))``, whose slope is ``1 − exp a``."""

    @override
    def inverse(self, outputs: Tensor) -> Tensor:
        return outputs - torch.log(-torch.expm1(outputs))

    @override
    def derivative(self, outputs: Tensor) -> Tensor:
        return -torch.expm1(outputs)

    def _inside(self, outputs: Tensor) -> Tensor:
        return outputs.clamp_max(-CLOSEST)
