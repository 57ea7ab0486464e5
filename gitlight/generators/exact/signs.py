"""Below an activation with two slopes: the layer's input, and on which side of zero each of its outputs was.

Leaky ReLU's output is the input times one of two slopes. Noise leaves open, for outputs near zero, which: then neither
the output nor ``δ`` below is known, and a single wrong guess ruins a system of equations that the others would solve
exactly. So each unsure unit has a probability, from all that bears on it: the activation's estimated value, the forward
pass from the layer's estimated input, and the layer's weight and bias gradients. The input's posterior with these
probabilities, and they with the input's posterior, are found in turn: expectation propagation (Minka 2001) for the
forward equations, and for the gradient equations a Gaussian approximation of what all other units add.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import erfcx, log_ndtr

from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.errors import row_noise
from gitlight.generators.exact.posterior import N_DEVIATIONS, Prior, Stacked, solve_stacked
from gitlight.generators.exact.rule import Estimate

_ROUNDS = 4
_SURE = 1e-6
"""Probability of the less probable side below which a unit is not in doubt."""

_SETTLED = 0.01
"""Change of a probability below which another round changes nothing."""

_MOST_TOGETHER = 128
"""Unsure units of one output channel that are weighed against its gradients; further ones keep their probability."""


class TwoSlopes(NamedTuple):
    """What is known of an activation with two slopes.

    Attributes:
        output: its output, ``(B, *shape)``.
        delta: ``δ`` of its output.
        errors: of ``delta``, ``(B, N_DEVIATIONS, *shape)``.
        slopes: above and below zero, both positive.
    """

    output: Estimate
    delta: Tensor
    errors: Tensor
    slopes: tuple[float, float]

    def of(self, which: Tensor) -> "TwoSlopes":
        """Some of the examples."""
        variance = self.output.variance.expand_as(self.output.value)
        output = Estimate(self.output.value[which], variance[which])
        return TwoSlopes(output, self.delta[which], self.errors[which], self.slopes)

    def mean_slope(self, above: Tensor) -> Tensor:
        """The slope, given the probability of being above zero."""
        return self.slopes[1] + above * (self.slopes[0] - self.slopes[1])


class Settled(NamedTuple):
    """The layer's input and output, and ``δ`` of its output.

    Attributes:
        stacked: the input.
        output: mean and variance.
        above: ``(B, *output_shape)``, the probability of each output to be above zero.
        delta: ``δ`` of the layer's output.
        errors: of ``delta``, ``(B, N_DEVIATIONS, *output_shape)``.
    """

    stacked: Stacked
    output: Estimate
    above: Tensor
    delta: Tensor
    errors: Tensor


def unsure(activation: TwoSlopes, expected: Estimate) -> Tensor:
    """``(B,)`` bool: whether there are units of which it is not sure on which side of zero they are."""
    above = torch.sigmoid(_sides(activation, expected).odds)
    return (torch.minimum(above, 1 - above) > _SURE).flatten(1).any(dim=1)


def expected_outputs(rule: AffineRule, weight: Tensor, bias: Tensor | float, prior: Prior, n_leaks: int) -> Estimate:
    """Mean and variance of a layer's outputs before any gradient is seen, for each of ``n_leaks``."""
    shape = rule.layer.input_shape
    mean = rule.forward(prior.mean.view(1, *shape), weight) + bias
    spread = rule.forward(prior.deviations.view(-1, *shape), weight).square().mean(dim=0, keepdim=True)
    size = (n_leaks, *mean.shape[1:])
    return Estimate(mean.expand(size), spread.clamp_min(1e-300).expand(size))


def solve_with_signs(
    rule: AffineRule,
    activation: TwoSlopes,
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    noise: Tensor,
    weight: Tensor,
    bias: Tensor | float,
    prior: Prior,
) -> Settled:
    """The layer's input, with the signs of its outputs.

    Args:
        rule: the layer's, whose output the activation takes.
        activation: what is known of it.
        weight_gradient: ``(B, *weight.shape)``.
        bias_gradient: ``(B, outputs)``; None: the layer has no bias.
        noise: ``(B,)``, standard deviation of the gradients' errors, above zero.
        weight: ``(*weight.shape)``.
        bias: in a shape that adds to outputs.
        prior: of the layer's input.
    """
    expected = expected_outputs(rule, weight, bias, prior, len(noise))
    before: Tensor | None = None
    stacked: Stacked | None = None
    for _ in range(_ROUNDS):
        sides = _sides(activation, expected)
        odds = sides.odds
        if stacked is not None and rule.groups == 1:
            odds = odds + _by_gradients(rule, activation, odds, stacked, weight_gradient, bias_gradient, noise)
        above = torch.sigmoid(odds)
        if before is not None and bool(((above - before).abs() < _SETTLED).all()):
            break
        before = above
        mean, variance = sides.moments(above)
        # The evidence alone, a Gaussian with which what was expected becomes these moments.
        precision = (1 / variance - 1 / expected.variance).clamp_min(1e-12)
        site = Estimate((mean / variance - expected.value / expected.variance) / precision, 1 / precision)
        slope = activation.mean_slope(above)
        doubt = activation.delta.square() * _spread(activation, above)
        rows = row_noise(rule, activation.errors * slope.unsqueeze(1), noise, prior, doubt)
        its = (rule, activation.delta * slope, weight_gradient, noise, site, weight, bias, prior)
        stacked = solve_stacked(*its, row_noise=rows)
        found = rule.forward(stacked.estimate.value, weight) + bias
        flat = stacked.deviations.flatten(0, 1)
        moved = rule.forward(flat, weight).view(len(noise), N_DEVIATIONS, *found.shape[1:])
        output = Estimate(found, moved.square().mean(dim=1).clamp_min(1e-300))
        expected = _without(output, site, precision)
    assert stacked is not None
    slope = activation.mean_slope(above)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(activation.errors.shape, generator=generator, dtype=torch.float64, device="cpu").to(above)
    wrong = (drawn < above.unsqueeze(1)).to(above) - above.unsqueeze(1)
    step = activation.slopes[0] - activation.slopes[1]
    errors = activation.errors * slope.unsqueeze(1) + activation.delta.unsqueeze(1) * step * wrong
    return Settled(stacked, output, above, activation.delta * slope, errors)


class _Sides(NamedTuple):
    """Log odds of above against below zero, and the moments of ``z`` on each side, above first."""

    odds: Tensor
    means: tuple[Tensor, Tensor]
    variances: tuple[Tensor, Tensor]

    def moments(self, above: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the mixture."""
        shares = (above, 1 - above)
        mean = shares[0] * self.means[0] + shares[1] * self.means[1]
        variance = sum(
            share * (variance + (its_mean - mean).square())
            for share, its_mean, variance in zip(shares, self.means, self.variances, strict=True)
        )
        assert isinstance(variance, Tensor)
        return mean, variance


def _sides(activation: TwoSlopes, expected: Estimate) -> _Sides:
    """``z`` is Gaussian as expected, cut at zero; ``a`` is it times the slope, with a Gaussian error."""
    value, variance = activation.output.value, activation.output.variance.clamp_min(1e-300)
    evidence, means, variances = [], [], []
    for slope, sign in zip(activation.slopes, (1.0, -1.0), strict=True):
        precision = 1 / expected.variance + slope**2 / variance
        centre = (expected.value / expected.variance + slope * value / variance) / precision
        spread = precision.rsqrt()
        depth = sign * centre / spread
        inside = log_ndtr(depth)
        of_value = variance + slope**2 * expected.variance
        evidence.append(-0.5 * (value - slope * expected.value).square() / of_value - 0.5 * of_value.log() + inside)
        # Moments of a Gaussian cut at zero.
        hazard = (2 / torch.pi) ** 0.5 / erfcx(-depth / 2**0.5)
        means.append(centre + sign * spread * hazard)
        # Rounding of the last factor, between 0 and 1, must not leave it at zero far outside.
        left = (1 - hazard * (hazard + depth)).clamp(1e-6, 1.0)
        variances.append(spread.square() * left)
    return _Sides(evidence[0] - evidence[1], (means[0], means[1]), (variances[0], variances[1]))


def _without(output: Estimate, site: Estimate, precision: Tensor) -> Estimate:
    """The posterior of an output without its own evidence; with it, where the two cannot be told apart."""
    own = 1 / output.variance
    rest = own - precision
    apart = rest > 0.05 * own
    rest = torch.where(apart, rest, 0.05 * own)
    mean = torch.where(apart, (own * output.value - precision * site.value) / rest, output.value)
    return Estimate(mean, 1 / rest)


def _spread(activation: TwoSlopes, above: Tensor) -> Tensor:
    """Variance of the slope."""
    return above * (1 - above) * (activation.slopes[0] - activation.slopes[1]) ** 2


def _by_gradients(
    rule: AffineRule,
    activation: TwoSlopes,
    odds: Tensor,
    stacked: Stacked,
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    noise: Tensor,
) -> Tensor:
    """What the weight and bias gradients add to the log odds, ``(B, *output_shape)``."""
    added = torch.zeros_like(rule.outputs(odds))
    own = stacked.deviations.flatten(1).square().mean(dim=1)
    sure = torch.logit(torch.tensor(_SURE * 1e-3, dtype=odds.dtype)).abs().item()
    for number in range(len(noise)):
        one = slice(number, number + 1)
        its_odds = rule.outputs(odds[one])[0].T  # (outputs, positions)
        in_doubt = its_odds.abs() < sure
        count = min(int(in_doubt.sum(dim=1).max()), _MOST_TOGETHER)
        if count == 0:
            continue
        above = torch.sigmoid(its_odds)
        delta = rule.outputs(activation.delta[one])[0].T
        slope = activation.mean_slope(above)
        errors = rule.outputs(activation.errors[one].square().mean(dim=1))[0].T * slope.square()
        inputs = stacked.estimate.value[one]
        patches = rule.patches(inputs)[0]
        wanted = weight_gradient[number].flatten(1)
        level = noise[number].square()
        of_delta = (delta * slope).square().sum(dim=1)
        variance = level + of_delta * own[number] + errors.sum(dim=1) * inputs.square().mean()
        variances = variance.unsqueeze(1).expand_as(wanted)
        if bias_gradient is not None:
            patches = torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1)
            wanted = torch.cat([wanted, bias_gradient[number].unsqueeze(1)], dim=1)
            variances = torch.cat([variances, (level + errors.sum(dim=1)).unsqueeze(1)], dim=1)
        picked = its_odds.abs().topk(count, dim=1, largest=False).indices
        step = (activation.slopes[0] - activation.slopes[1]) * delta.gather(1, picked)
        step = torch.where(in_doubt.gather(1, picked), step, 0.0)
        columns = patches[picked] * step.unsqueeze(2)  # (outputs, units, equations)
        missing = wanted - (delta * slope) @ patches
        its = _binary_regression(columns, missing, variances, its_odds.gather(1, picked))
        added[number] = torch.zeros_like(its_odds).scatter(1, picked, its).T
    return rule.from_outputs(added)


def _binary_regression(columns: Tensor, missing: Tensor, variances: Tensor, odds: Tensor) -> Tensor:
    """Log-likelihood ratios of 1 against 0 of the ``u`` in ``Σ (u − p) c = missing + error``, ``(n, units)``.

    For each unit, all others are taken for Gaussian with their mean and variance; these change until they agree.

    Args:
        columns: ``(n, units, equations)``.
        missing: what the means ``p = sigmoid(odds)`` leave, ``(n, equations)``.
        variances: of the errors, ``(n, equations)``.
        odds: from all else, ``(n, units)``.
    """
    scaled = columns / variances.unsqueeze(1)
    gram = scaled @ columns.mT
    start = torch.sigmoid(odds)
    reached = (scaled @ missing.unsqueeze(2)).squeeze(2) + (gram @ start.unsqueeze(2)).squeeze(2)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    above = start
    ratio = torch.zeros_like(odds)
    for _ in range(30):
        spread = above * (1 - above)
        rest = reached - (gram @ above.unsqueeze(2)).squeeze(2)
        # Woodbury: all that is needed of the equations' covariance is seen by the columns.
        solved = torch.linalg.solve(identity + gram * spread.unsqueeze(1), torch.cat([gram, rest.unsqueeze(2)], dim=2))
        own, pull = solved[:, :, :-1].diagonal(dim1=1, dim2=2), solved[:, :, -1]
        left = (1 - spread * own).clamp_min(1e-6)
        ratio = (pull + own * above) / left - 0.5 * own / left
        moved = 0.5 * above + 0.5 * torch.sigmoid(odds + ratio)
        if bool(((moved - above).abs() < 1e-3).all()):
            break
        above = moved
    return ratio
