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

    A row whose direction does not descend starts again from its gradient.
    """

    def __init__(self, history: int = 100) -> None:
        self._history = history
        self._steps: list[Tensor] = []
        self._changes: list[Tensor] = []
        self._former: tuple[Tensor, Tensor] | None = None

    def step(self, variables: Tensor, gradients: Tensor, size: float) -> Tensor:
        """One step; the first has an ℓ₁ norm of at most ``size``."""
        if self._former is not None:
            step, change = variables - self._former[0], gradients - self._former[1]
            # Pairs without curvature teach nothing: rows that have one keep their history by a pair of zeros.
            good = ((step * change).sum(dim=1, keepdim=True) > 1e-10 * change.square().sum(dim=1, keepdim=True)).to(
                step
            )
            self._steps = [*self._steps, step * good][-self._history :]
            self._changes = [*self._changes, change * good][-self._history :]
        direction = self._direction(gradients)
        descends = (direction * gradients).sum(dim=1, keepdim=True) < 0
        direction = torch.where(descends, direction, -gradients)
        first = size * (1 / gradients.abs().sum(dim=1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)
        fresh = ~descends if self._steps else torch.ones_like(descends)
        scale = torch.where(fresh, first, torch.full_like(first, size))
        self._former = (variables, gradients)
        return variables + scale * direction

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._steps = [step[rows] for step in self._steps]
        self._changes = [change[rows] for change in self._changes]
        if self._former is not None:
            self._former = (self._former[0][rows], self._former[1][rows])

    def _direction(self, gradients: Tensor) -> Tensor:
        if not self._steps:
            return -gradients
        products = [(s * y).sum(dim=1, keepdim=True) for s, y in zip(self._steps, self._changes, strict=True)]
        inverses = [torch.where(p > 0, 1 / p.clamp_min(1e-300), 0.0) for p in products]
        remaining = -gradients
        factors = []
        for s, y, inverse in zip(reversed(self._steps), reversed(self._changes), reversed(inverses), strict=True):
            factor = inverse * (s * remaining).sum(dim=1, keepdim=True)
            remaining = remaining - factor * y
            factors.append(factor)
        scale = torch.ones_like(products[0])
        for product, y in zip(products, self._changes, strict=True):  # of the latest pair that has curvature
            scale = torch.where(product > 0, product / y.square().sum(dim=1, keepdim=True).clamp_min(1e-300), scale)
        remaining = remaining * scale
        for s, y, inverse, factor in zip(self._steps, self._changes, inverses, reversed(factors), strict=True):
            remaining = remaining + (factor - inverse * (y * remaining).sum(dim=1, keepdim=True)) * s
        return remaining


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
