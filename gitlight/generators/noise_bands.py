"""A linear start for a range of noise: one regression for each band of levels."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients
from gitlight.generators.base import FitOn, Generator
from gitlight.generators.hybrid_fits import Regression, Start
from gitlight.generators.noise_level import check_noise_range, telling_weight

_SHOWS = 1e-5
"""Noise below this changes little of a start that is fitted without any: nothing on LeNet, where 1e-4 costs 0.9 dB."""


def bands_of(noise_range: Sequence[float]) -> list[tuple[float, float]]:
    """Bands of noise, about one for each power of ten from where noise shows; one for all that there is below.

    Where the range begins at zero, that one is of leaks without noise.

    Args:
        noise_range: lowest and highest level, relative to the root mean square of a leak's entries; a range.

    >>> bands_of([1e-3, 1e-1])
    [(0.001, 0.01), (0.01, 0.1)]
    >>> [highest for _, highest in bands_of([0, 1e-4])]
    [0.0, 0.0001]
    """
    lowest, highest = noise_range
    hidden = []
    if lowest < _SHOWS < highest or lowest == 0:
        hidden = [(lowest, _SHOWS if lowest else 0.0)]
    lowest = min(max(lowest, _SHOWS), highest)
    count = max(1, round(math.log10(highest / lowest)))
    edges = [float(f"{lowest * (highest / lowest) ** (number / count):.6g}") for number in range(count + 1)]
    return [*hidden, *itertools.pairwise(edges)]


def bands_for(
    noise_range: Sequence[float] | None, architecture: Architecture, client_batch_size: int
) -> list[tuple[float, float]]:
    """`bands_of` a generator's ``noise_range``; none where it has none, or where leaks do not tell their noise.

    Raises:
        ConfigError: as `check_noise_range`.
    """
    check_noise_range(noise_range, architecture, client_batch_size)
    return bands_of(noise_range) if noise_range and telling_weight(architecture) else []


class BandedRegression(nn.Module):
    """`RidgeRegression`, a separate one for leaks of each band of noise.

    What is the best estimate from noisy features is not from exact ones: one regression for all levels loses much at
    every one of them.
    """

    def __init__(self, regressions: Sequence[Regression], bands: Sequence[tuple[float, float]]) -> None:
        """Args: one for each band, each of which chooses weights for itself; and the bands."""
        super().__init__()
        self.regressions = nn.ModuleList(regressions)
        self._bands = list(bands)
        edges = [max(highest, _SHOWS) for _, highest in bands[:-1]]
        self._edges = [math.log10(edge) for edge in edges]

    def band(self, number: int) -> Regression:
        """The regression of one band."""
        regression = self.regressions[number]
        assert isinstance(regression, Regression)
        return regression

    def fits(self, of_one: Callable[[Regression, bool], Iterable[FitOn]]) -> Iterator[FitOn]:
        """The fits of each band, on pairs with noise of it.

        Args:
            of_one: from a band's regression, and whether what is common to all bands is to be fitted, too, to its fits.
        """
        for number, band in enumerate(self._bands):
            # What is common to all bands goes by the noisiest: there features differ most.
            common = number == len(self._bands) - 1
            for fit in of_one(self.band(number), common):
                yield FitOn(fit, noise=band)

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


def started(start: Start | BandedRegression, features: Tensor, levels: Tensor | None) -> Tensor:
    """What a linear start makes of features ``(B, n)``; of bands, with leaks' ``levels``, as `BandedRegression` has."""
    if isinstance(start, BandedRegression):
        assert levels is not None
        return start(features, levels)
    return start(features)


def error_of(start: Start | BandedRegression, levels: Tensor | None) -> Tensor:
    """The start's error, of all leaks, ``()``, or of each, ``(B, 1, 1, 1, 1)``."""
    if isinstance(start, BandedRegression):
        assert levels is not None
        # As in `AsItIs`: below one thousandth of a grey level there is nothing to learn, nor to divide by.
        return start.errors(levels).clamp_min(1e-6).float().view(-1, 1, 1, 1, 1)
    return start.error.float()


class TrainsByBands(Generator):
    """Trains on errors over those of each leak's start, where that is of bands of noise.

    Leaks with much noise would otherwise be all that counts.
    """

    ridge: nn.Module | None

    def refined(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the start's error, as `error_of` gives it."""
        raise NotImplementedError

    @property
    def has_own_loss(self) -> bool:
        """For a range of noise."""
        return isinstance(self.ridge, BandedRegression)

    def training_loss(self, gradients: Gradients, images: Tensor) -> Tensor:
        """Squared errors over those of each leak's start."""
        found, error = self.refined(gradients)
        return ((found - images) / error).square().mean()
