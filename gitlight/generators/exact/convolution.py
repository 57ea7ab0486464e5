"""The inverse rule of a two-dimensional convolution: any stride, padding, dilation and number of groups."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, fold, pad, unfold
from torch.nn.grad import conv2d_input
from typing_extensions import override

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.rule import register_rule

_MOST_ZEROS = 4
"""Stride, rows times columns, up to which `ConvolutionRule.adjoint` puts zeros between the entries of ``δ``."""


class _Tap(NamedTuple):
    """One kernel position: the output rows and columns that it maps into the image, and where they land there.

    Attributes:
        phase: which of the `ConvolutionRule`'s phases they land in.
        of_phase: where in that.
    """

    row: int
    column: int
    outputs: tuple[slice, slice]
    inputs: tuple[slice, slice]
    phase: tuple[int, int]
    of_phase: tuple[slice, slice]


@register_rule("conv2d")
class ConvolutionRule(AffineRule):
    """Every input channel of a group meets the same matrix ``K(δ)``, of ``outputs · kernel`` rows, ``H · W`` columns.

    Its normal matrix is assembled from the correlations of ``δ`` between output positions: per kernel position, a block
    of ``δᵀδ`` is added where that position's outputs land in the image. That takes ``kernel · positions²`` additions
    instead of the ``outputs · kernel · (H · W)²`` multiplications of a dense product.

    A kernel position sees every ``stride``-th row and column alone, so that no equation connects entries whose row or
    column numbers differ by anything but multiples of it: these *phases* are blocks of their own. With a stride of two
    there are four, and factoring them takes a sixteenth of the time.

    Where the kernels do not overlap (the patch projection of a vision transformer), the entries of a patch are columns
    and the patches are the unknowns: the system is that of a linear layer on patches, far smaller.
    """

    channels_first = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if not layer.weight_shape:
            raise ArchitectureError(
                f"{layer.place} takes a weight that the model computes, not a parameter: what its gradient would be "
                "does not leak. There is no inverse rule for that."
            )
        self._stride = _two(layer.arguments["stride"])
        self._dilation = _two(layer.arguments["dilation"])
        self.groups = int(layer.arguments["groups"])
        self._shape = layer.input_shape
        n_outputs, *positions = layer.output_shape
        self._positions = (positions[0], positions[1])
        self._padding = _padding(layer)
        self._kernel = (layer.weight_shape[2], layer.weight_shape[3])
        self._patchwise = (
            self._stride == self._kernel and self._padding == (0, 0) and self._dilation == (1, 1) and self.groups == 1
        )
        if self._patchwise:
            self.unit = "entry of a patch"
            self.n_unknowns, self.n_equations = positions[0] * positions[1], n_outputs
            kept = positions[0] * self._stride[0] * positions[1] * self._stride[1]
            self._covered = kept == self._shape[1] * self._shape[2]
        else:
            self.n_unknowns = self._shape[1] * self._shape[2]
            self.n_equations = n_outputs // self.groups * self._kernel[0] * self._kernel[1]
            self._covered = True
            rows, columns = self._phases = _phases(self._stride, self._shape)
            self._phase_shape = (self._shape[1] // rows, self._shape[2] // columns)
            self.n_blocks = self.groups * rows * columns
            self._taps = _taps(
                self._stride, self._padding, self._dilation, self._kernel, self._phases, self._shape, layer
            )
        self._find_rank()
        if not self._covered:
            self.loses = "pixels beyond the last whole patch are seen by no kernel"

    @property
    def exact(self) -> bool:
        """Also no pixel beyond the last whole patch."""
        return self._covered and super().exact

    def _structure(self) -> tuple[int | None, Tensor | None]:
        if not self._patchwise:
            return super()._structure()
        rank = min(self.n_unknowns, self.n_equations)
        return rank, torch.full((1, 1, self.n_unknowns), rank == self.n_unknowns)

    @override
    def normal(self, delta: Tensor) -> Tensor:
        return self._normal(delta, self.groups)

    @override
    def normal_of_one_group(self, delta: Tensor) -> Tensor:
        return self._normal(delta[:, : delta.shape[1] // self.groups], 1)

    @override
    def add_normal(self, system: Tensor, delta: Tensor) -> None:
        if self._patchwise:
            super().add_normal(system, delta)
            return
        (rows, columns), (height, width) = self._phases, self._phase_shape
        shape = (self.groups, self._shape[0] // self.groups, height, rows, width, columns)
        whole = system.view(len(system), *shape, *shape)
        blocks = self.normal(delta).view(len(delta), self.groups, rows, columns, height, width, height, width)
        for group in range(self.groups):
            for row in range(rows):
                for column in range(columns):
                    one = whole[:, group, :, :, row, :, column, group, :, :, row, :, column]
                    of_each_channel = one.diagonal(dim1=1, dim2=4)
                    of_each_channel += blocks[:, group, row, column].unsqueeze(-1)

    def _normal(self, delta: Tensor, groups: int) -> Tensor:
        flat = delta.reshape(len(delta), groups, -1, self._positions[0] * self._positions[1])
        correlations = flat.transpose(-1, -2) @ flat
        if self._patchwise:
            return correlations
        correlations = correlations.view(-1, groups, *self._positions, *self._positions)
        normal = delta.new_zeros(len(delta), groups, *self._phases, *self._phase_shape, *self._phase_shape)
        for tap in self._taps:
            # One kernel position sends different outputs to different inputs, so what is added here never overlaps.
            normal[:, :, *tap.phase, *tap.of_phase, *tap.of_phase] += correlations[:, :, *tap.outputs, *tap.outputs]
        return normal.flatten(1, 3).flatten(2, 3).flatten(3)

    @override
    def columns(self, inputs: Tensor) -> Tensor:
        if self._patchwise:
            return unfold(inputs, self._kernel, stride=self._stride).unsqueeze(1)
        (rows, columns), (height, width) = self._phases, self._phase_shape
        split = inputs.reshape(len(inputs), self.groups, -1, height, rows, width, columns)
        return split.permute(0, 1, 4, 6, 2, 3, 5).reshape(len(inputs), self.n_blocks, -1, height * width)

    @override
    def from_columns(self, columns: Tensor) -> Tensor:
        if self._patchwise:
            return fold(columns.squeeze(1), self._shape[1:], self._kernel, stride=self._stride)
        split = columns.reshape(len(columns), self.groups, *self._phases, columns.shape[2], *self._phase_shape)
        return split.permute(0, 1, 4, 5, 2, 6, 3).reshape(-1, *self._shape)

    @override
    def right(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        if self._patchwise:
            flat = weight_gradient.flatten(2).transpose(1, 2) @ delta.flatten(2)
            return fold(flat, self._shape[1:], self._kernel, stride=self._stride)
        by_group = delta.view(len(delta), self.groups, -1, *self._positions)
        gradient = weight_gradient.view(len(delta), self.groups, -1, *weight_gradient.shape[2:])
        right = delta.new_zeros(len(delta), self.groups, gradient.shape[3], *self._shape[1:])
        for tap in self._taps:
            entries = gradient[..., tap.row, tap.column]
            right[:, :, :, *tap.inputs] += torch.einsum("bgoc,bgohw->bgchw", entries, by_group[:, :, :, *tap.outputs])
        return right.view(-1, *self._shape)

    @override
    def weight_gradient(self, inputs: Tensor, delta: Tensor) -> Tensor:
        patches = self._unfold(inputs).view(len(inputs), self.groups, -1, delta[0, 0].numel())
        by_group = delta.reshape(len(delta), self.groups, -1, delta[0, 0].numel())
        return (by_group @ patches.transpose(-1, -2)).view(len(delta), delta.shape[1], -1, *self._kernel)

    @override
    def adjoint(self, outputs: Tensor, weight: Tensor) -> Tensor:
        if outputs.dtype != torch.float64 or self._stride[0] * self._stride[1] > _MOST_ZEROS:
            shape = (len(outputs), *self._shape)
            return conv2d_input(shape, weight, outputs, self._stride, self._padding, self._dilation, self.groups)
        # Libraries have no fast kernel for float64. One product with the windows of δ, zeros between its entries where
        # the stride skips inputs, is several times as fast.
        spans = [self._dilation[axis] * (self._kernel[axis] - 1) for axis in (0, 1)]
        canvas = outputs.new_zeros(*outputs.shape[:2], *(self._shape[1 + axis] + spans[axis] for axis in (0, 1)))
        places = [
            _span(self._stride[axis], spans[axis] - self._padding[axis], self._positions[axis], canvas.shape[2 + axis])
            for axis in (0, 1)
        ]
        canvas[:, :, places[0][1], places[1][1]] = outputs[:, :, places[0][0], places[1][0]]
        windows = _windows(canvas, self._kernel, (1, 1), self._dilation).view(
            len(outputs), self.groups, -1, self._shape[1] * self._shape[2]
        )
        # (O, I / groups, k, k) to (groups, I / groups, O / groups · k · k), mirrored
        by_group = weight.flip(2, 3).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2)
        return (by_group @ windows).view(-1, *self._shape)

    @override
    def forward_normal(self, weight: Tensor, precision: Tensor) -> Tensor:
        # Per output position, the products of the kernel with itself land at the pairs of inputs that it sees.
        rows = weight.flatten(1).view(self.groups, -1, weight[0].numel())
        by_group = precision.reshape(len(precision), self.groups, rows.shape[1], -1)
        size = self.n_inputs
        targets = self._input_numbers(weight.device)
        result = weight.new_zeros(len(precision), (size + 1) ** 2)
        for group in range(self.groups):
            weighed = (
                by_group[:, group].transpose(1, 2).unsqueeze(2) * rows[group].T
            )  # (B, positions, entries, outputs)
            blocks = weighed @ rows[group]
            seen = targets[group].T  # (positions, entries)
            pairs = (seen[:, :, None] * (size + 1) + seen[:, None, :]).flatten()
            result.index_add_(1, pairs, blocks.flatten(1))
        return result.view(-1, size + 1, size + 1)[:, :size, :size]

    @override
    def forward_matrix(self, weight: Tensor) -> Tensor:
        basis = torch.eye(self.n_inputs, dtype=weight.dtype, device=weight.device).view(-1, *self._shape)
        images = conv2d(basis, weight, None, self._stride, self._padding, self._dilation, self.groups)
        return images.flatten(1).T.contiguous()

    @override
    def patches(self, inputs: Tensor) -> Tensor:
        return self._unfold(inputs).transpose(1, 2)

    @override
    def outputs(self, outputs: Tensor) -> Tensor:
        return outputs.flatten(2).transpose(1, 2)

    def _unfold(self, inputs: Tensor) -> Tensor:
        padded = pad(inputs, (self._padding[1], self._padding[1], self._padding[0], self._padding[0]))
        return _windows(padded, self._kernel, self._stride, self._dilation)

    def _input_numbers(self, device: torch.device) -> Tensor:
        """Which input each kernel entry sees at each output position, ``(groups, entries, positions)``.

        Padding is number ``n_inputs``.
        """
        numbers = torch.arange(1, self.n_inputs + 1, dtype=torch.float64, device=device).view(1, *self._shape)
        seen = self._unfold(numbers)[0].long() - 1
        return torch.where(seen < 0, self.n_inputs, seen).view(self.groups, -1, seen.shape[1])


def _windows(padded: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C · kernel, positions)``; `torch.nn.functional.unfold` goes image by image on a GPU."""
    rows, columns = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    windows = padded.unfold(2, rows, stride[0]).unfold(3, columns, stride[1])[..., :: dilation[0], :: dilation[1]]
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


def _padding(layer: Layer) -> tuple[int, int]:
    given = layer.arguments["padding"]
    if not isinstance(given, str):
        return _two(given)
    if given == "valid":
        return (0, 0)
    return tuple(  # type: ignore[return-value]  # "same", which PyTorch allows for stride 1 alone
        _same(layer, axis) for axis in (0, 1)
    )


def _same(layer: Layer, axis: int) -> int:
    kernel = layer.weight_shape[2 + axis]
    total = _two(layer.arguments["dilation"])[axis] * (kernel - 1)
    if total % 2:
        raise ArchitectureError(
            f"{layer.place} pads by different widths on its two sides (padding='same' with an even kernel), which its "
            "inverse rule does not know. An odd kernel, or padding given as a number, works."
        )
    return total // 2


def _two(value: object) -> tuple[int, int]:
    assert isinstance(value, list | tuple)
    return (int(value[0]), int(value[-1]))


def _phases(stride: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """Along rows and columns; all entries of an axis stay together where its phases would differ in size."""
    rows, columns = (step if size % step == 0 else 1 for step, size in zip(stride, shape[1:], strict=True))
    return rows, columns


def _taps(
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    kernel: tuple[int, int],
    phases: tuple[int, int],
    shape: tuple[int, ...],
    layer: Layer,
) -> list[_Tap]:
    taps = []
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            spans = [
                _span(stride[axis], offset * dilation[axis] - padding[axis], output, size)
                for axis, (offset, output, size) in enumerate(
                    zip((row, column), layer.output_shape[1:], shape[1:], strict=True)
                )
            ]
            outputs, inputs = zip(*spans, strict=True)
            phase, of_phase = zip(*map(_within_phase, inputs, phases), strict=True)
            taps.append(_Tap(row, column, outputs, inputs, phase, of_phase))
    return taps


def _span(stride: int, shift: int, n_outputs: int, n_inputs: int) -> tuple[slice, slice]:
    """Along one axis: the outputs ``p`` for which ``stride · p + shift`` is inside the input, and where they land."""
    first = max(0, -(shift // stride))
    last = min(n_outputs - 1, (n_inputs - 1 - shift) // stride)
    count = max(0, last - first + 1)
    start = first * stride + shift
    return slice(first, first + count), slice(start, start + count * stride if count else start, stride)


def _within_phase(inputs: slice, n_phases: int) -> tuple[int, slice]:
    """Which of an axis' phases some rows or columns are in, and where in that."""
    phase = inputs.start % n_phases
    start, stop, step = (edge // n_phases for edge in (inputs.start, inputs.stop, inputs.step))
    return phase, slice(start, stop, step)
