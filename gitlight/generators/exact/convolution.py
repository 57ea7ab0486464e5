"""The inverse rule of a two-dimensional convolution: any stride, padding, dilation and number of groups."""

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import conv2d, fold, unfold
from torch.nn.grad import conv2d_input
from typing_extensions import override

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.convolution_geometry import ConvolutionGeometry, Tap
from gitlight.generators.exact.rule import register_rule

_MOST_ZEROS = 4
"""Stride, rows times columns, up to which `ConvolutionRule.adjoint` puts zeros between the entries of ``δ``."""


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
        geometry = self._geometry = ConvolutionGeometry.of(layer)
        self.groups = int(layer.arguments["groups"])
        n_positions, n_outputs = prod(geometry.output_size), layer.output_shape[0]
        self._patchwise = geometry.tiles and self.groups == 1
        if self._patchwise:
            self.unit = "entry of a patch"
            self.n_unknowns, self.n_equations = n_positions, n_outputs
            self._covered = n_positions * prod(geometry.kernel) == prod(geometry.input_size)
        else:
            self.n_unknowns = prod(geometry.input_size)
            self.n_equations = n_outputs // self.groups * prod(geometry.kernel)
            self._covered = True
            self.n_blocks = self.groups * prod(geometry.phases)
            self._taps = geometry.taps()
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
        (rows, columns), (height, width) = self._geometry.phases, self._geometry.phase_size
        shape = (self.groups, self.layer.input_shape[0] // self.groups, height, rows, width, columns)
        whole = system.view(len(system), *shape, *shape)
        blocks = self.normal(delta).view(len(delta), self.groups, rows, columns, height, width, height, width)
        for group in range(self.groups):
            for row in range(rows):
                for column in range(columns):
                    one = whole[:, group, :, :, row, :, column, group, :, :, row, :, column]
                    of_each_channel = one.diagonal(dim1=1, dim2=4)
                    of_each_channel += blocks[:, group, row, column].unsqueeze(-1)

    def _normal(self, delta: Tensor, groups: int) -> Tensor:
        geometry = self._geometry
        flat = delta.reshape(len(delta), groups, -1, prod(geometry.output_size))
        correlations = flat.transpose(-1, -2) @ flat
        if self._patchwise:
            return correlations
        correlations = correlations.view(-1, groups, *geometry.output_size, *geometry.output_size)
        normal = delta.new_zeros(len(delta), groups, *geometry.phases, *geometry.phase_size, *geometry.phase_size)
        for tap in self._taps:
            # One kernel position sends different outputs to different inputs, so what is added here never overlaps.
            normal[:, :, *tap.phase, *tap.of_phase, *tap.of_phase] += correlations[:, :, *tap.outputs, *tap.outputs]
        return normal.flatten(1, 3).flatten(2, 3).flatten(3)

    @override
    def columns(self, inputs: Tensor) -> Tensor:
        if self._patchwise:
            return unfold(inputs, self._geometry.kernel, stride=self._geometry.stride).unsqueeze(1)
        (rows, columns), (height, width) = self._geometry.phases, self._geometry.phase_size
        split = inputs.reshape(len(inputs), self.groups, -1, height, rows, width, columns)
        return split.permute(0, 1, 4, 6, 2, 3, 5).reshape(len(inputs), self.n_blocks, -1, height * width)

    @override
    def from_columns(self, columns: Tensor) -> Tensor:
        geometry = self._geometry
        if self._patchwise:
            return fold(columns.squeeze(1), geometry.input_size, geometry.kernel, stride=geometry.stride)
        split = columns.reshape(len(columns), self.groups, *geometry.phases, columns.shape[2], *geometry.phase_size)
        return split.permute(0, 1, 4, 5, 2, 6, 3).reshape(-1, *self.layer.input_shape)

    @override
    def matrix(self, block: int, delta: Tensor, basis: Tensor) -> Tensor:
        if self._patchwise:
            return delta.flatten(2) @ basis
        # What each output position sees, by each kernel position, of a channel that is one of the basis.
        placed = basis.view(*self._geometry.phase_size, -1)
        taps = self._taps_of(block)
        seen = basis.new_zeros(*self._geometry.output_size, len(taps), basis.shape[1])
        for number, tap in enumerate(taps):
            seen[*tap.outputs, number] = placed[tap.of_phase]
        return (delta.flatten(2) @ seen.flatten(2).flatten(0, 1)).view(len(delta), -1, basis.shape[1])

    @override
    def equations(self, block: int, weight_gradient: Tensor) -> Tensor:
        if self._patchwise:
            return weight_gradient.flatten(2)
        taps = self._taps_of(block)
        rows, columns = [tap.row for tap in taps], [tap.column for tap in taps]
        return weight_gradient[..., rows, columns].transpose(2, 3).flatten(1, 2)

    def _taps_of(self, block: int) -> list[Tap]:
        return [tap for tap in self._taps if tap.phase == divmod(block, self._geometry.phases[1])]

    @override
    def right(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        geometry = self._geometry
        if self._patchwise:
            flat = weight_gradient.flatten(2).transpose(1, 2) @ delta.flatten(2)
            return fold(flat, geometry.input_size, geometry.kernel, stride=geometry.stride)
        by_group = delta.view(len(delta), self.groups, -1, *geometry.output_size)
        gradient = weight_gradient.view(len(delta), self.groups, -1, *weight_gradient.shape[2:])
        right = delta.new_zeros(len(delta), self.groups, gradient.shape[3], *geometry.input_size)
        for tap in self._taps:
            entries = gradient[..., tap.row, tap.column]
            right[:, :, :, *tap.inputs] += torch.einsum("bgoc,bgohw->bgchw", entries, by_group[:, :, :, *tap.outputs])
        return right.view(-1, *self.layer.input_shape)

    @override
    def weight_gradient(self, inputs: Tensor, delta: Tensor) -> Tensor:
        patches = self._geometry.windows(inputs).view(len(inputs), self.groups, -1, delta[0, 0].numel())
        by_group = delta.reshape(len(delta), self.groups, -1, delta[0, 0].numel())
        return (by_group @ patches.transpose(-1, -2)).view(len(delta), delta.shape[1], -1, *self._geometry.kernel)

    @override
    def adjoint(self, outputs: Tensor, weight: Tensor) -> Tensor:
        geometry = self._geometry
        if outputs.dtype != torch.float64 or prod(geometry.stride) > _MOST_ZEROS:
            shape = (len(outputs), *self.layer.input_shape)
            return conv2d_input(
                shape, weight, outputs, geometry.stride, geometry.padding, geometry.dilation, self.groups
            )
        # Libraries have no fast kernel for float64. One product with the windows of δ, zeros between its entries where
        # the stride skips inputs, is several times as fast.
        windows = geometry.adjoint_windows(outputs).view(len(outputs), self.groups, -1, prod(geometry.input_size))
        # (O, I / groups, k, k) to (groups, I / groups, O / groups · k · k), mirrored
        by_group = weight.flip(2, 3).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2)
        return (by_group @ windows).view(-1, *self.layer.input_shape)

    @override
    def forward_normal(self, weight: Tensor, precision: Tensor) -> Tensor:
        # Per output position, the products of the kernel with itself land at the pairs of inputs that it sees.
        rows = weight.flatten(1).view(self.groups, -1, weight[0].numel())
        by_group = precision.reshape(len(precision), self.groups, rows.shape[1], -1)
        size = self.n_inputs
        targets = self._input_numbers(weight.device)
        result = weight.new_zeros(len(precision), (size + 1) ** 2)
        for group in range(self.groups):
            # (B, positions, entries, outputs)
            weighed = by_group[:, group].transpose(1, 2).unsqueeze(2) * rows[group].T
            blocks = weighed @ rows[group]
            seen = targets[group].T  # (positions, entries)
            pairs = (seen[:, :, None] * (size + 1) + seen[:, None, :]).flatten()
            result.index_add_(1, pairs, blocks.flatten(1))
        return result.view(-1, size + 1, size + 1)[:, :size, :size]

    @override
    def forward_matrix(self, weight: Tensor) -> Tensor:
        geometry = self._geometry
        basis = torch.eye(self.n_inputs, dtype=weight.dtype, device=weight.device).view(-1, *self.layer.input_shape)
        images = conv2d(basis, weight, None, geometry.stride, geometry.padding, geometry.dilation, self.groups)
        return images.flatten(1).T.contiguous()

    @override
    def patches(self, inputs: Tensor) -> Tensor:
        return self._geometry.windows(inputs).transpose(1, 2)

    @override
    def outputs(self, outputs: Tensor) -> Tensor:
        return outputs.flatten(2).transpose(1, 2)

    def _input_numbers(self, device: torch.device) -> Tensor:
        """Which input each kernel entry sees at each output position, ``(groups, entries, positions)``.

        Padding is number ``n_inputs``.
        """
        numbers = torch.arange(1, self.n_inputs + 1, dtype=torch.float64, device=device)
        seen = self._geometry.windows(numbers.view(1, *self.layer.input_shape))[0].long() - 1
        return torch.where(seen < 0, self.n_inputs, seen).view(self.groups, -1, seen.shape[1])
