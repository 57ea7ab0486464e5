"""Inequalities where equations leave directions open: the input that violates them least, and whether it is alone."""

import torch
from torch import Tensor

from gitlight.generators.exact.posterior import Prior

Bounds = tuple[float | None, float | None]
"""Smallest and largest value of an entry; None: no bound."""

_PRIOR_SHARES = (1e-2, 1e-4, 1e-6)
"""Weight of the prior against violated inequalities, decreasing: it starts the search, the inequalities end it."""

_RIDGES = (1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
"""Decreasing, so that Newton's method starts near each minimum, and finds in the end whether there is one without."""


def least_violation(
    start: Tensor, free: Tensor, upper: Tensor, upper_at: Tensor, prior: Prior, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """The most probable of the inputs that violate inequalities least, by Newton's method on squared violations.

    Args:
        start: ``(n,)``, a solution of the equations.
        free: ``(n, f)``, orthonormal directions that they leave open.
        upper: ``(m, n)``; with ``upper_at``, the inequalities ``upper · a ≤ upper_at``.
        upper_at: ``(m,)``.
        prior: what is known of the input beforehand.
        bounds: of every entry.

    Returns:
        the input, ``(n,)``; and the mean variance of its entries that is left, ``()``.
    """
    rows, least = _inequalities(start, upper, upper_at, bounds)
    reduced, reached = rows @ free, rows @ start - least
    precision = free.T @ prior.precision @ free
    pull = free.T @ (prior.precision @ (start - prior.mean))
    # In units of the prior's own size, so that its share means the same for every layer.
    unit = precision.diagonal().mean().clamp_min(1e-300)
    step = torch.zeros(free.shape[1], dtype=start.dtype, device=start.device)
    for share in _PRIOR_SHARES:
        step = _newton(step, reduced, reached, share * precision / unit, share * pull / unit)
    tight = (reached + reduced @ step) < 1e-9
    # Inequalities that hold with equality leave no variance in their direction.
    remaining = precision + 1e6 * unit * (reduced[tight].T @ reduced[tight])
    return start + free @ step, torch.linalg.inv(remaining).diagonal().sum() / len(start)


def _inequalities(start: Tensor, upper: Tensor, upper_at: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """``rows · a ≥ least``, rows of about unit length."""
    identity = torch.eye(len(start), dtype=start.dtype, device=start.device)
    lengths = upper.norm(dim=1).clamp_min(1e-300)
    rows, least = [-upper / lengths.unsqueeze(1)], [-upper_at / lengths]
    if bounds[0] is not None:
        rows.append(identity)
        least.append(torch.full_like(start, bounds[0]))
    if bounds[1] is not None:
        rows.append(-identity)
        least.append(torch.full_like(start, -bounds[1]))
    return torch.cat(rows), torch.cat(least)


def _newton(step: Tensor, rows: Tensor, reached: Tensor, precision: Tensor, pull: Tensor) -> Tensor:
    """Minimises ``½‖min(0, rows · s + reached)‖² + ½ sᵀ P s + pull · s``: piecewise quadratic, so few steps."""

    def value(step: Tensor) -> Tensor:
        violation = (reached + rows @ step).clamp_max(0)
        return 0.5 * violation.square().sum() + 0.5 * step @ precision @ step + pull @ step

    current = value(step)
    for _ in range(40):
        slack = reached + rows @ step
        violated = slack < 0
        slope = rows[violated].T @ slack[violated] + precision @ step + pull
        curvature = rows[violated].T @ rows[violated] + precision
        curvature.diagonal().add_(1e-14 * curvature.diagonal().mean())
        direction = torch.linalg.solve(curvature, slope)
        length, decrease = 1.0, slope @ direction
        while value(step - length * direction) > current - 1e-4 * length * decrease and length > 1e-6:
            length /= 2
        step = step - length * direction
        former, current = current, value(step)
        if former - current <= 1e-12 * current.abs():
            break
    return step


def only_one(free: Tensor, zero: Tensor) -> bool:
    """Whether no other non-negative input meets the equations than the one that is zero where ``zero`` holds.

    Another would differ by a combination of ``free`` that is nowhere negative there. There is none if positive weights
    of the zeros add up all rows of ``free`` to nothing (Stiemke's lemma). Such are one plus the violations of the
    inequalities where ``½‖min(0, F s)‖² − Σ F s`` is least, and without them it has no minimum.
    """
    rows = free[zero]
    if rows.shape[1] == 0 or len(rows) < rows.shape[1]:
        return rows.shape[1] == 0
    step = torch.zeros(rows.shape[1], dtype=rows.dtype, device=rows.device)
    identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    for ridge in _RIDGES:
        step = _newton(step, rows, rows.new_zeros(len(rows)), ridge * identity, -rows.sum(dim=0))
        weights = 1 - (rows @ step).clamp_max(0)
        if bool((weights @ rows).norm() <= 1e-6 * rows.norm()):
            return True
    return False
