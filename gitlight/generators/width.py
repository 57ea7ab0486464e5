"""Choosing a generator's width from a budget of parameters."""

from collections.abc import Callable

import torch
from torch import nn

from gitlight.errors import ConfigError

_LARGEST_WIDTH = 1 << 20


def n_trainable(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def width_for_budget(build: Callable[[int], nn.Module], budget: int) -> int:
    """The largest width whose module has at most ``budget`` trainable parameters.

    Args:
        build: width → module; called on the ``meta`` device, so nothing is allocated. Larger widths must have more
            parameters.
        budget: trainable parameters at most.

    Raises:
        ConfigError: even width 1 has more.

    >>> width_for_budget(lambda width: nn.Linear(10, width), 115)
    10
    """

    def size(width: int) -> int:
        with torch.device("meta"):
            return n_trainable(build(width))

    if size(1) > budget:
        raise ConfigError(
            f"generator.parameters: {budget:,} is too few for this leaked model and generator; "
            f"the narrowest has {size(1):,} parameters."
        )
    low, high = 1, 2
    while high < _LARGEST_WIDTH and size(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low
