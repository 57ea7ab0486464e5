"""A layer's input from everything that is known of it: gradient equations, forward equations and a prior, stacked."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.rule import Estimate

WORKSPACE_BYTES = 512e6
"""Memory for the normal matrices of the examples that are solved at once."""

_LARGEST_PRECISION = 1e8
"""Of an output against the gradient's: beyond, its equations would push those of the gradient below rounding."""

N_DEVIATIONS = 16
"""Samples that stand for the distribution of an estimate's error."""

_SHIFTS = (1e-12, 1e-9, 1e-6)
"""Over the mean diagonal, added in turn where rounding leaves a system without a Cholesky factor: weights that are far
from the leaked ones, as in the middle of descent, make such systems."""


@dataclass(frozen=True)
class Prior:
    """What public images say of a layer's input before any gradient is seen: a Gaussian.

    Attributes:
        mean: ``(n,)``.
        precision: the inverse covariance, ``(n, n)``.
    """

    mean: Tensor
    precision: Tensor

    @cached_property
    def deviations(self) -> Tensor:
        """``(N_DEVIATIONS, n)``: samples from it, less the mean."""
        factor = torch.linalg.cholesky(self.precision)
        return torch.linalg.solve_triangular(factor.T, _normal(len(self.mean), self.mean), upper=True).T


class Stacked(NamedTuple):
    """What stacked equations give.

    Attributes:
        estimate: the most probable input, with one variance for all entries of an example, their mean.
        solved: ``(B,)`` bool, which examples could be solved; others are zero.
        damped: ``(B,)`` bool, which of them only with damping.
        deviations: ``(B, N_DEVIATIONS, *input_shape)``, samples of the error as the equations leave it.
    """

    estimate: Estimate
    solved: Tensor
    damped: Tensor
    deviations: Tensor


def solve_stacked(
    rule: AffineRule,
    delta: Tensor,
    weight_gradient: Tensor,
    noise: Tensor,
    output: Estimate | None,
    weight: Tensor,
    bias: Tensor | float,
    prior: Prior | None,
    row_noise: Tensor | None = None,
) -> Stacked:
    """The most probable input.

    Given

    - ``K(δ) a = g``, errors of standard deviation ``noise``, or ``row_noise`` by output;
    - ``W * a + b = z``, errors as ``output`` says, entries of infinite variance left out;
    - the prior.

    With exact equations the prior's share vanishes (it is weighed by the noise's variance), and with noise it is what
    fills the directions that noise has drowned: the minimum mean-square-error estimate for Gaussian errors. One
    Cholesky factorisation in float64 an example; the residual is refined once.

    Args:
        rule: the layer's.
        delta: ``(B, *output_shape)`` float64, not zero.
        weight_gradient: ``(B, *weight.shape)``.
        noise: ``(B,)``, above zero.
        output: the layer's output; None: no forward equations.
        weight: ``(*weight.shape)``.
        bias: in a shape that adds to outputs.
        prior: None: none; the system must then be determined.
        row_noise: ``(B, outputs)``, of the equations of each output (a channel, or a unit of a linear layer), where
            ``δ`` itself has errors; None: ``noise`` for all.
    """
    size = rule.n_inputs
    if row_noise is not None:
        shares = noise.unsqueeze(1) / row_noise
        delta = delta * rule.by_output(shares)
        weight_gradient = weight_gradient * shares.view(*shares.shape, *[1] * (weight_gradient.dim() - 2))
    chunk = max(1, int(WORKSPACE_BYTES / (3 * 8 * size**2)))
    parts = []
    for start in range(0, len(delta), chunk):
        part = slice(start, start + chunk)
        its_output = None
        if output is not None:
            its_output = Estimate(output.value[part], output.variance.expand_as(output.value)[part])
        parts.append(_solve(rule, delta[part], weight_gradient[part], noise[part], its_output, weight, bias, prior))
    values, solved, damped, deviations = (torch.cat(part) for part in zip(*parts, strict=True))
    variance = deviations.flatten(1).square().mean(dim=1)
    return Stacked(Estimate(values, _expand(variance, values).expand_as(values)), solved, damped, deviations)


def _solve(
    rule: AffineRule,
    delta: Tensor,
    weight_gradient: Tensor,
    noise: Tensor,
    output: Estimate | None,
    weight: Tensor,
    bias: Tensor | float,
    prior: Prior | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_examples, size = len(delta), rule.n_inputs
    # In units of δ, every example's gradient equations are of one size; all other terms are weighed against them.
    scale = delta.flatten(1).norm(dim=1)
    unit = delta / _expand(scale, delta)
    gradient = weight_gradient / _expand(scale, weight_gradient)
    level = (noise / scale).square()
    right = rule.right(unit, gradient).flatten(1)
    precision = wanted = None
    if output is not None:
        precision = _expand(level, output.value) / output.variance.clamp_min(1e-300)
        precision = torch.where(torch.isfinite(output.variance), precision, 0.0).clamp_max(_LARGEST_PRECISION)
        wanted = output.value - bias
        system = rule.forward_normal(weight, precision)
        right = right + rule.adjoint(precision * wanted, weight).flatten(1)
    else:
        system = delta.new_zeros(n_examples, size, size)
    rule.add_normal(system, unit)
    if prior is not None:
        for its_system, its_level in zip(system, level.tolist(), strict=True):
            its_system.add_(prior.precision, alpha=its_level)  # these matrices are large: no copy
        right = right + level[:, None] * (prior.precision @ prior.mean)
    diagonal = system.diagonal(dim1=1, dim2=2)
    # Against exact singularity only: a hundred times what rounding leaves of a zero.
    diagonal += 1e-15 * diagonal.mean(dim=1, keepdim=True) + 1e-300
    factor, solved, damped = factorised(system)
    found = solved_by(factor, right.unsqueeze(2)).squeeze(2)
    # One step of refinement, its residual from the equations themselves rather than from their squares.
    inputs = found.view(n_examples, *rule.layer.input_shape)
    missing = rule.right(unit, gradient - rule.weight_gradient(inputs, unit)).flatten(1)
    if precision is not None and wanted is not None:
        missing = missing + rule.adjoint(precision * (wanted - rule.forward(inputs, weight)), weight).flatten(1)
    if prior is not None:
        missing = missing + level[:, None] * ((prior.mean - found) @ prior.precision)
    found = torch.where(solved[:, None], found + solved_by(factor, missing.unsqueeze(2)).squeeze(2), 0.0)
    # Half a solve, of white noise, has the covariance of the error.
    deviations = torch.linalg.solve_triangular(factor.mT, _normal(size, delta).expand(n_examples, -1, -1), upper=True)
    deviations = (deviations * level.sqrt()[:, None, None]).mT.reshape(n_examples, -1, *rule.layer.input_shape)
    return found.view(n_examples, *rule.layer.input_shape), solved, damped, deviations


def solved_by(factor: Tensor, right: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹ r`` of ``(B, n, m)``; `torch.cholesky_solve` first copies each factor, which takes longer."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _normal(size: int, like: Tensor) -> Tensor:
    """White noise ``(size, N_DEVIATIONS)``, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((size, N_DEVIATIONS), generator=generator, dtype=torch.float64, device="cpu").to(like)


def factorised(system: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factors of ``(B, n, n)``; which there are, ``(B,)`` bool, else one; and which needed damping."""
    factor, failed = torch.linalg.cholesky_ex(system)
    damped = failed > 0
    for shift in _SHIFTS:
        left = (failed > 0).nonzero().squeeze(1)
        if len(left) == 0:
            break
        shifted = system[left]
        diagonal = shifted.diagonal(dim1=1, dim2=2)
        diagonal += shift * diagonal.mean(dim=1, keepdim=True)
        factor[left], failed[left] = torch.linalg.cholesky_ex(shifted)
    solved = (failed == 0) & torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all(dim=1)
    factor[~solved] = torch.eye(system.shape[1], dtype=factor.dtype, device=factor.device)
    return factor, solved, damped & solved


def _expand(per_example: Tensor, tensor: Tensor) -> Tensor:
    return per_example.view(-1, *[1] * (tensor.dim() - 1))
