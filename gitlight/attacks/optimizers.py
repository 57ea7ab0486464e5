"""Optimisers of many independent searches at once: each row has a state and a step of its own.

`torch.optim` has one state for all: its L-BFGS would tie the searches together, and none can end before the others.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class RowOptimizer(ABC):
    """Takes steps for ``(B, n)`` variables."""

    @abstractmethod
    def step(self, variables: Tensor, gradients: Tensor, size: float) -> Tensor:
        """The variables after a step of size ``size``."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""


class Adam(RowOptimizer):
    """Adam (Kingma and Ba 2015); on the signs of the gradients, if asked (Geiping et al. 2020)."""

    def __init__(self, signed: bool, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._signed, self._betas, self._eps = signed, betas, eps
        self._mean: Tensor | None = None
        self._square: Tensor | None = None
        self._count = 0

    def step(self, variables: Tensor, gradients: Tensor, size: float) -> Tensor:
        """One step."""
        given = gradients.sign() if self._signed else gradients
        if self._mean is None or self._square is None:
            self._mean, self._square = torch.zeros_like(given), torch.zeros_like(given)
        self._count += 1
        first, second = self._betas
        self._mean = torch.lerp(given, self._mean, first)
        self._square = torch.lerp(given.square(), self._square, second)
        mean = self._mean / (1 - first**self._count)
        square = self._square / (1 - second**self._count)
        return variables - size * mean / (square.sqrt() + self._eps)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        if self._mean is not None and self._square is not None:
            self._mean, self._square = self._mean[rows], self._square[rows]


class LBFGS(RowOptimizer):
    """Limited-memory BFGS (Liu and Nocedal 1989) without line search, as `torch.optim.LBFGS` by default, row by row.

    Directions are those of the compact representation (Byrd, Nocedal and Schnabel 1994, Eq. 3.1) with the triangular
    systems in double precision: the history is read twice a step, as two batched products, where the usual recursion
    goes through it pair by pair. A row whose direction does not descend starts again from its gradient.
    """

    def __init__(self, history: int = 100) -> None:
        self._history = history
        self._former: tuple[Tensor, Tensor] | None = None
        self._memory: _Memory | None = None

    def step(self, variables: Tensor, gradients: Tensor, size: float) -> Tensor:
        """One step; the first has an ℓ₁ norm of at most ``size``."""
        direction = -gradients
        if self._former is not None:
            if self._memory is None:
                self._memory = _Memory(gradients, self._history)
            direction = -self._memory.newton(variables - self._former[0], gradients - self._former[1], gradients)
        descends = (direction * gradients).sum(dim=1, keepdim=True) < 0
        direction = torch.where(descends, direction, -gradients)
        first = size * (1 / gradients.abs().sum(dim=1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)
        fresh = ~descends if self._memory is not None else torch.ones_like(descends)
        scale = torch.where(fresh, first, torch.full_like(first, size))
        self._former = (variables, gradients)
        return variables + scale * direction

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        if self._memory is not None:
            self._memory.keep(rows)
        if self._former is not None:
            self._former = (self._former[0][rows], self._former[1][rows])


class _Memory:
    """The latest ``m`` steps ``S`` and changes of gradients ``Y`` of each row, and what their products tell.

    Pairs lie in a ring, in the place of the oldest; products are in order of age, as the triangular systems want them.
    """

    def __init__(self, like: Tensor, history: int) -> None:
        n_rows, n = like.shape
        self._history, self._count = history, 0
        self._pairs = like.new_zeros(n_rows, 2 * history, n)
        wide = like.new_zeros(n_rows, history, history, dtype=torch.float64)
        # A row's pair without curvature is one of zeros, and its diagonal 1: it adds nothing.
        self._steps_changes = wide + torch.eye(history, dtype=torch.float64, device=like.device)
        self._changes_changes = wide
        self._scale = wide.new_ones(n_rows, 1)

    def newton(self, step: Tensor, change: Tensor, gradients: Tensor) -> Tensor:
        """Take in a pair, and apply the approximate inverse Hessian to ``(B, n)`` gradients."""
        history = self._history
        curvature = (step * change).sum(dim=1, keepdim=True)
        size = change.square().sum(dim=1, keepdim=True)
        good = curvature > 1e-10 * size  # others teach nothing
        self._scale = torch.where(good, curvature.double() / size.double().clamp_min(1e-300), self._scale)
        place, last = self._count % history, min(self._count, history - 1)
        if self._count >= history:
            for products in (self._steps_changes, self._changes_changes):
                products[:, :-1, :-1] = products[:, 1:, 1:].clone()
        self._count += 1
        change = torch.where(good, change, 0.0)
        self._pairs[:, place] = torch.where(good, step, 0.0)
        self._pairs[:, history + place] = change
        # With the history transposed: the other way round a batched product on a CPU takes four times as long.
        found = torch.stack([change, gradients], dim=1) @ self._pairs.transpose(1, 2)
        order = self._by_age()
        of_steps, of_changes = (part[:, :, order].double() for part in found.split(history, dim=2))
        self._steps_changes[:, :, last] = of_steps[:, 0]
        self._steps_changes[:, last, :last] = 0.0
        self._steps_changes[:, last, last] = torch.where(good.squeeze(1), of_steps[:, 0, last], 1.0)
        self._changes_changes[:, :, last] = self._changes_changes[:, last] = of_changes[:, 0]
        upper, scale = self._steps_changes, self._scale.unsqueeze(2)
        solved = torch.linalg.solve_triangular(upper, of_steps[:, 1].unsqueeze(2), upper=True)
        right = upper.diagonal(dim1=1, dim2=2).unsqueeze(2) * solved
        right = right + scale * (self._changes_changes @ solved - of_changes[:, 1].unsqueeze(2))
        for_steps = torch.linalg.solve_triangular(upper.transpose(1, 2), right, upper=False)
        factors = torch.empty_like(found[:, :1])
        factors[:, 0, order] = for_steps.squeeze(2).to(found)
        factors[:, 0, history + order] = (-scale * solved).squeeze(2).to(found)
        return self._scale.to(gradients) * gradients + (factors @ self._pairs).squeeze(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._pairs, self._scale = self._pairs[rows], self._scale[rows]
        self._steps_changes, self._changes_changes = self._steps_changes[rows], self._changes_changes[rows]

    def _by_age(self) -> Tensor:
        """Places in the ring, the oldest pair's first; empty ones last."""
        oldest = self._count % self._history if self._count > self._history else 0
        return (torch.arange(self._history, device=self._pairs.device) + oldest) % self._history


def build_optimizer(name: str) -> RowOptimizer:
    """The optimiser of a config."""
    return LBFGS() if name == "lbfgs" else Adam(signed=name == "signed_adam")


def step_size(size: float, decay: str, progress: float) -> float:
    """At ``progress`` in [0, 1] through the search.

    >>> [round(step_size(0.1, "step", t), 5) for t in (0.0, 0.5, 0.7, 0.9)]
    [0.1, 0.01, 0.001, 0.0001]
    """
    if decay == "step":
        return size * 0.1 ** sum(progress >= at for at in (3 / 8, 5 / 8, 7 / 8))
    if decay == "cosine":
        return size * 0.5 * (1 + math.cos(math.pi * progress))
    return size
