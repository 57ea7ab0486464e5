"""Leaked weights from pairs, in closed form: linear least squares on what the layers above give away."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from gitlight.errors import DataError
from gitlight.virtual_ranks import current_share

_SMALLEST = 1e-13
"""Singular values, over the largest, that are taken for rounding of a zero; columns are scaled to one length first."""

_CERTAIN = 1e11
"""Norm of the triangular factor's inverse, columns scaled to one length, below which all unknowns are determined.

Beyond it a singular value decomposition, ten times as expensive, says which."""

_LEAST_DOUBT = 1e-6
"""Of squared relative errors that inputs have of a guessed scale: no few of them are to count for all."""

log = logging.getLogger(__name__)


class LeastSquares:
    """Least squares ``targets ≈ rows · x`` over any number of equations, in float64, by QR factorisation.

    Only the triangular factor of the equations so far is kept, so memory does not grow. Unlike normal equations this
    does not square the condition number: a problem of condition 1e7 is solved to nine digits instead of two.
    """

    def __init__(self) -> None:
        self._factor: Tensor | None = None
        self._pending: list[Tensor] = []
        self._n_unknowns = 0
        self._n_equations = 0
        self._sums: list[Tensor] = []

    def add(self, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add equations.

        Args:
            rows: ``(equations, unknowns)``.
            targets: ``(equations, right-hand sides)``.
            weights: ``(equations,)``, the inverse variance of each equation's error; None: all equal.
        """
        block = torch.cat([rows, targets], dim=1).double()
        if weights is not None:
            block = block * weights.sqrt().unsqueeze(1)
        self._n_unknowns = rows.shape[1]
        self._n_equations += len(rows) if weights is None else int((weights > 0).sum())
        self._pending.append(block)
        # A factorisation costs as much for a few equations as for several times the unknowns.
        if sum(map(len, self._pending)) > 4 * block.shape[1]:
            self._factorise()

    def _factorise(self) -> None:
        known = [] if self._factor is None else [self._factor]
        self._factor = _triangular(torch.cat([*known, *self._pending]))
        self._pending = []

    def sums(self) -> list[Tensor]:
        """Each share's factor in a place of its own, so that their sum holds them all; and the equations' number.

        Raises:
            DataError: nothing was added.
        """
        if self._pending:
            self._factorise()
        if self._factor is not None:
            number, of = current_share()
            if not self._sums:
                self._sums = [self._factor.new_zeros(of, *self._factor.shape), self._factor.new_zeros(())]
            stacked, count = self._sums
            before = [stacked[number]] if bool(stacked[number].any()) else []
            stacked[number] = _triangular(torch.cat([*before, self._factor])) if before else self._factor
            count += self._n_equations
            self._factor, self._n_equations = None, 0
        if not self._sums:
            number, of = current_share()
            among = "none of the public pairs" if of == 1 else f"none of the public pairs in part {number + 1} of {of}"
            raise DataError(
                f"closed-form fit: {among} can be used: their gradients are zero or not finite. See whether the leaked "
                "model's loss is that small for all of them; a channel may also leave nothing. More pairs, or fewer "
                "processes and virtual ranks, may help."
            )
        return self._sums

    def solve(self, what: str) -> tuple[Tensor, Tensor]:
        """``x`` ``(unknowns, right-hand sides)``, and which unknowns are determined, ``(unknowns,)`` bool.

        What the equations leave open is of least norm: a unit that acted in no pair has a weight of zero. With fewer
        equations than unknowns that occur there is a warning that names ``what`` was to be found. The equations are
        forgotten.
        """
        return solve_all([self], what)[0]

    def solve_quietly(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """`solve` without a warning; and how many equations there were, and unknowns that occur in them."""
        stacked, count = self.sums()
        triangle = torch.linalg.qr(stacked.flatten(0, 1), mode="r")[1] if len(stacked) > 1 else stacked[0]
        size = self._n_unknowns
        left, right = triangle[:size, :size], triangle[:size, size:]
        scale = left.norm(dim=0)
        occurs = scale > 1e-14 * scale.max().clamp_min(1e-300)
        size_of_problem = int(count), int(occurs.sum())
        self._sums = []
        found, determined = left.new_zeros(size, right.shape[1]), torch.zeros_like(occurs)
        if not bool(occurs.any()):
            return found, determined, size_of_problem
        scaled = left[:, occurs] / scale[occurs]
        if bool(occurs.all()):
            inverse = torch.linalg.solve_triangular(scaled, torch.eye(size).to(scaled), upper=True)
            if float(inverse.norm()) < _CERTAIN:
                return (inverse @ right) / scale.unsqueeze(1), torch.ones_like(occurs), size_of_problem
        outer, values, inner = torch.linalg.svd(scaled)
        kept = values > _SMALLEST * values[0]
        inverse = torch.where(kept, 1 / values.clamp_min(1e-300), 0.0)
        found[occurs] = inner.T @ (inverse.unsqueeze(1) * (outer[:, : len(values)].T @ right)) / scale[occurs, None]
        determined[occurs] = inner[~kept].square().sum(dim=0) < 1e-9
        return found, determined, size_of_problem


def _triangular(block: Tensor) -> Tensor:
    """Its factor ``(columns, columns)``: fewer equations than columns give a flat one, which is filled up."""
    factor = torch.linalg.qr(block, mode="r")[1]
    return torch.nn.functional.pad(factor, (0, 0, 0, block.shape[1] - len(factor)))


def solve_all(problems: Sequence[LeastSquares], what: str, advice: str = "") -> list[tuple[Tensor, Tensor]]:
    """`LeastSquares.solve` of several that together make ``what``, with one warning of the worst.

    ``advice``: a sentence of what helps beside more pairs.
    """
    solved = [problem.solve_quietly() for problem in problems]
    equations, unknowns = min((size for _, _, size in solved), key=lambda size: size[0] - size[1])
    if equations < unknowns:
        log.warning(
            "closed-form fit of %s: %d equations for %d unknowns; the reconstruction will suffer. More pairs help: "
            "data.n_public_images.%s",
            what,
            equations,
            unknowns,
            advice and f" {advice}",
        )
    return [(found, determined) for found, determined, _ in solved]


class AffineFit:
    """Least squares for ``outputs ≈ patches · Wᵀ + b``."""

    def __init__(self) -> None:
        self._squares = LeastSquares()

    def add(self, patches: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Add equations.

        Args:
            patches: ``(B, positions, inputs)``.
            outputs: ``(B, positions, outputs)``.
            weights: ``(B, positions)``, how much each equation counts: the inverse of its error's variance.
        """
        self._squares.add(with_ones(patches).flatten(0, 1), outputs.flatten(0, 1), weights.flatten())

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self._squares.sums()

    def solve(self, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``weight`` ``(outputs, inputs)`` and ``bias`` ``(outputs,)``, and for both which entries are determined."""
        solution, determined = self._squares.solve(what)
        seen = determined.unsqueeze(1).expand_as(solution)
        return tuple(  # type: ignore[return-value]
            {"weight": both[:-1].T.contiguous(), "bias": both[-1]} for both in (solution, seen)
        )


class LogitFit:
    """The last layer's weight, from its input and ``δ = softmax(z) − y``, for one image per leak.

    ``log(δ_k + y_k) − log(δ_r + y_r) = (W_k − W_r) a + b_k − b_r`` for every class ``k`` against one reference ``r``:
    a linear least-squares problem for each difference of rows. A row common to all classes cannot be seen; the rows
    are given relative to their mean.

    The label's probability is ``1 + δ_y``: where ``δ_y`` is near −1 its digits are lost to rounding, and where noise
    is larger than a probability, so is that one. Equations are weighed by the inverse variance of both.

    Args:
        n_classes: number of outputs.
        by_factor: whether the layer has no bias, and the scale of ``δ`` is a guess. The label's probability stands and
            falls with it, and is left out; inputs have its relative error, about that probability if ``δ_y`` is −1.
    """

    def __init__(self, n_classes: int, by_factor: bool = False) -> None:
        self._squares = [LeastSquares() for _ in range(n_classes - 1)]
        self._by_factor = by_factor

    def add(self, inputs: Tensor, delta: Tensor, noise: Tensor, rounding: float) -> None:
        """Add leaks.

        Args:
            inputs: ``(B, features)`` of the last layer.
            delta: ``(B, classes)``.
            noise: ``(B,)``, standard deviation of the error of ``delta``.
            rounding: the unit roundoff of the precision that gradients were made in.
        """
        log_probabilities, variance = log_probabilities_of(delta, noise, rounding)
        design, doubt = inputs if self._by_factor else with_ones(inputs), torch.zeros_like(noise)
        if self._by_factor:
            smallest = delta.amin(dim=1, keepdim=True)
            variance = torch.where(delta == smallest, torch.inf, variance)
            doubt = (1 + smallest.squeeze(1)).square() + _LEAST_DOUBT
        for number, squares in enumerate(self._squares):
            total = variance[:, 0] + variance[:, number + 1] + doubt
            # Beyond an error of one the logarithm of a noisy probability says nothing, and is biased.
            usable = (total < 1) & torch.isfinite(design).all(dim=1)
            target = log_probabilities[:, number + 1] - log_probabilities[:, 0]
            weights = torch.where(usable, 1 / total, 0.0)
            squares.add(design.nan_to_num() * usable.unsqueeze(1), (target * usable).unsqueeze(1), weights)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [total for squares in self._squares for total in squares.sums()]

    def solve(self, advice: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """``W`` ``(classes, features)`` and ``b`` ``(classes,)``, both of mean zero over the classes.

        And which features' weights are determined, ``(features,)`` bool. ``advice``: as of `solve_all`.
        """
        solutions = solve_all(self._squares, "the last layer's weight", advice)
        differences = torch.cat([solution for solution, _ in solutions], dim=1).T
        everything = torch.stack([its for _, its in solutions]).all(dim=0)
        rows = torch.cat([torch.zeros_like(differences[:1]), differences])
        rows = rows - rows.mean(dim=0)
        if self._by_factor:
            return rows, rows.new_zeros(len(rows)), everything
        return rows[:, :-1].contiguous(), rows[:, -1].contiguous(), everything[:-1]


def with_ones(rows: Tensor) -> Tensor:
    """``(…, inputs)`` to ``(…, inputs + 1)``: what the bias is multiplied by at the end."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def log_probabilities_of(delta: Tensor, noise: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """``log softmax(z)`` from ``δ = softmax(z) − y`` and the variance of its error.

    The label ``y`` is where ``δ`` is negative (Zhao et al. 2020).

    Args:
        delta: ``(B, classes)`` float64.
        noise: ``(B,)``, standard deviation of the error of ``delta``.
        rounding: unit roundoff of the gradients' precision.

    Returns:
        ``(B, classes)`` each; an infinite variance where nothing is known.
    """
    label = torch.zeros_like(delta).scatter_(1, delta.argmin(dim=1, keepdim=True), 1.0)
    probabilities = delta + label
    known = (probabilities > torch.finfo(torch.float64).tiny) & torch.isfinite(delta)
    # A whole leak is broken where δ does not add up to zero: the label's entry was rounded to a bound.
    total = delta.sum(dim=1).abs() / delta.abs().sum(dim=1).clamp_min(1e-300)
    known = known & (total < 1e-3).unsqueeze(1)
    safe = torch.where(known, probabilities, 1.0)
    relative = noise.unsqueeze(1) / safe
    rounded = rounding * torch.where(label > 0, 1 / safe, 1.0)
    variance = torch.where(known, relative.square() + rounded.square(), torch.inf)
    return safe.log(), variance
