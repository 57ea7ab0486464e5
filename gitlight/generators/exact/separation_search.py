"""The least squares that tell the images of a client batch apart, and the search for their solution."""

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 200
"""Steps of a search, at most."""

_LEAST_DAMPING, _FIRST_DAMPING, _MOST_DAMPING = 1e-14, 1e-2, 1e4
"""Of a step, over the mean of the diagonal: a third of it after one that gains, three times after one that does not."""

_GAIN, _IN_A_ROW = 1e-6, 3
"""Share of the squared residual that a step gains at least; and how many that gain less end a search."""

_AHEAD = 0.1
"""Share of a step after which its curvature is looked at."""


class Problem(NamedTuple):
    """Least squares for the coordinates ``m_n`` of ``[a_n; 1]``.

    Attributes:
        gradient: ``(B, classes, N)``, in coordinates and in units of the leak's own size.
        unit: ``(B, 1)``, that size.
        logits: ``(B, classes, N)``: from coordinates to logits.
        ones: ``(B, N)``: from coordinates to the entry that is one.
        labels: ``(B, N, classes)``.
        mean: ``(B, N)``, coordinates of the typical input.
        weights: ``(B, N)``, of the gradient's columns.
        doubt: ``(B, 1)``, weight of the difference from the typical input.
    """

    gradient: Tensor
    unit: Tensor
    logits: Tensor
    ones: Tensor
    labels: Tensor
    mean: Tensor
    weights: Tensor
    doubt: Tensor

    def of(self, which: Tensor) -> "Problem":
        """Some leaks'."""
        return Problem(*(part[which] for part in self))

    def residual(self, found: Tensor) -> Tensor:
        """``(B, equations)`` for coordinates ``(B, N, N)``."""
        n = found.shape[1]
        delta = torch.softmax(found @ self.logits.mT, dim=2) - self.labels
        missing = (delta.mT @ found / (n * self.unit.unsqueeze(1)) - self.gradient) * self.weights.unsqueeze(1)
        ones = self._of_ones * ((found @ self.ones.unsqueeze(2)).squeeze(2) - 1)
        prior = self.doubt.unsqueeze(2) * (found - self.mean.unsqueeze(1))
        return torch.cat([missing.flatten(1), ones, prior.flatten(1)], dim=1)

    def jacobian(self, found: Tensor) -> Tensor:
        """``(B, equations, N · N)``, the residual's."""
        batch, n, _ = found.shape
        probabilities = torch.softmax(found @ self.logits.mT, dim=2)
        delta = probabilities - self.labels
        inner = probabilities @ self.logits  # (B, image, coordinate)
        slopes = probabilities.unsqueeze(3) * (self.logits.unsqueeze(1) - inner.unsqueeze(2))  # (B, image, class, k)
        # Entry (class, j) of the gradient by coordinate k of an image.
        moved = slopes.unsqueeze(3) * found[:, :, None, :, None]  # (B, image, class, j, k)
        eye = torch.eye(n, dtype=found.dtype, device=found.device)
        moved = moved + delta[:, :, :, None, None] * eye
        moved = moved * ((self.weights / (n * self.unit))[:, None, None, :, None])
        of_gradient = moved.permute(0, 2, 3, 1, 4).reshape(batch, moved.shape[2] * n, n * n)
        of_ones = (self._of_ones.unsqueeze(2) * self.ones.unsqueeze(1)).unsqueeze(2) * eye.unsqueeze(2)
        of_prior = self.doubt.unsqueeze(2) * torch.eye(n * n, dtype=found.dtype, device=found.device)
        return torch.cat([of_gradient, of_ones.reshape(batch, n, n * n), of_prior], dim=1)

    @property
    def _of_ones(self) -> Tensor:
        """Weight of the condition that one entry is one, which holds exactly: ``(B, 1)``."""
        return (self.weights[:, -1:] * self.gradient[:, :, -1].norm(dim=1, keepdim=True)).clamp_min(1.0)


def search(problem: Problem, start: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of a local minimum, and the sum of squares there.

    Where images share a label, minima lie in narrow and curved valleys. Steps follow the curve by their second-order
    term (geodesic acceleration), and are damped alike in all directions, which have one unit (Transtrum and Sethna
    2012, arXiv 1201.5885).
    """
    found, residual = start.clone(), problem.residual(start)
    cost = torch.nan_to_num(residual.square().sum(dim=1), nan=torch.inf)
    damping = torch.full_like(cost, _FIRST_DAMPING)
    idle = torch.zeros_like(cost)  # steps in a row that gained little
    moving = torch.arange(len(cost), device=cost.device)  # those that have not arrived
    for _ in range(_STEPS):
        part, at, its_damping, its_residual = problem.of(moving), found[moving], damping[moving], residual[moving]
        there, failed = _step(part, at, its_residual, its_damping)
        new_residual = part.residual(there)
        new_cost, former = new_residual.square().sum(dim=1), cost[moving]
        better = (new_cost < former) & ~failed
        gained = moving[better]
        found[gained], residual[gained], cost[gained] = there[better], new_residual[better], new_cost[better]
        damping[moving] = torch.where(better, its_damping / 3, its_damping * 3).clamp_min(_LEAST_DAMPING)
        little = former - new_cost < _GAIN * former
        idle[moving] = torch.where(better, torch.where(little, idle[moving] + 1, 0), idle[moving])
        moving = moving[(idle[moving] < _IN_A_ROW) & (damping[moving] <= _MOST_DAMPING)]
        if len(moving) == 0:
            break
    return found, cost


def _step(problem: Problem, at: Tensor, residual: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Where one step leads, ``(B, N, N)``, and whether there is none, ``(B,)``."""
    jacobian = problem.jacobian(at)
    normal = jacobian.mT @ jacobian
    unit = normal.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].clamp_min(1e-300)
    normal = normal / unit
    normal.diagonal(dim1=1, dim2=2).add_(damping.unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(normal)

    def solve(right: Tensor) -> Tensor:
        return torch.cholesky_solve(jacobian.mT @ right / unit, factor)

    residual = residual.unsqueeze(2)
    velocity = -solve(residual)
    ahead = problem.residual(at + _AHEAD * velocity.view_as(at)).unsqueeze(2)
    curvature = ((ahead - residual) / _AHEAD - jacobian @ velocity) * (2 / _AHEAD)
    return at + (velocity - solve(curvature) / 2).view_as(at), failed != 0


def nearest(n: int, found: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each ``n`` searches in a row the one that came nearest, how near, and its number."""
    best = cost.view(-1, n).min(dim=1)
    every = torch.arange(len(best.indices), device=cost.device)
    return found.unflatten(0, (-1, n))[every, best.indices], best.values, best.indices
