"""A linear start for a range of noise: one regression for each band of levels."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gitlight.errors import ConfigError
from gitlight.generators.hybrid_fits import AsItIsOrRegression
from gitlight.generators.ridge import RidgeRegression

_SHOWS = 1e-5
"""Noise below this changes little of a start that is fitted without any: nothing on LeNet, where 1e-4 costs 0.9 dB."""


def bands_of(noise_range: Sequence[float]) -> list[tuple[float, float]]:
    """Bands of noise, about one for each power of ten from where noise shows; one for all that there is below.

    Where the range begins at zero, that one is of leaks without noise.

    Args:
        noise_range: lowest and highest level, relative to the root mean square of a leak's entries.

    Raises:
        ConfigError: these are not two such levels.

    >>> bands_of([1e-3, 1e-1])
    [(0.001, 0.01), (0.01, 0.1)]
    >>> [highest for _, highest in bands_of([0, 1e-4])]
    [0.0, 0.0001]
    """
    if len(noise_range) != 2 or not 0 <= noise_range[0] <= noise_range[1] or noise_range[1] <= 0:
        raise ConfigError(
            f"generator.noise_range: {list(noise_range)} is not a lowest and a highest level of noise, as [0, 0.1] is."
        )
    lowest, highest = noise_range
    hidden = []
    if lowest < _SHOWS < highest or lowest == 0:
        hidden = [(lowest, _SHOWS if lowest else 0.0)]
    lowest = min(max(lowest, _SHOWS), highest)
    count = max(1, round(math.log10(highest / lowest)))
    edges = [float(f"{lowest * (highest / lowest) ** (number / count):.6g}") for number in range(count + 1)]
    return [*hidden, *itertools.pairwise(edges)]


class BandedRegression(nn.Module):
    """`RidgeRegression`, a separate one for leaks of each band of noise.

    What is the best estimate from noisy features is not from exact ones: one regression for all levels loses much at
    every one of them.
    """

    def __init__(
        self, regressions: Sequence[RidgeRegression | AsItIsOrRegression], bands: Sequence[tuple[float, float]]
    ) -> None:
        """Args: one for each band, each of which chooses weights for itself; and the bands."""
        super().__init__()
        self.regressions = nn.ModuleList(regressions)
        edges = [max(highest, _SHOWS) for _, highest in bands[:-1]]
        self._edges = [math.log10(edge) for edge in edges]

    def band(self, number: int) -> RidgeRegression | AsItIsOrRegression:
        """The regression of one band."""
        regression = self.regressions[number]
        assert isinstance(regression, RidgeRegression | AsItIsOrRegression)
        return regression

    def bands_of(self, levels: Tensor) -> Tensor:
        """Decimal logarithms of leaks' noise ``(B,)`` to the numbers of their bands ``(B,)``."""
        return torch.bucketize(levels.contiguous(), torch.tensor(self._edges, dtype=levels.dtype, device=levels.device))

    def forward(self, features: Tensor, levels: Tensor) -> Tensor:
        """``(B, n_features)`` float64 and ``(B,)`` to ``(B, n_outputs)``, float32."""
        bands = self.bands_of(levels)
        found = self.band(0)(features)
        for number in range(1, len(self.regressions)):
            its = (bands == number).nonzero().squeeze(1)
            if len(its):
                found = found.index_copy(0, its, self.band(number)(features[its]))
        return found

    def errors(self, levels: Tensor) -> Tensor:
        """``(B,)``: the root mean square error of each leak's regression on pairs held out."""
        errors = torch.stack([self.band(number).error for number in range(len(self.regressions))])
        return errors[self.bands_of(levels)]
