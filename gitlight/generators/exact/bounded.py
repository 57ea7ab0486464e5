"""A layer's input where equations leave directions open but inequalities close them: below a ReLU.

A unit that is off says that its input is at most zero; a ReLU's output is never negative, and mostly zero; pixels lie
in [0, 1]. In the null space of the equations the input with the least violation is sought, a quadratic program. Where
the input is a ReLU's output its zeros are then fixed and the equations solved once more on the rest: if they hold to
rounding, and nothing is negative, the input is exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.inequalities import Bounds, least_violation, only_one
from gitlight.generators.exact.posterior import Prior
from gitlight.generators.exact.rule import Estimate

_TOLERANCE = 1e-11
"""Eigenvalues of ``KᵀK`` below this share of the largest are zero."""

_THRESHOLDS = (3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)
"""What counts as zero in a ReLU's output, over its largest entry; the residual decides which is right."""

_RESIDUAL = 1e-8
"""Relative residual below which equations hold."""


class _System(NamedTuple):
    """One example's equations and inequalities.

    ``rows`` and ``wanted`` are the forward equations, ``upper`` and ``upper_at`` the inequalities ``upper · a ≤
    upper_at``; ``blocks`` and ``right`` those of the gradient equations, by the rule's blocks.
    """

    blocks: Tensor
    right: Tensor
    rows: Tensor
    wanted: Tensor
    upper: Tensor
    upper_at: Tensor


def solve_bounded(
    rule: AffineRule,
    delta: Tensor,
    weight_gradient: Tensor,
    noise: Tensor,
    output: Estimate,
    weight: Tensor,
    bias: Tensor | float,
    prior: Prior | None,
    bounds: Bounds,
) -> tuple[Estimate, Tensor]:
    """The input that satisfies the equations, least violates the inequalities, and is most probable beforehand.

    Args:
        rule: the layer's.
        delta: ``(B, *output_shape)`` float64, not zero.
        weight_gradient: ``(B, *weight.shape)``.
        noise: ``(B,)``, standard deviation of the error of the gradient's entries.
        output: the layer's output, with ``at_most`` where only a bound is known.
        weight: ``(*weight.shape)``.
        bias: in a shape that adds to outputs.
        prior: of the input; None: every input within the bounds is as probable.
        bounds: smallest and largest value of an entry; None: no bound.

    Returns:
        the estimate; and ``(B,)`` bool, whether the equations and inequalities determine it.
    """
    matrix = rule.forward_matrix(weight)
    values, variances, determined = [], [], []
    for number in range(len(delta)):
        one = slice(number, number + 1)
        found = _solve_one(
            rule, matrix, delta[one], weight_gradient[one], float(noise[number]),
            output.value[one] - bias, output.variance[one],
            torch.zeros_like(output.value[one], dtype=torch.bool) if output.at_most is None else output.at_most[one],
            prior, bounds,
        )  # fmt: skip
        values.append(found[0])
        variances.append(found[1])
        determined.append(found[2])
    value = torch.stack(values).view(-1, *rule.layer.input_shape)
    variance = torch.stack(variances).view(-1, *[1] * len(rule.layer.input_shape)).expand_as(value)
    return Estimate(value, variance), torch.tensor(determined, device=delta.device)


def _solve_one(
    rule: AffineRule,
    matrix: Tensor,
    delta: Tensor,
    weight_gradient: Tensor,
    noise: float,
    wanted: Tensor,
    variance: Tensor,
    at_most: Tensor,
    prior: Prior | None,
    bounds: Bounds,
) -> tuple[Tensor, Tensor, bool]:
    scale = float(delta.norm())
    unit, gradient = delta / scale, weight_gradient / scale
    level = (noise / scale) ** 2
    prior = prior or _indifferent(rule, delta, bounds)
    known = (torch.isfinite(variance) & ~at_most).flatten()
    uncertainty = variance.flatten()[known]
    system = _System(
        rule.normal(unit)[0],
        rule.columns(rule.right(unit, gradient))[0],
        matrix[known],
        wanted.flatten()[known],
        matrix[at_most.flatten()],
        wanted.flatten()[at_most.flatten()],
    )
    size = wanted.abs().max().clamp_min(1e-300)
    if len(uncertainty) and float(uncertainty.max().sqrt()) > 1e-4 * float(size):
        return _from_outputs(rule, system, unit, gradient, uncertainty, prior, bounds)
    start, free = _null_space(rule, system, level)
    found, spread = start, start.new_tensor(level)
    if free.shape[1] > 0:
        found, spread = least_violation(start, free, system.upper, system.upper_at, prior, bounds)
    found = _within(found, bounds)
    if bounds == (0.0, None):
        exact = _on_support(rule, found, len(found) - free.shape[1], system, unit, gradient)
        if exact is not None:
            value, seen = exact
            spread = value.new_tensor(level) if bool(seen.all()) else spread
            return torch.where(seen, value, found), spread, only_one(free, value == 0)
    return found, spread, free.shape[1] == 0


def _null_space(rule: AffineRule, system: _System, level: float) -> tuple[Tensor, Tensor]:
    """A solution of the equations and an orthonormal basis of what they leave free: ``(n,)`` and ``(n, free)``.

    All columns share one matrix, so the large eigenproblem falls into one small one per block; the forward equations
    then act on its null space alone.
    """
    starts, bases = [], []
    for block, right in zip(system.blocks, system.right, strict=True):
        eigenvalues, vectors = torch.linalg.eigh(block)
        # What noise has drowned is as open as what no equation meets.
        kept = eigenvalues > max(_TOLERANCE * float(eigenvalues[-1]), 10 * level)
        starts.append(((right @ vectors[:, kept]) / eigenvalues[kept]) @ vectors[:, kept].T)
        bases.append(vectors[:, ~kept])
    start = rule.from_columns(torch.stack(starts).unsqueeze(0)).flatten()
    basis = _from_each_column(rule, bases, start)
    reduced = system.rows @ basis
    missing = system.wanted - system.rows @ start
    if basis.shape[1] == 0 or len(reduced) == 0:
        return start, basis
    left, values, rotations = torch.linalg.svd(reduced, full_matrices=True)
    # Against the rows themselves: what is left of them may be rounding alone.
    largest = torch.maximum(values[0], system.rows.norm(dim=1).max()).clamp_min(1e-300)
    n_kept = int((values > max(1e-8, 10 * level**0.5) * largest).sum())
    step = rotations[:n_kept].T @ ((left[:, :n_kept].T @ missing) / values[:n_kept])
    return start + basis @ step, basis @ rotations[n_kept:].T


def _from_each_column(rule: AffineRule, bases: list[Tensor], like: Tensor) -> Tensor:
    """Null vectors of each block's matrix, once per column, and entries in no column: ``(n_inputs, vectors)``."""
    numbers = torch.arange(rule.n_inputs, dtype=torch.float64, device=like.device).view(1, *rule.layer.input_shape)
    places = rule.columns(numbers)[0].long()
    n_vectors = sum(len(columns) * basis.shape[1] for columns, basis in zip(places, bases, strict=True))
    result = like.new_zeros(rule.n_inputs, n_vectors)
    first = 0
    for columns, basis in zip(places, bases, strict=True):
        for column in columns:
            result[column, first : first + basis.shape[1]] = basis
            first += basis.shape[1]
    unseen = torch.ones(rule.n_inputs, dtype=torch.bool, device=like.device)
    unseen[places.flatten()] = False
    return torch.cat([result, torch.eye(rule.n_inputs).to(result)[:, unseen]], dim=1)


def _on_support(
    rule: AffineRule, found: Tensor, rank: int, system: _System, unit: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The equations solved with the zeros fixed, and which entries an equation meets at all: both ``(n,)``.

    None if for no threshold they hold with nothing negative. That they hold says something only of supports with fewer
    unknowns than there are independent equations, ``rank``.
    """
    size = len(found)
    normal = found.new_zeros(1, size, size)
    rule.add_normal(normal, unit)
    normal = normal[0] + system.rows.T @ system.rows
    right = rule.from_columns(system.right.unsqueeze(0)).flatten() + system.rows.T @ system.wanted
    seen = normal.diagonal() > _TOLERANCE * normal.diagonal().max()
    for threshold in _THRESHOLDS:
        support = (found > threshold * found.max()) & seen
        if rank < size and int(support.sum()) >= rank:
            continue
        part = normal[support][:, support]
        factor, failed = torch.linalg.cholesky_ex(part + 1e-15 * part.diagonal().mean() * torch.eye(len(part)).to(part))
        pivots = factor.diagonal().square()
        if failed or len(pivots) == 0 or pivots.min() < _TOLERANCE * pivots.max():
            continue
        solution = torch.zeros_like(found)
        for _ in range(2):
            missing = (right - normal @ solution)[support]
            solution[support] += torch.cholesky_solve(missing.unsqueeze(1), factor).squeeze(1)
        inputs = solution.view(1, *rule.layer.input_shape)
        residual = (rule.weight_gradient(inputs, unit) - gradient).norm() / gradient.norm()
        forward = (system.rows @ solution - system.wanted).norm() / system.wanted.norm().clamp_min(1e-300)
        largest = solution.max()
        if residual + forward < _RESIDUAL and solution.min() > -1e-6 * largest:
            return solution.clamp_min(0), seen
    return None


def _from_outputs(
    rule: AffineRule,
    system: _System,
    unit: Tensor,
    gradient: Tensor,
    uncertainty: Tensor,
    prior: Prior,
    bounds: Bounds,
) -> tuple[Tensor, Tensor, bool]:
    """Where the output is an estimate, so that ``δ`` may be wrong wherever a unit's state is.

    First from the outputs that are surely on, the bounds of the others, and the prior; then once more with the gradient
    equations, weighed by how badly that first estimate meets them.
    """
    weights = 1 / uncertainty.clamp_min(1e-20)
    typical = weights.median()
    base = prior.precision + system.rows.T @ (weights.unsqueeze(1) * system.rows)
    base_right = prior.precision @ prior.mean + system.rows.T @ (weights * system.wanted)
    found = prior.mean
    spread = found.new_zeros(())
    for with_gradient in (False, True):
        normal, right = base, base_right
        if with_gradient:
            inputs = found.view(1, *rule.layer.input_shape)
            error = (rule.weight_gradient(inputs, unit) - gradient).square().mean().clamp_min(1e-20)
            blocks = found.new_zeros(1, len(found), len(found))
            rule.add_normal(blocks, unit)
            normal = normal + blocks[0] / error
            right = right + rule.from_columns(system.right.unsqueeze(0)).flatten() / error
        violated = torch.zeros(len(system.upper), dtype=torch.bool, device=found.device)
        for _ in range(5):
            rows = system.upper[violated]
            factor = _factor(normal + typical * rows.T @ rows)
            held = right + typical * rows.T @ system.upper_at[violated]
            found = torch.cholesky_solve(held.unsqueeze(1), factor).squeeze(1)
            now = system.upper @ found > system.upper_at
            if bool((now == violated).all()):
                break
            violated = now
        spread = torch.cholesky_inverse(factor).diagonal().mean()
    return _within(found, bounds), spread, False


def _factor(normal: Tensor) -> Tensor:
    """The Cholesky factor, shifted by as little as rounding needs where variances differ by many orders."""
    for shift in (0.0, 1e-14, 1e-12, 1e-10, 1e-8):
        shifted = normal + shift * normal.diagonal().mean() * torch.eye(len(normal)).to(normal)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            break
    return factor


def _within(found: Tensor, bounds: Bounds) -> Tensor:
    return found if bounds == (None, None) else found.clamp(*bounds)


def _indifferent(rule: AffineRule, like: Tensor, bounds: Bounds) -> Prior:
    """Without public images: the middle of the bounds, or zero, and a spread of one, or of the interval."""
    low, high = bounds
    middle, spread = (0.0, 1.0) if low is None or high is None else ((low + high) / 2, (high - low) / 12**0.5)
    size = rule.n_inputs
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return Prior(like.new_full((size,), middle), identity / spread**2)
