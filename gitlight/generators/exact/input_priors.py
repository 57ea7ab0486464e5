"""What is known of a layer's input before its gradient is seen: what public images, and its own output, say of it."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gitlight.generators.exact.affine import LARGEST_STACKED, AffineRule
from gitlight.generators.exact.rule import Estimate
from gitlight.generators.ridge import RidgeRegression

_LARGEST_SUMS = 1 << 25
"""Entries of the sums that a regression is made from, 256 MiB."""


class Expected(NamedTuple):
    """A layer's input before its gradient is seen.

    Attributes:
        mean: ``(B, *input_shape)`` float64.
        size: ``(B,)``, what multiplies `InputPrior.factor` for errors of the output.
    """

    mean: Tensor
    size: Tensor


class InputPrior(nn.Module):
    """A regression of a layer's input on its output, and the covariance of what that leaves open.

    The regression's strength is the variance of each image's own output, at least that which public images choose: the
    linear estimate of least mean square error (Wiener). The covariance is one for all columns of a block (channels, or
    features), their mean: with it one factorisation serves them in `gitlight.generators.exact.joint`.

    Attributes:
        factor: ``(n_blocks, column_size, column_size)`` float64, lower triangular: times its transpose, that
            covariance.
        misfit: ``()``, what a gradient misses of the one that ``δ`` by fitted weights and the true input give, over its
            size, beyond its noise.
        usable: ``()`` bool, whether there were public images to make it from, whose gradients its equations give.
    """

    def __init__(self, rule: AffineRule, with_output: bool) -> None:
        """Args: the layer's rule; whether its output is known. Otherwise the prior is that of public images alone."""
        super().__init__()
        self.rule = rule
        n_outputs, n_inputs = prod(rule.layer.output_shape), rule.n_inputs
        fits = max(n_outputs, n_inputs) <= LARGEST_STACKED and n_outputs * (n_outputs + n_inputs) <= _LARGEST_SUMS
        self.uses_output = with_output and fits
        # Without outputs, on one feature that never varies: their mean.
        self._regression = RidgeRegression(n_outputs if self.uses_output else 1, n_inputs)
        n_features = len(self._regression.mean)
        for name, size in (
            ("factor", (rule.n_blocks, rule.column_size, rule.column_size)),
            ("misfit", ()),
            ("directions", (n_features, n_features)),
            ("variances", (n_features,)),
            ("explained", (n_features,)),
        ):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        self.register_buffer("usable", torch.tensor(False, device="cpu"))
        self.usable: Tensor
        self.factor: Tensor
        self.misfit: Tensor
        self.directions: Tensor  # principal ones of the standardised output
        self.variances: Tensor  # along them, and the least strength
        self.explained: Tensor  # squared covariance with the input, summed over its entries

    def forward(self, output: Estimate | None, n: int) -> Expected:
        """Of ``n`` images."""
        regression, shape = self._regression, self.rule.layer.input_shape
        if output is None or not self.uses_output:
            mean = regression(regression.mean.expand(n, -1)).double()
            return Expected(mean.view(n, *shape), mean.new_ones(n))
        variance = output.variance.expand_as(output.value)
        if output.at_most is not None:
            variance = torch.where(output.at_most, 0.0, variance)
        variance = variance.flatten(1) / regression.deviation.square()
        noise = variance.mean(dim=1, keepdim=True)
        kept = self.variances / (self.variances + noise)  # of each direction, against the regression as fitted
        seen = (output.value.flatten(1) - regression.mean) / regression.deviation
        seen = (seen @ self.directions) * kept @ self.directions.T
        mean = (seen.float() @ regression.coefficients + regression.offset).double()
        left = (self.explained / self.variances * (1 - kept)).sum(dim=1)
        size = (1 + left / (self.factor.square().sum() * self._columns)).sqrt()
        return Expected(mean.view(n, *shape), size)

    def trusted(self, output: Estimate) -> Estimate:
        """The layer's output, entries moved towards their mean over public images as far as errors leave them open.

        An error of an activation near its bound is any number once the activation is undone. A unit that is off stays
        at its bound, as it was for public images.
        """
        if not self.uses_output:
            return output
        shape = self.rule.layer.output_shape
        mean, spread = (v.view(shape) for v in (self._regression.mean, self._regression.deviation))
        variance = output.variance.expand_as(output.value)
        bounds = torch.zeros_like(output.value, dtype=torch.bool) if output.at_most is None else output.at_most
        varies = torch.isfinite(spread)  # a unit that never varied is what it was
        trust = torch.where(varies, 1 / (1 + variance / spread.square()), 0.0)
        known = torch.isfinite(output.value) & (trust > 0)
        value = torch.where(known, mean + trust * (output.value - mean), mean)
        left = torch.where(known, trust * variance, torch.where(varies, spread.square(), 0.0))
        return Estimate(torch.where(bounds, output.value, value), torch.where(bounds, variance, left), output.at_most)

    @property
    def _columns(self) -> int:
        return self.rule.n_inputs // (self.rule.n_blocks * self.rule.column_size)

    def add(self, output: Tensor | None, inputs: Tensor, numbers: Tensor) -> None:
        """Add images to the sums."""
        seen = inputs.new_zeros(len(inputs), 1)
        if self.uses_output:
            assert output is not None
            seen = torch.nan_to_num(output.flatten(1), posinf=0.0, neginf=0.0)
        self._regression.add(seen, inputs.flatten(1), numbers)

    def sums(self) -> Sequence[Tensor]:
        """The regression's, of no image if there was none."""
        if not self._regression.sums():
            n_features, n_inputs = self._regression.coefficients.shape
            nothing = self._regression.mean.new_zeros(0, n_features)
            numbers = torch.zeros(0, dtype=torch.int64, device=nothing.device)
            self._regression.add(nothing, nothing.new_zeros(0, n_inputs), numbers)
        return self._regression.sums()

    def solve(self) -> None:
        """From the sums, which are forgotten."""
        kept, held_out, _ = self.sums()
        self.usable.fill_(bool(kept[0, 0] > 1))
        if not self.usable:
            self._regression = RidgeRegression(*self._regression.coefficients.shape).to(kept.device)
            return
        self._regression.solve()
        if not self.uses_output:
            return
        regression, n_outputs = self._regression, len(self._regression.mean)
        products = (kept + held_out)[: 1 + n_outputs, : 1 + n_outputs]
        covariance = products[1:, 1:] / products[0, 0] - torch.outer(regression.mean, regression.mean)
        covariance = covariance / regression.deviation / regression.deviation.unsqueeze(1)
        values, vectors = torch.linalg.eigh(covariance)
        self.directions.copy_(vectors)
        self.variances.copy_(values.clamp_min(0) + regression.strength)
        covariances = self.variances.unsqueeze(1) * (vectors.T @ regression.coefficients.double())
        self.explained.copy_(covariances.square().sum(dim=1))


def identity_factor(rule: AffineRule) -> Tensor:
    """The factor of those who know nothing: inputs are independent and of size one."""
    return torch.eye(rule.column_size, dtype=torch.float64, device="cpu").repeat(rule.n_blocks, 1, 1)
