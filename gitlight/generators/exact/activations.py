"""Inverses and derivatives of activation functions, from their output."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gitlight.architecture import Layer

# How close to a saturated value (0 or 1 of a sigmoid, ±1 of tanh) an output is trusted to be told from it.
# float32 gradients give an output to about 1e-7.
_SATURATION = 1e-6


@dataclass(frozen=True)
class ActivationRule:
    """What an activation's output tells.

    Attributes:
        inverse: output → input, where the function is one to one; None where it is not.
        derivative: output → σ'(input), which Eq. (3) of the back-propagation needs; exact except where noted.
    """

    inverse: Callable[[Tensor], Tensor] | None
    derivative: Callable[[Tensor], Tensor]


def activation_rule(layer: Layer) -> ActivationRule | None:
    """The rule of an activation layer, or None if its derivative does not follow from its output (GELU, SiLU)."""
    module = layer.operation
    if isinstance(module, nn.Sigmoid):
        return ActivationRule(lambda a: torch.logit(a, _SATURATION), lambda a: (a * (1 - a)).clamp_min(0))
    if isinstance(module, nn.Tanh):
        bound = 1 - _SATURATION
        return ActivationRule(lambda a: torch.atanh(a.clamp(-bound, bound)), lambda a: (1 - a.square()).clamp_min(0))
    if isinstance(module, nn.LeakyReLU) and module.negative_slope > 0:
        slope = module.negative_slope
        return ActivationRule(
            lambda a: torch.where(a > 0, a, a / slope),
            lambda a: torch.where(a > 0, 1.0, slope).to(a.dtype),
        )
    if isinstance(module, nn.ReLU):
        # Which units are off is known, how far they are off is not: no inverse.
        return ActivationRule(None, lambda a: (a > _SATURATION).to(a.dtype))
    return None
