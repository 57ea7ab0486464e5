"""What linear layers and convolutions share: Eq. (1) of docs/inversion.md, linear in the input once ``δ`` is known."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gitlight.architecture import Layer
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights

LARGEST_STACKED = 4096
"""Unknowns of a stacked system: its normal matrix takes up to 134 MB an example."""

LARGEST_RANK = 1600
"""Unknowns up to which a rank is computed, by a dense eigendecomposition; beyond, it is only bounded by counting.

More of them, where they fall into blocks that together take no longer."""


class AffineRule(InverseRule, ABC):
    """``z = W * a + b`` with a weight whose gradient leaks: ``K(δ) a = ∂L/∂W``.

    The unknowns fall into *blocks* that no equation connects (one per group of a convolution, and more where its stride
    leaves entries apart), and each block into *columns* (input channels, or features) that all meet one and the same
    matrix ``K(δ)``. ``K`` is never formed: its normal matrix ``KᵀK`` has the square of a column's entries.

    Attributes:
        weight: name of the weight.
        bias: name of the bias, if there is one.
        unit: what unknowns are counted by, in words: a channel, a feature of tokens, an entry of patches.
        n_unknowns: unknowns per unit, over all blocks that it is in.
        n_equations: equations per unit.
        n_blocks: blocks.
        determined: which unknowns have one value only, though others may not, as the stride of a convolution leaves
            them: ``(n_blocks, 1, entries of a column)`` bool; None where the rank was not computed.
        rank: how many unknowns of a unit are determined for a ``δ`` in general position, which is all that an
            architecture can tell; None where it was not computed and counting does not settle it.
    """

    carry_needs = "nothing"
    unit: str = "channel"
    n_unknowns: int
    n_equations: int
    groups: int = 1
    n_blocks: int = 1

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.weight = layer.parameters.get("weight")
        self.bias = layer.parameters.get("bias")

    def _find_rank(self) -> None:
        self.rank, self.determined = self._structure()
        if self.exact:
            return
        if self.rank is None:
            self.loses = f"{self.n_unknowns} unknowns per {self.unit}, {self.n_equations} equations: rank not computed"
        else:
            self.loses = f"rank {self.rank} of {self.n_unknowns} unknowns per {self.unit}"

    @property
    def column_size(self) -> int:
        """Entries of a column, the unknowns that are solved for together."""
        return self.n_unknowns * self.groups // self.n_blocks

    @property
    def rank_is_computable(self) -> bool:
        """Whether eigendecompositions of a group's blocks take no longer than one of `LARGEST_RANK` unknowns."""
        return self.n_blocks // self.groups * self.column_size**3 <= LARGEST_RANK**3

    @property
    def exact(self) -> bool:
        """Whether the gradient equations alone determine the input, for a ``δ`` in general position."""
        return self.rank == self.n_unknowns

    @cached_property
    def exact_with_outputs(self) -> bool:
        """Whether gradient equations and all outputs determine the input, for ``δ`` and ``W`` in general position.

        Counting is not enough: a stride larger than the kernel leaves inputs that nothing meets.
        """
        if self.exact:
            return True
        if self.rank is None or self.n_inputs > LARGEST_STACKED:
            return False
        generator = torch.Generator().manual_seed(1)
        delta = torch.randn((1, *self.layer.output_shape), generator=generator, dtype=torch.float64, device="cpu")
        weight = torch.randn(self.layer.weight_shape, generator=generator, dtype=torch.float64, device="cpu")
        probe = torch.zeros(1, *self.layer.input_shape, dtype=torch.float64)
        n_columns = self.columns(probe).shape[2]
        images = []
        for number, block in enumerate(self.normal(delta)[0]):
            eigenvalues, vectors = torch.linalg.eigh(block)
            free = vectors[:, eigenvalues <= len(block) * torch.finfo(torch.float64).eps * eigenvalues[-1]].T
            for column in range(n_columns):
                placed = free.new_zeros(len(free), self.n_blocks, n_columns, self.column_size)
                placed[:, number, column] = free
                images.append(self.from_columns(placed))
        seen = self.forward(torch.cat(images), weight).flatten(1)
        gram = seen @ seen.T
        # Against the weight itself: where it reaches none of these directions, what is seen is rounding alone.
        gram.diagonal().sub_(1e-12 * torch.maximum(gram.diagonal().max(), 1e-3 * weight.square().mean()))
        _, failed = torch.linalg.cholesky_ex(gram)
        return not bool(failed)

    @property
    def n_inputs(self) -> int:
        """Entries of one example's input."""
        return int(torch.Size(self.layer.input_shape).numel())

    @abstractmethod
    def normal(self, delta: Tensor) -> Tensor:
        """``KᵀK``: ``(B, *output_shape)`` to ``(B, n_blocks, column_size, column_size)``."""

    def normal_of_one_group(self, delta: Tensor) -> Tensor:
        """The blocks of `normal` of the first group alone; structurally all groups are alike."""
        return self.normal(delta)

    def add_normal(self, system: Tensor, delta: Tensor) -> None:
        """Add ``KᵀK`` to ``(B, n_inputs, n_inputs)`` in place: one matrix for all columns of a block."""
        # Where the entries of each column are in the flattened input.
        numbers = torch.arange(self.n_inputs, dtype=torch.float64, device=delta.device).view(1, *self.layer.input_shape)
        places = self.columns(numbers)[0].long()
        for block, columns in zip(self.normal(delta).unbind(1), places, strict=True):
            for column in columns:
                system[:, column[:, None], column[None, :]] += block

    @abstractmethod
    def columns(self, inputs: Tensor) -> Tensor:
        """``(B, *input_shape)`` to ``(B, n_blocks, columns, column_size)``."""

    @abstractmethod
    def from_columns(self, columns: Tensor) -> Tensor:
        """The inverse of `columns`."""

    @abstractmethod
    def matrix(self, block: int, delta: Tensor, basis: Tensor) -> Tensor:
        """``K(δ)`` of one block, its rows that meet it alone, times ``basis``; for one group.

        Args:
            block: its number.
            delta: ``(B, *output_shape)``.
            basis: ``(column_size, m)``.

        Returns:
            ``(B, equations, m)``, output by output.
        """

    @abstractmethod
    def equations(self, block: int, weight_gradient: Tensor) -> Tensor:
        """The right side that goes with `matrix`: ``(B, *weight.shape)`` to ``(B, equations, columns)``."""

    @abstractmethod
    def right(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        """``Kᵀ g``: ``(B, *output_shape)`` and ``(B, *weight.shape)`` to ``(B, *input_shape)``."""

    @abstractmethod
    def weight_gradient(self, inputs: Tensor, delta: Tensor) -> Tensor:
        """``K(δ) a``: the gradient that this input would have given, ``(B, *weight.shape)``."""

    @abstractmethod
    def adjoint(self, outputs: Tensor, weight: Tensor) -> Tensor:
        """``Wᵀ * v``: ``(B, *output_shape)`` to ``(B, *input_shape)``."""

    def forward(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """``W * a``, without the bias: ``(B, *input_shape)`` to ``(B, *output_shape)``."""
        values: dict[str, Tensor | None] = dict.fromkeys(self.layer.parameters.values())
        values |= dict.fromkeys(self.layer.constants.values())
        names = {**self.layer.parameters, **self.layer.constants}
        values[names["weight"]] = weight
        return self.layer.apply([inputs], values)  # type: ignore[arg-type]  # None: no bias

    @abstractmethod
    def forward_normal(self, weight: Tensor, precision: Tensor) -> Tensor:
        """``Wᵀ D W`` with the diagonal ``D`` given as ``(B, *output_shape)``: ``(B, n_inputs, n_inputs)``."""

    @abstractmethod
    def forward_matrix(self, weight: Tensor) -> Tensor:
        """``W`` as a matrix: ``(outputs, n_inputs)``."""

    @abstractmethod
    def patches(self, inputs: Tensor) -> Tensor:
        """What each output position sees: ``(B, *input_shape)`` to ``(B, positions, entries)``; for one group."""

    @abstractmethod
    def outputs(self, outputs: Tensor) -> Tensor:
        """Outputs in the order of `patches`: ``(B, *output_shape)`` to ``(B, positions, outputs)``."""

    def from_outputs(self, outputs: Tensor) -> Tensor:
        """The inverse of `outputs`."""
        moved = outputs.transpose(1, 2) if self.channels_first else outputs
        return moved.reshape(-1, *self.layer.output_shape)

    def bias_of(self, weights: Weights) -> Tensor | float:
        """The bias, in a shape that adds to outputs; 0 where there is none."""
        if self.bias is None:
            return 0.0
        bias = weights[self.bias]
        return bias.view(-1, *[1] * (len(self.layer.output_shape) - 1)) if self.channels_first else bias

    channels_first: bool = False

    def by_output(self, values: Tensor) -> Tensor:
        """One value for each output channel or unit, ``(B, outputs)``, in a shape that multiplies outputs."""
        inner = len(self.layer.output_shape) - 1
        shape = (values.shape[1], *[1] * inner) if self.channels_first else (*[1] * inner, values.shape[1])
        return values.view(len(values), *shape)

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``Wᵀ * δ``."""
        assert self.weight is not None, "a weight that does not leak is not estimated, and δ not carried"
        return self.adjoint(delta, weights[self.weight])

    def solve(self, delta: Tensor, weight_gradient: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The damped least-squares solution of the gradient equations, refined until damping no longer shows.

        Where the equations do not determine the input, it is nearly that of least norm.

        Args:
            delta: ``(B, *output_shape)``.
            weight_gradient: ``(B, *weight.shape)``.
            damping: ``(B,)``, what is added to the diagonal of ``KᵀK`` for a ``δ`` of norm one.

        Returns:
            the input ``(B, *input_shape)``; for each entry, the variance of its error for errors of variance 1 in the
            gradient, ``(B, *input_shape)``; and ``(B,)`` bool, which examples could be solved. Others are zero.
        """
        scale = delta.flatten(1).norm(dim=1)
        solvable = (scale > 0) & torch.isfinite(scale) & torch.isfinite(weight_gradient.flatten(1)).all(dim=1)
        safe = torch.where(solvable, scale, 1.0)
        unit = torch.where(_like(solvable, delta), delta / _like(safe, delta), 0.0)
        gradient = torch.where(_like(solvable, weight_gradient), weight_gradient / _like(safe, weight_gradient), 0.0)
        normal = self.normal(unit)
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        diagonal += damping[:, None, None] + 1e-300
        factor, failed = torch.linalg.cholesky_ex(normal)
        solvable = solvable & (failed == 0).all(dim=1)
        identity = torch.eye(self.column_size, dtype=factor.dtype, device=factor.device)
        factor[~solvable] = identity
        # L⁻¹ gives the variances, too. Products with it are what a GPU does at once for all leaks; triangular solves of
        # several right sides it does leak by leak.
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        found = torch.zeros(len(delta), *self.layer.input_shape, dtype=delta.dtype, device=delta.device)
        for _ in range(3):
            # The residual of the equations themselves, not of the normal equations, whose condition number is squared.
            missing = self.columns(self.right(unit, gradient - self.weight_gradient(found, unit)))
            found = found + self.from_columns(missing @ inverse.mT @ inverse)
        spread = inverse.square().sum(dim=-2).unsqueeze(2)
        columns = self.columns(found)
        variance = self.from_columns(spread.expand_as(columns)) / _like(safe, found).square()
        # Entries in no column, such as pixels beyond the last whole patch, meet no equation at all.
        variance = torch.where(self.from_columns(torch.ones_like(columns)) > 0, variance, torch.inf)
        found = torch.where(_like(solvable, found), found, 0.0)
        return found, variance, solvable

    def _structure(self) -> tuple[int | None, Tensor | None]:
        """`rank` and `determined`."""
        if not self.rank_is_computable:
            return None, None
        delta = torch.randn(
            (1, *self.layer.output_shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
        )
        eigenvalues, vectors = torch.linalg.eigh(self.normal_of_one_group(delta)[0])
        free = eigenvalues <= self.n_unknowns * torch.finfo(vectors.dtype).eps * eigenvalues.max()
        determined = (vectors.square() * free.unsqueeze(1)).sum(dim=2, keepdim=True).mT < 1e-9
        return int((~free).sum()), determined.repeat(self.groups, 1, 1)


def _like(per_example: Tensor, tensor: Tensor) -> Tensor:
    """``(B,)`` in a shape that broadcasts with ``(B, …)``."""
    return per_example.view(-1, *[1] * (tensor.dim() - 1))
