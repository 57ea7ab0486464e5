"""The inverse rule of a two-dimensional convolution (any stride, padding, dilation; groups in the solve)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from gitlight.architecture import Layer

_TINY = 1e-30
# Workspace of one chunk of solves, in bytes: small enough for caches and laptops, large enough for batching to pay.
_CHUNK_BYTES = 256e6
# A structural rank is computed by a dense eigendecomposition; beyond this many unknowns per channel it is not tried.
_LARGEST_RANK = 1600


class _Tap(NamedTuple):
    """One kernel position: the output rows and columns that it maps into the image, and where they land there."""

    row: int
    column: int
    outputs: tuple[slice, slice]
    inputs: tuple[slice, slice]


class Conv2dRule:
    """Solves ``K(δ) a = ∂L/∂W`` (Eq. 1), in which every input channel of a group meets the same matrix ``K(δ)``.

    ``K`` has ``outputs · kernel`` rows and ``H · W`` columns. Its normal matrix is assembled from the correlations of
    ``δ`` between output positions, without forming ``K``: per kernel position, a block of ``(δᵀδ)`` is added where
    that position's outputs land in the image. That takes ``kernel · positions²`` additions instead of the
    ``outputs · kernel · (H · W)²`` multiplications of a dense product.
    """

    def __init__(self, layer: Layer, damping: float) -> None:
        """``damping``: Tikhonov damping over the mean diagonal of the normal matrix."""
        conv = layer.operation
        assert isinstance(conv, nn.Conv2d)
        self._conv = conv
        self._damping = damping
        self._input_shape = layer.input_shape
        self._output_shape = layer.output_shape
        self._taps = _taps(conv, layer.input_shape, layer.output_shape)
        self.n_unknowns = unknowns = layer.input_shape[1] * layer.input_shape[2]
        self.rank = self._structural_rank(unknowns)
        self.exact = self.rank == unknowns
        self.fits_weight = conv.groups == 1
        if self.exact:
            self.reason = "exact"
        elif self.rank is None:
            self.reason = f"{unknowns} unknowns per channel: rank not computed"
        else:
            self.reason = f"rank {self.rank} of {unknowns} unknowns per channel"

    @staticmethod
    def applies_to(layer: Layer) -> bool:
        """Whether the rule knows this convolution: zero padding, given in numbers."""
        conv = layer.operation
        return isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    def solve_input(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        """The damped least-squares solution; of least norm where the equations do not determine the input.

        Args:
            delta: ``(B, O, h, w)``.
            weight_gradient: ``(B, O, C / groups, kh, kw)``.

        Returns:
            ``(B, C, H, W)``; zero where ``δ`` is zero.
        """
        unknowns = self._input_shape[1] * self._input_shape[2]
        chunk = max(1, int(_CHUNK_BYTES / (3 * 8 * unknowns**2)))
        solved = [
            self._solve(part, gradient)
            for part, gradient in zip(delta.split(chunk), weight_gradient.split(chunk), strict=True)
        ]
        return torch.cat(solved)

    def carry(self, delta: Tensor, weight: Tensor) -> Tensor:
        """``Wᵀ * δ``: ``(B, O, h, w)`` to ``(B, C, H, W)``, the transposed convolution."""
        conv = self._conv
        return conv2d_input(
            (len(delta), *self._input_shape), weight, delta, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def patches(self, inputs: Tensor) -> Tensor:
        """What each output position sees: ``(B, C, H, W)`` to ``(B, h·w, C·kh·kw)``; for one group."""
        conv = self._conv
        return nn.functional.unfold(inputs, conv.kernel_size, conv.dilation, _two(conv.padding), conv.stride).transpose(
            1, 2
        )

    def outputs(self, outputs: Tensor) -> Tensor:
        """Outputs in the order of `patches`: ``(B, O, h, w)`` to ``(B, h·w, O)``."""
        return outputs.flatten(2).transpose(1, 2)

    def _solve(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        size = delta.flatten(1).norm(dim=1).clamp_min(_TINY)
        delta = delta / size[:, None, None, None]
        weight_gradient = weight_gradient / size[:, None, None, None, None]
        groups = self._conv.groups
        solved = [
            self._solve_group(d, g)
            for d, g in zip(delta.chunk(groups, dim=1), weight_gradient.chunk(groups, dim=1), strict=True)
        ]
        return torch.cat(solved, dim=1)

    def _solve_group(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        """``δ`` ``(B, O, h, w)``, gradient ``(B, O, C, kh, kw)`` of one group to its inputs ``(B, C, H, W)``."""
        normal = self._normal_matrix(delta)
        n_examples, n_channels = len(delta), weight_gradient.shape[2]
        right = delta.new_zeros(n_examples, n_channels, *self._input_shape[1:])
        for tap in self._taps:
            gradient = weight_gradient[..., tap.row, tap.column]
            right[:, :, *tap.inputs] += torch.einsum("boc,bohw->bchw", gradient, delta[:, :, *tap.outputs])
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += self._damping * diagonal.mean(dim=1, keepdim=True) + _TINY
        factor, failed = torch.linalg.cholesky_ex(normal)
        solution = torch.cholesky_solve(right.flatten(2).transpose(1, 2), factor).transpose(1, 2)
        # A failed factorisation (a singular or non-finite system) is that example's alone: it contributes nothing.
        solution = torch.where((failed == 0)[:, None, None], solution, 0.0)
        return solution.reshape(n_examples, n_channels, *self._input_shape[1:])

    def _normal_matrix(self, delta: Tensor) -> Tensor:
        """``KᵀK`` of one group: ``δ`` ``(B, O, h, w)`` to ``(B, H·W, H·W)``."""
        height, width = self._input_shape[1:]
        out = delta.shape[2:]
        flat = delta.flatten(2)
        correlations = (flat.transpose(1, 2) @ flat).view(-1, *out, *out)
        normal = delta.new_zeros(len(delta), height, width, height, width)
        for tap in self._taps:
            # One kernel position sends different outputs to different inputs, so the blocks below never overlap.
            normal[:, *tap.inputs, *tap.inputs] += correlations[:, *tap.outputs, *tap.outputs]
        return normal.view(-1, height * width, height * width)

    def _structural_rank(self, unknowns: int) -> int | None:
        """Rank of ``K(δ)`` for a ``δ`` in general position, which is all that an architecture can tell."""
        if unknowns > _LARGEST_RANK:
            return None
        channels, height, width = self._output_shape
        shape = (1, channels // self._conv.groups, height, width)
        delta = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        eigenvalues = torch.linalg.eigvalsh(self._normal_matrix(delta)[0])
        return int((eigenvalues > unknowns * torch.finfo(torch.float64).eps * eigenvalues[-1]).sum())


def _two(value: object) -> tuple[int, int]:
    assert isinstance(value, tuple)
    return value


def _taps(conv: nn.Conv2d, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> list[_Tap]:
    padding = _two(conv.padding)
    taps = []
    for row in range(conv.kernel_size[0]):
        for column in range(conv.kernel_size[1]):
            spans = [
                _span(conv.stride[axis], offset * conv.dilation[axis] - padding[axis], output, size)
                for axis, (offset, output, size) in enumerate(
                    zip((row, column), output_shape[1:], input_shape[1:], strict=True)
                )
            ]
            taps.append(_Tap(row, column, (spans[0][0], spans[1][0]), (spans[0][1], spans[1][1])))
    return taps


def _span(stride: int, shift: int, n_outputs: int, n_inputs: int) -> tuple[slice, slice]:
    """Along one axis: the outputs ``p`` for which ``stride · p + shift`` is inside the input, and these inputs."""
    first = max(0, -(shift // stride))
    last = min(n_outputs - 1, (n_inputs - 1 - shift) // stride)
    count = max(0, last - first + 1)
    start = first * stride + shift
    return slice(first, first + count), slice(start, start + count * stride if count else start, stride)
