"""`solve_jointly`: a layer's inputs for all images of a leak at once, from the one gradient that their sum left."""

from math import prod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gitlight.generators.exact.affine import LARGEST_RANK, LARGEST_STACKED, AffineRule
from gitlight.generators.exact.posterior import N_DEVIATIONS, WORKSPACE_BYTES, factorised, solved_by
from gitlight.generators.exact.rule import Estimate
from gitlight.gradients.precision import full_float32

_LARGEST = 1 << 23
"""Entries of a leak's system, 64 MiB: beyond, it takes a second."""

_LARGEST_BASIS = 1 << 25
"""Entries of what all output positions see of all columns of a basis, 256 MiB."""

_UNKNOWN = 1e18
"""An error that says that nothing is known; its square is finite in single precision."""

_KNOWN: WeakKeyDictionary[AffineRule, dict[int, bool]] = WeakKeyDictionary()
"""What was found of a rule: each takes a second or two, and is asked for several times."""


def solved_jointly(rule: AffineRule, n_images: int) -> str | None:
    """Why `solve_jointly` does not take gradients of this layer; None if it does."""
    if rule.groups != 1:
        return f"its weight has {rule.groups} groups"
    n_outputs = rule.layer.weight_shape[0]
    basis = prod(rule.layer.output_shape) // n_outputs * (rule.n_equations // n_outputs) * rule.column_size
    covariance = rule.n_blocks * rule.column_size**2
    if max(rule.n_equations * n_images * rule.column_size, covariance) > _LARGEST or basis > _LARGEST_BASIS:
        return f"the equations of {n_images} images are too many"
    return None


def exact_jointly(rule: AffineRule, n_images: int) -> bool:
    """Whether gradient equations determine the inputs of ``n_images`` images at once, ``δ`` in general position."""
    known = _KNOWN.setdefault(rule, {})
    if n_images not in known:
        known[n_images] = _exact_jointly(rule, n_images)
    return known[n_images]


def exact_by_outputs(rule: AffineRule) -> bool:
    """Whether all outputs alone determine the input, for ``W`` in general position."""
    known = _KNOWN.setdefault(rule, {})
    if 0 not in known:
        known[0] = _exact_by_outputs(rule)
    return known[0]


def _exact_jointly(rule: AffineRule, n_images: int) -> bool:
    size = n_images * rule.column_size
    if not rule.exact or solved_jointly(rule, n_images) is not None or size > min(rule.n_equations, LARGEST_RANK):
        return False
    delta = _general((n_images, *rule.layer.output_shape))
    identity = torch.eye(rule.column_size, dtype=torch.float64, device="cpu")
    systems = [torch.cat([*rule.matrix(block, delta, identity)], dim=1) for block in range(rule.n_blocks)]
    return all(int(torch.linalg.matrix_rank(system)) == size for system in systems)


def _exact_by_outputs(rule: AffineRule) -> bool:
    if rule.n_inputs > min(prod(rule.layer.output_shape), LARGEST_STACKED):
        return False
    ones = torch.ones((1, *rule.layer.output_shape), dtype=torch.float64, device="cpu")
    normal = rule.forward_normal(_general(rule.layer.weight_shape), ones)[0].clone()
    normal.diagonal().sub_(1e-12 * normal.diagonal().max())
    return not bool(torch.linalg.cholesky_ex(normal).info)


def solve_jointly(
    rule: AffineRule,
    delta: Tensor,
    errors: Tensor,
    weight_gradient: Tensor,
    noise: Tensor,
    mean: Tensor,
    factor: Tensor,
    size: Tensor,
    misfit: Tensor,
) -> Estimate:
    """The most probable inputs ``a_n`` of ``N`` images, given ``Σ_n K(δ_n) a_n = g`` and what is known beforehand.

    All columns of a block (input channels, or features) meet the same matrix ``[K(δ_1) … K(δ_N)]``: one factorisation
    serves them. With ``a_n = mean_n + L u_n``, ``u`` white, it is that of the equations or that of the unknowns,
    whichever are fewer; and the residual is refined once, from the equations themselves. As many equations as unknowns
    leave nothing of the mean but where noise has drowned them.

    Args:
        rule: the layer's; of one group.
        delta: ``(B, N, *output_shape)`` float64, of the mean loss, not all zero.
        errors: ``(B, N, N_DEVIATIONS, *output_shape)``, samples of the error of ``delta``.
        weight_gradient: ``(B, *weight.shape)``, of the mean loss.
        noise: ``(B,)``, standard deviation of its entries' error, above zero.
        mean: ``(B, N, *input_shape)``, of each image's input beforehand.
        factor: ``(n_blocks, column_size, column_size)``, ``L``: ``L Lᵀ`` is a column's covariance beforehand.
        size: ``(B, N)``, of each image's ``L``, which it multiplies.
        misfit: ``()``, error of ``K(δ_n) a_n`` over its size, whatever that of ``delta``: of fitted weights.

    Returns:
        ``(B, N, *input_shape)``, with one variance for all entries of an image that are in a column, their mean.
    """
    entries = max(rule.n_equations * rule.column_size * delta.shape[1], weight_gradient[:1].numel())
    chunk = max(1, int(WORKSPACE_BYTES / (3 * 8 * entries)))
    if len(delta) > chunk:
        parts = []
        for start in range(0, len(delta), chunk):
            of = slice(start, start + chunk)
            parts.append(
                solve_jointly(
                    rule, delta[of], errors[of], weight_gradient[of], noise[of], mean[of], factor, size[of], misfit
                )
            )
        return Estimate(torch.cat([part.value for part in parts]), torch.cat([part.variance for part in parts]))
    # In units of the largest entry of δ, whose squares else may be zero.
    unit = delta.flatten(1).abs().amax(dim=1).clamp_min(1e-300)
    delta, gradient = delta / _like(unit, delta), weight_gradient / _like(unit, weight_gradient)
    missing, squares = gradient, []
    for its_mean, its_delta in zip(mean.unbind(1), delta.unbind(1), strict=True):
        made = rule.weight_gradient(its_mean, its_delta)
        missing = missing - made
        squares.append(made.flatten(2).square().mean(dim=2))
    spread = (factor.square().sum(dim=2).mean() * size.square()).unsqueeze(2)
    variance = _variance_by_output(rule, (errors / _like(unit, errors)).float(), noise / unit, mean, spread)
    of_delta = rule.outputs(delta.flatten(0, 1)).square().sum(dim=1).unflatten(0, delta.shape[:2])
    relative = torch.stack(squares, dim=1) + spread * of_delta
    variance = variance + misfit.square() * relative.sum(dim=1)
    level = variance.amin(dim=1, keepdim=True)
    weights = (level / variance).sqrt()
    missing = missing * weights.view(*weights.shape, *[1] * (gradient.dim() - 2))
    weighed = (delta * rule.by_output(weights).unsqueeze(1)).flatten(0, 1)
    moved, variances = [], []
    for block, its_factor in enumerate(factor):
        matrix = rule.matrix(block, weighed, its_factor).unflatten(0, delta.shape[:2])  # (B, N, equations, size)
        matrix = (matrix * size[:, :, None, None]).transpose(1, 2).flatten(2)
        solve = _by_unknowns if matrix.shape[2] <= matrix.shape[1] else _by_equations
        found, deviations = solve(matrix, rule.equations(block, missing), level)
        moved.append((its_factor @ found.unflatten(1, (delta.shape[1], -1))).flatten(0, 1).mT)
        variances.append((its_factor @ deviations.unflatten(1, (delta.shape[1], -1))).square().mean(dim=(2, 3)))
    step = rule.from_columns(torch.stack(moved, dim=1)).unflatten(0, delta.shape[:2])
    each = (*size.shape, *[1] * (step.dim() - 2))
    of_images = torch.stack(variances).mean(dim=0) * size.square()
    # Of entries in no column, such as pixels beyond the last whole patch, no equation says anything.
    covered = rule.from_columns(torch.ones_like(rule.columns(mean[:1, 0]))) > 0
    return Estimate(
        mean + step * size.view(each), torch.where(covered, of_images.view(each).expand_as(step), torch.inf)
    )


def _by_unknowns(matrix: Tensor, missing: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """``(AᵀA + level)⁻¹ Aᵀ missing``, refined once; and samples of its error."""
    white = _white(matrix.shape[2], matrix)
    lower, solved = _factor(matrix.mT @ matrix, level)
    found = solved_by(lower, matrix.mT @ missing)
    left = matrix.mT @ (missing - matrix @ found) - level.unsqueeze(2) * found
    half = torch.linalg.solve_triangular(lower.mT, white.expand(len(matrix), -1, -1), upper=True)
    return _where(solved, found + solved_by(lower, left), half * level.sqrt().unsqueeze(2), white)


def _by_equations(matrix: Tensor, missing: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The same as ``Aᵀ (AAᵀ + level)⁻¹ missing``."""
    white = _white(matrix.shape[2], matrix)
    lower, solved = _factor(matrix @ matrix.mT, level)
    dual = solved_by(lower, missing)
    left = missing - matrix @ (matrix.mT @ dual) - level.unsqueeze(2) * dual
    found = matrix.mT @ (dual + solved_by(lower, left))
    # A sample of what is left: one from beforehand, less what its own equations, with an error of theirs, tell of it.
    error = _white(matrix.shape[1], matrix) * level.sqrt().unsqueeze(2)
    return _where(solved, found, white - matrix.mT @ solved_by(lower, matrix @ white + error), white)


def _where(solved: Tensor, found: Tensor, deviations: Tensor, white: Tensor) -> tuple[Tensor, Tensor]:
    """Of leaks without a factor nothing is found: what is known beforehand stands."""
    solved = solved.view(-1, 1, 1)
    return torch.where(solved, found, 0.0), torch.where(solved, deviations, white)


def _factor(normal: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = normal.diagonal(dim1=1, dim2=2)
    # Against exact singularity only: a hundred times what rounding leaves of a zero.
    diagonal += level + 1e-15 * diagonal.mean(dim=1, keepdim=True)
    lower, solved, _ = factorised(normal)
    return lower, solved


def _variance_by_output(rule: AffineRule, errors: Tensor, noise: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """``(B, outputs)``: of the error of each output's equations, the gradient's own and what those of ``δ`` make.

    Errors of ``δ``, in single precision as a few digits of them are enough, are multiplied by inputs, whose mean is
    known, and whose variance ``spread``, ``(B, N, 1)``, counts as independent.
    """
    n_leaks, n_images, n_samples = errors.shape[:3]
    errors = torch.nan_to_num(errors, nan=_UNKNOWN).clamp(-_UNKNOWN, _UNKNOWN)
    by_position = rule.outputs(errors.flatten(0, 2)).unflatten(0, (n_leaks, n_images, n_samples))
    summed = (spread * by_position.square().sum(dim=(2, 3)) / n_samples).sum(dim=1)  # (B, outputs)
    rows = by_position.permute(0, 2, 4, 1, 3).reshape(n_leaks, -1, n_images * by_position.shape[3])
    patches = rule.patches(mean.flatten(0, 1).float()).unflatten(0, (n_leaks, n_images)).flatten(1, 2)
    with torch.autocast(errors.device.type, enabled=False), full_float32():
        if 8 * patches.shape[1] < patches.shape[2]:  # by their products: 64 bits, as what cancels would be left of 32
            patches, wide = patches.double(), rows.double()
            made = ((wide @ (patches @ patches.mT)) * wide).sum(dim=2).clamp_min(0) / patches.shape[2]
        else:
            made = (rows @ patches).square().mean(dim=2).double()  # (B, samples · outputs)
    by_mean = made.unflatten(1, (n_samples, -1)).mean(dim=1)
    return noise.square().unsqueeze(1) + by_mean + summed + 1e-300


def _general(shape: tuple[int, ...]) -> Tensor:
    """In general position."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")


def _white(size: int, like: Tensor) -> Tensor:
    """White noise ``(size, N_DEVIATIONS)``, always the same for one size."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn((size, N_DEVIATIONS), generator=generator, dtype=torch.float64, device="cpu").to(like)


def _like(per_leak: Tensor, tensor: Tensor) -> Tensor:
    return per_leak.view(-1, *[1] * (tensor.dim() - 1))
