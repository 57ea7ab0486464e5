"""Errors of ``δ``: samples of them are carried down beside ``δ``, and say how far a layer's equations can be trusted.

Samples, rather than variances, because errors of ``δ`` are not independent: all layers below see one of the last's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.posterior import N_DEVIATIONS, Prior
from gitlight.generators.exact.rule import OUTPUT, Estimate, InverseRule, Weights
from gitlight.gradients.precision import full_float32

_SEED = 2505
"""Not one that a caller is likely to have drawn its own noise with."""


class Noise:
    """Standard normal samples, the same for the same sequence of calls.

    All leaks share them: what is found of a leak then does not depend on the batch that it came in, and few are drawn.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)

    def normal(self, like: Tensor) -> Tensor:
        """For ``(B, …)``: ``(1, N_DEVIATIONS, …)``."""
        size = (1, N_DEVIATIONS, *like.shape[1:])
        return torch.randn(size, generator=self._generator, dtype=torch.float64, device="cpu").to(like)


def carry_errors(
    rule: InverseRule,
    delta: Tensor,
    errors: Tensor,
    position: int,
    inputs: Sequence[Estimate | None],
    output: Estimate | None,
    weights: Weights,
    noise: Noise,
) -> Tensor:
    """Errors ``(B, N_DEVIATIONS, *input_shape)`` of the ``δ`` that a rule carries down.

    Args:
        rule: of the operation.
        delta: of its output, ``(B, *output_shape)``.
        errors: of ``delta``, ``(B, N_DEVIATIONS, *output_shape)``.
        position: number of the input.
        inputs: estimates of the inputs, as for `InverseRule.carry`.
        output: of the output; where ``δ`` is carried with its help, its errors enter, too.
        weights: estimates of the leaked parameters.
        noise: of the output's errors.
    """
    if isinstance(rule, AffineRule):
        return _through_weights(rule, errors, weights)
    if rule.carry_needs != OUTPUT or output is None:
        carried = [rule.carry(error, position, inputs, output, weights) for error in errors.unbind(1)]
        return torch.stack(carried, dim=1)
    spread = torch.nan_to_num(output.variance, posinf=0.0).expand_as(output.value).sqrt()
    moved = output.value.unsqueeze(1) + noise.normal(output.value) * spread.unsqueeze(1)
    carried = []
    for error, value in zip(errors.unbind(1), moved.unbind(1), strict=True):
        at = Estimate(value, output.variance, output.at_most)
        carried.append(rule.carry(delta + error, position, inputs, at, weights))
    return torch.stack(carried, dim=1) - rule.carry(delta, position, inputs, output, weights).unsqueeze(1)


def _through_weights(rule: AffineRule, errors: Tensor, weights: Weights) -> Tensor:
    """All samples at once, and in single precision: a few digits of an error are enough.

    Its range is not enough, so that each leak's errors are scaled to size one.
    """
    assert rule.weight is not None
    size = errors.abs().flatten(1).amax(dim=1)
    size = torch.where(torch.isfinite(size) & (size > 0), size, 1.0).view(-1, *[1] * (errors.dim() - 1))
    with torch.autocast(errors.device.type, enabled=False), full_float32():
        carried = rule.adjoint((errors / size).float().flatten(0, 1), weights[rule.weight].float())
    return carried.unflatten(0, errors.shape[:2]).double() * size


def row_noise(
    rule: AffineRule, errors: Tensor, noise: Tensor, prior: Prior | None, variance: Tensor | None = None
) -> Tensor:
    """``(B, outputs)``: standard deviation of the error of each output's gradient equations ``K(δ) a = g``.

    Beside that of ``g``, errors of ``δ`` count by the inputs that they multiply, of which the prior has a mean and a
    spread; without one, inputs are taken for independent and of size one.

    Args:
        rule: the layer's.
        errors: ``(B, N_DEVIATIONS, *output_shape)``, of ``δ``.
        noise: ``(B,)``.
        prior: of the layer's input.
        variance: ``(B, *output_shape)``, of further, independent errors of ``δ``.
    """
    shape = rule.layer.input_shape
    independent = errors.square().mean(dim=1)
    if variance is not None:
        independent = independent + variance
    of_inputs: Tensor | float = 1.0
    by_mean = errors.new_zeros(len(errors), rule.layer.weight_shape[0])
    if prior is not None:
        of_inputs = prior.deviations.square().mean()
        mean = prior.mean.view(1, *shape)
        if variance is not None:
            of_inputs = of_inputs + mean.square().mean()
        for error in errors.unbind(1):
            made = rule.weight_gradient(mean.expand(len(errors), *shape), error)
            by_mean += made.flatten(2).square().mean(dim=2) / errors.shape[1]
    summed = rule.outputs(independent).sum(dim=1)
    return (noise.square().unsqueeze(1) + by_mean + of_inputs * summed).sqrt()
