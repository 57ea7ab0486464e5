"""What a learned generator sees of how noisy each leak is."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError
from gitlight.generators.exact.features import LEVELS
from gitlight.generators.exact.leaks import usable_leaks

_ROUNDING = 1e-7
"""A leak in single precision shows no less."""

_MOST = 2.0
"""Half ranges from the middle of the range at which what is seen ends."""


def telling_weight(architecture: Architecture) -> str | None:
    """The weight whose gradient tells a leak's noise: that of the linear layer that puts out the logits.

    Of one image it has rank one but for noise.

    Returns:
        The parameter's name, or None where the model does not end in a linear layer, of one position, whose gradient is
        whole.
    """
    last = architecture[architecture.output]
    weight = last.parameters.get("weight") if last.kind == "linear" and len(last.input_shape) == 1 else None
    return None if weight in architecture.sketched else weight


def check_noise_range(noise_range: Sequence[float] | None, architecture: Architecture, client_batch_size: int) -> None:
    """``generator.noise_range`` is one, of leaks that can tell their noise; null and [] are none.

    Raises:
        ConfigError: it is no range, or averages over images, or sketches, are to tell it.
    """
    if not noise_range:
        return
    if client_batch_size > 1 or architecture.sketched:
        raise ConfigError(
            "generator.noise_range: only the whole gradient of one image tells its noise. Give "
            "generator.noise_range=null."
        )
    if len(noise_range) != 2 or not 0 <= noise_range[0] <= noise_range[1] or noise_range[1] <= 0:
        raise ConfigError(
            f"generator.noise_range: {list(noise_range)} is not a lowest and a highest level of noise, as [0, 0.1] is."
        )


class NoiseLevel:
    """Reads the noise of single images' leaks off the gradient of the last layer's weight.

    Attributes:
        n_entries: numbers that a network sees of it: one, or none where leaks do not tell it.
    """

    def __init__(self, architecture: Architecture, noise_range: Sequence[float] | None) -> None:
        """``noise_range``: lowest and highest noise, over the root mean square of a leak's entries; None: not seen."""
        self._weight = telling_weight(architecture) if noise_range else None
        self._untold = architecture[architecture.output].place if noise_range and self._weight is None else None
        self.n_entries = 0 if self._weight is None else 1
        lowest, highest = noise_range or (1.0, 1.0)
        edges = [math.log10(max(level, _ROUNDING)) for level in (lowest, highest)]
        self._middle, self._half = sum(edges) / 2, max((edges[1] - edges[0]) / 2, 0.5)

    def describe(self) -> str:
        """What a user should know of it; empty if nothing."""
        if self._untold is None:
            return ""
        return f"The leaked model ends in {self._untold}, whose gradient does not tell a leak's noise: it is not seen."

    def logarithms(self, gradients: Gradients) -> Tensor:
        """``(B,)`` float64: decimal logarithms of leaks' relative noise, in `LEVELS`; the highest of unusable ones.

        Not to be called where ``n_entries`` is 0.
        """
        assert self._weight is not None
        leaks = usable_leaks(gradients, {self._weight}, None, self._weight)
        n_leaks = len(next(iter(gradients.values())))
        levels = leaks.noise.new_full((n_leaks,), LEVELS[1])
        return levels.index_copy(0, leaks.which, leaks.relative_noise.clamp_min(1e-300).log10().clamp(*LEVELS))

    def seen(self, gradients: Gradients) -> Tensor:
        """``(B, n_entries)`` float32: from -1 to 1 over the range, and somewhat beyond it."""
        first = next(iter(gradients.values()))
        if self._weight is None:
            return torch.zeros(len(first), 0, device=first.device)
        levels = (self.logarithms(gradients) - self._middle) / self._half
        return levels.clamp(-_MOST, _MOST).float().unsqueeze(1)
