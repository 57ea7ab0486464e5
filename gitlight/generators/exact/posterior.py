"""A layer's input from everything that is known of it: gradient equations, forward equations and a prior, stacked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.rule import Estimate

WORKSPACE_BYTES = 512e6
"""Memory for the normal matrices of the examples that are solved at once."""

_LARGEST_PRECISION = 1e8
"""Of an output against the gradient's: beyond, its equations would push those of the gradient below rounding."""

_N_PROBES = 8

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


def solve_stacked(
    rule: AffineRule,
    delta: Tensor,
    weight_gradient: Tensor,
    noise: Tensor,
    output: Estimate | None,
    weight: Tensor,
    bias: Tensor | float,
    prior: Prior | None,
) -> tuple[Estimate, Tensor, Tensor]:
    """The most probable input.

    Given

    - ``K(δ) a = g``, errors of standard deviation ``noise``;
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

    Returns:
        the estimate, with one variance for all entries of an example (its mean, from random probes); ``(B,)`` bool,
        which examples could be solved (others are zero); and ``(B,)`` bool, which of them only with damping.
    """
    size = rule.n_inputs
    chunk = max(1, int(WORKSPACE_BYTES / (3 * 8 * size**2)))
    values, variances, solved, damped = [], [], [], []
    for start in range(0, len(delta), chunk):
        part = slice(start, start + chunk)
        its_output = None
        if output is not None:
            its_output = Estimate(output.value[part], output.variance.expand_as(output.value)[part])
        found = _solve(rule, delta[part], weight_gradient[part], noise[part], its_output, weight, bias, prior)
        values.append(found[0])
        variances.append(found[1])
        solved.append(found[2])
        damped.append(found[3])
    return Estimate(torch.cat(values), torch.cat(variances)), torch.cat(solved), torch.cat(damped)


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
    add_gradient_equations(system, rule, unit)
    if prior is not None:
        for its_system, its_level in zip(system, level.tolist(), strict=True):
            its_system.add_(prior.precision, alpha=its_level)  # these matrices are large: no copy
        right = right + level[:, None] * (prior.precision @ prior.mean)
    diagonal = system.diagonal(dim1=1, dim2=2)
    # Against exact singularity only: a hundred times what rounding leaves of a zero.
    diagonal += 1e-15 * diagonal.mean(dim=1, keepdim=True) + 1e-300
    factor, solved, damped = _factorised(system)
    found = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    # One step of refinement, its residual from the equations themselves rather than from their squares.
    inputs = found.view(n_examples, *rule.layer.input_shape)
    missing = rule.right(unit, gradient - rule.weight_gradient(inputs, unit)).flatten(1)
    if precision is not None and wanted is not None:
        missing = missing + rule.adjoint(precision * (wanted - rule.forward(inputs, weight)), weight).flatten(1)
    if prior is not None:
        missing = missing + level[:, None] * ((prior.mean - found) @ prior.precision)
    # With it Hutchinson's estimate of the covariance's trace: a solve costs a pass over the factor, whatever is solved.
    probes = torch.randn(
        (size, _N_PROBES), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    ).to(delta)
    rights = torch.cat([missing.unsqueeze(2), probes.expand(n_examples, -1, -1)], dim=2)
    solutions = torch.cholesky_solve(rights, factor)
    found = torch.where(solved[:, None], found + solutions[:, :, 0], 0.0)
    variance = (probes * solutions[:, :, 1:]).mean(dim=(1, 2)).clamp_min(0) * level
    shape = rule.layer.input_shape
    return found.view(n_examples, *shape), variance.view(-1, *[1] * len(shape)).expand(-1, *shape), solved, damped


def _factorised(system: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def add_gradient_equations(system: Tensor, rule: AffineRule, unit: Tensor) -> None:
    """Add ``KᵀK`` to ``(B, n_inputs, n_inputs)`` in place: the same block for every column."""
    blocks = rule.normal(unit)
    # Where the entries of each column are in the flattened input.
    numbers = torch.arange(rule.n_inputs, dtype=torch.float64, device=unit.device).view(1, *rule.layer.input_shape)
    places = rule.columns(numbers)[0].long()
    for group, columns in enumerate(places):
        for column in columns:
            first, step = int(column[0]), int(column[1] - column[0]) if len(column) > 1 else 1
            if bool((column.diff() == step).all()):
                entries = slice(first, first + step * len(column), step)
                system[:, entries, entries] += blocks[:, group]
            else:
                system[:, column[:, None], column[None, :]] += blocks[:, group]


def _expand(per_example: Tensor, tensor: Tensor) -> Tensor:
    return per_example.view(-1, *[1] * (tensor.dim() - 1))
