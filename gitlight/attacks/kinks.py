"""The second derivative of ReLUs, spread over the units that are about to switch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gitlight.architecture import Architecture, Layer

KINKED = ("relu", "leaky_relu")


def spread_kinks(architecture: Architecture, width: float) -> Architecture:
    """A copy whose ReLUs have the same values and first derivatives, and another second derivative.

    A ReLU's second derivative is zero but at its kink, where it is infinite: automatic differentiation of a gradient
    takes zero, and knows nothing of units that switch. Of many units some are always about to, and their mean is what
    this puts in the place of zero: a bump of the area of the kink, the derivative of a logistic function. Gradients,
    and so the distance that is minimised, stay as they are to rounding; only the direction in which the search goes
    changes.

    Args:
        architecture: of the leaked model.
        width: of the logistic function, in root mean squares of the layer's input for one image; 0: as it is.
    """
    if width == 0:
        return architecture
    layers = (_Spread(**vars(layer), width=width) if layer.kind in KINKED else layer for layer in architecture.layers)
    return replace(architecture, layers=tuple(layers))


@dataclass(frozen=True)
class _Spread(Layer):
    """A ReLU with another second derivative."""

    width: float

    def apply(self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """The operation's result."""
        (x,) = inputs
        slope = float(self.arguments.get("negative_slope", 0.0))
        width = self.width * x.detach().square().mean().sqrt() + torch.finfo(x.dtype).tiny
        smooth = -logsigmoid(-x / width) * width  # unlike softplus in torch, without a threshold
        # A line on top, which no derivative sees but the first, makes value and first derivative the ReLU's.
        tilt = ((x > 0).to(x) - torch.sigmoid(x / width)).detach()
        shift = (x.relu() - smooth - tilt * x).detach()
        return (1 - slope) * (smooth + tilt * x + shift) + slope * x
