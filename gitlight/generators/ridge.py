"""Ridge regression from sums over pairs, its strength chosen on pairs held out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gitlight.errors import DataError

STRENGTHS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate strengths, over the mean diagonal of the standardised features' covariance (which is 1)."""

WEIGHTS = ((1.0, 1.0), (0.1, 1.0), (0.0, 1.0), (1.0, 0.0))
"""Candidates for how much the first features and the others count, where that is chosen, too."""

MOST_COEFFICIENTS = 1 << 27
"""Of a linear start: a gigabyte for each of its sums in double precision."""

_HELD_OUT = 10  # one pair in so many is held out while the strength is chosen
_OUTPUTS_TRIED = 64


class RidgeRegression(nn.Module):
    """``outputs ≈ (features − mean) / deviation · coefficients + offset``.

    After `solve`, ``strength`` is the one chosen and ``error`` the root mean square error on the held-out pairs.

    Works from the sums of products alone, for the kept and the held-out pairs, so one pass over the pairs fits it,
    whatever their number, and sums from several devices add up.

    >>> features = torch.randn(400, 3, dtype=torch.float64)
    >>> ridge = RidgeRegression(3, 1)
    >>> outputs = features @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + 4
    >>> ridge.add(features, outputs, torch.arange(400))
    >>> ridge.solve()
    >>> round(ridge(torch.ones(1, 3)).item(), 3)
    10.0
    """

    def __init__(self, n_features: int, n_outputs: int, n_weighed: int = 0) -> None:
        """Args: numbers of features and outputs; and how many features, the first, are weighed against the others.

        Weights are those of `WEIGHTS`, chosen as the strength is. They multiply features, so that coefficients of a
        small weight are penalised more; features of weight zero are left out, which fewer pairs are enough for.
        """
        super().__init__()
        self._n_weighed = n_weighed
        self.mean: Tensor
        self.deviation: Tensor
        self.coefficients: Tensor
        self.offset: Tensor
        self.strength: Tensor
        self.register_buffer("mean", torch.zeros(n_features, dtype=torch.float64))
        self.register_buffer("deviation", torch.ones(n_features, dtype=torch.float64))
        self.register_buffer("coefficients", torch.zeros(n_features, n_outputs))
        self.register_buffer("offset", torch.zeros(n_outputs))
        self.register_buffer("strength", torch.zeros((), dtype=torch.float64))
        self.error: Tensor
        self.register_buffer("error", torch.ones((), dtype=torch.float64))
        self._sums: list[Tensor] = []

    def standardise(self, features: Tensor) -> Tensor:
        """``(B, n_features)`` float64 to mean 0 and standard deviation 1, float32."""
        return ((features - self.mean) / self.deviation).float()

    def forward(self, features: Tensor) -> Tensor:
        """``(B, n_features)`` to ``(B, n_outputs)``, float32."""
        return self.standardise(features) @ self.coefficients + self.offset

    def add(self, features: Tensor, outputs: Tensor, numbers: Tensor) -> None:
        """Add pairs to the sums.

        Args:
            features: ``(B, n_features)`` float64.
            outputs: ``(B, n_outputs)``.
            numbers: ``(B,)`` int64, each pair's number among all: decides which are held out, so that the choice
                does not depend on how pairs are spread over devices.
        """
        joint = torch.cat([torch.ones_like(features[:, :1]), features, outputs.to(features.dtype)], dim=1)
        n_left = 1 + features.shape[1]
        if not self._sums:
            size = joint.shape[1]
            self._sums = [joint.new_zeros(n_left, size) for _ in range(2)]
            self._sums.append(joint.new_zeros(size - n_left))
        for held_out, chosen in enumerate((numbers % _HELD_OUT != 0, numbers % _HELD_OUT == 0)):
            part = joint[chosen]
            self._sums[held_out] += part[:, :n_left].T @ part
            if held_out:
                self._sums[2] += part[:, n_left:].square().sum(dim=0)

    def sums(self) -> Sequence[Tensor]:
        """Products of (1, features) with (1, features, outputs), kept and held out; squares of held-out outputs."""
        return self._sums

    def solve(self) -> None:
        """Choose strength and weights by the error on the held-out pairs, then fit on all; forgets the sums."""
        kept, held_out, held_out_squares = self._sums
        n_left = len(kept)
        everything = kept + held_out
        if not torch.isfinite(everything).all():
            raise DataError(
                "The linear start cannot be fitted: features or images of some pairs are not finite, or too large for "
                "their squares to be. Look for such gradients, or for images that are not in [0, 1]."
            )
        mean = everything[0, 1:n_left] / everything[0, 0]
        variance = everything.diagonal()[1:] / everything[0, 0] - mean.square()
        deviation = variance.clamp_min(0).sqrt()
        # A feature that never varies gets an infinite deviation, so that it counts as zero from here on. So does
        # one whose variance is 1e-10 of its squared mean: of sums over 1e5 pairs and more, the rest may be rounding.
        least = torch.maximum(1e-9 * deviation.max().clamp_min(1e-300), 1e-5 * mean.abs())
        deviation = torch.where(deviation > least, deviation, float("inf"))
        # The strength is the same for all outputs, and a few dozen of them tell it: solving for all would cost more
        # than the rest of the fit.
        n_outputs = everything.shape[1] - n_left
        some = torch.arange(0, n_outputs, max(1, n_outputs // _OUTPUTS_TRIED), device=kept.device)
        columns = torch.cat([torch.arange(n_left, device=kept.device), n_left + some])
        errors: dict[tuple[tuple[float, float], float], Tensor] = {}
        for weights in WEIGHTS if self._n_weighed else WEIGHTS[:1]:
            scale = self._weighed(deviation, weights)
            train = _Moments.of(kept[:, columns], mean, scale)
            test = _Moments.of(held_out[:, columns], mean, scale)
            errors |= {(weights, s): test.error(*train.fit(s), held_out_squares[some]) for s in STRENGTHS}
        best = min(errors, key=errors.__getitem__)
        weights, strength = best
        if not torch.isfinite(errors[best]):
            raise DataError(
                f"The linear start cannot be fitted: {int(kept[0, 0])} pairs to fit on and {int(held_out[0, 0])} held "
                "out give no finite error. Give more public images (data.n_public_images)."
            )
        deviation = self._weighed(deviation, weights)
        moments = _Moments.of(everything, mean, deviation)
        some_coefficients, offset = moments.fit(strength)
        coefficients = everything.new_zeros(self.coefficients.shape).index_copy(0, moments.which, some_coefficients)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.coefficients.copy_(coefficients)
        self.offset.copy_(offset)
        self.strength.fill_(strength)
        self.error.copy_((errors[best] / (held_out[0, 0].clamp_min(1) * len(some))).clamp_min(0).sqrt())
        self._sums = []

    def _weighed(self, deviation: Tensor, weights: tuple[float, float]) -> Tensor:
        first, others = weights
        each = torch.full_like(deviation, others)
        each[: self._n_weighed] = first
        return deviation / each


class _Moments(NamedTuple):
    """Sums over pairs of standardised features ``s``, without those that count as zero, and outputs ``y``."""

    which: Tensor  # positions of the features that are left, int64
    n: Tensor  # ()
    features: Tensor  # Σ s
    outputs: Tensor  # Σ y
    second: Tensor  # Σ s sᵀ
    cross: Tensor  # Σ s yᵀ

    @classmethod
    def of(cls, products: Tensor, mean: Tensor, deviation: Tensor) -> "_Moments":
        """From products of (1, raw features) with (1, raw features, outputs)."""
        n_left = len(products)
        which = torch.isfinite(deviation).nonzero().squeeze(1)
        mean, deviation = mean[which], deviation[which]
        count, raw, outputs = products[0, 0], products[0, 1 + which], products[0, n_left:]
        rows = products[1 + which]
        second = rows[:, 1 + which] - torch.outer(raw, mean) - torch.outer(mean, raw - count * mean)
        cross = rows[:, n_left:] - torch.outer(mean, outputs)
        return cls(
            which,
            count,
            (raw - count * mean) / deviation,
            outputs,
            second / deviation[:, None] / deviation,
            cross / deviation[:, None],
        )

    def fit(self, strength: float) -> tuple[Tensor, Tensor]:
        """Coefficients and offset of the ridge regression; the offset is not penalised."""
        first, offset = self.features / self.n, self.outputs / self.n
        matrix = self.second - self.n * torch.outer(first, first)
        matrix.diagonal().add_(self.n * strength)
        right = self.cross - self.n * torch.outer(first, offset)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            return torch.full_like(right, float("nan")), offset
        coefficients = torch.cholesky_solve(right, factor)
        return coefficients, offset - first @ coefficients

    def error(self, coefficients: Tensor, offset: Tensor, squares: Tensor) -> Tensor:
        """Summed squared error of a regression on these pairs; infinite if it is not finite."""
        explained = self.cross + torch.outer(self.features, -offset)
        total = squares.sum() - 2 * (offset * self.outputs).sum() + self.n * offset.square().sum()
        total = total - 2 * (coefficients * explained).sum() + (coefficients * (self.second @ coefficients)).sum()
        return torch.nan_to_num(total, nan=float("inf"), posinf=float("inf"), neginf=float("inf"))
