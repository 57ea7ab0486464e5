"""Convolutions of the captured method: the gradient of each leak's weight, and δ carried to a convolution's input.

Each has several exact ways to be computed; which one is fastest depends on shapes (figures in docs/decisions.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gitlight.gradients.buffers import Scratch
from gitlight.gradients.products import has_avx512, is_intels, write_products

# Channels up to which oneDNN's kernels for channels last gain, where the vectors of the others would not be full.
_FEW_CHANNELS = 48

# The most channels for which, without AVX-512, grouped convolutions gain over products with the unfolded input.
_MOST_CHANNELS_OF_AVX2 = 32

# Entries of an unfolded input that stay in a CPU's cache until they are multiplied.
_CACHED_PATCHES = 600_000

# Leaks at once in such a kernel: what they need stays in the cache.
_LEAKS_AT_ONCE = 64


@dataclass(frozen=True)
class Convolution:
    """A convolution that ``B`` leaks of ``N`` images pass through.

    Attributes:
        input: ``(B · N, I, H, W)``.
        weight_shape: ``(O, I / groups, height, width)``.
        stride: rows, columns.
        padding: rows and columns, or ``valid`` or ``same``.
        dilation: rows, columns.
        groups: parts that channels fall into.
        n_leaks: ``B``.
        scratch: memory for what is on the way to a result.
    """

    input: Tensor
    weight_shape: torch.Size
    stride: tuple[int, int]
    padding: Any
    dilation: tuple[int, int]
    groups: int
    n_leaks: int
    scratch: Scratch

    def per_leak(self, tensor: Tensor) -> Tensor:
        """``(B · N, …)`` to ``(B, N, …)``."""
        return tensor.unflatten(0, (self.n_leaks, -1))

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Rows of zeros above and under, columns left and right; ``same`` may have one more at the end."""
        if self.padding == "same":
            (down, right), (height, width) = self.dilation, self.weight_shape[2:]
            rows, columns = down * (height - 1), right * (width - 1)
            return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
        above, left = (0, 0) if self.padding == "valid" else self.padding
        return above, above, left, left


def write_weight_gradient(conv: Convolution, delta: Tensor, out: Tensor) -> None:
    """Write ``Σ_positions δ ⊗ patch`` of each leak.

    Args:
        conv: the convolution.
        delta: ``(B · N, O, rows, columns)``.
        out: ``(B, O, I / groups, height, width)``.
    """
    if (kernel := _onednn_kernel(conv, delta)) is not None:
        kernel(conv, delta, out)
    else:
        _write_products_of_patches(conv, delta, out)


def _onednn_kernel(conv: Convolution, delta: Tensor) -> Callable[[Convolution, Tensor, Tensor], None] | None:
    """Which of oneDNN's kernels is faster than a product with the unfolded input; None: neither.

    The one for channels first wants channels in eights, to fill its vectors. The one for channels last takes any
    number, and gains where there are few, but not over MKL's products with AVX-512. Both need positions enough to sum
    over.
    """
    if delta.device.type != "cpu" or delta.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return None
    (n_out, n_in, *kernel), (rows, columns) = conv.weight_shape, delta.shape[2:]
    too_small = columns < 8 or rows * columns < max(64, n_out // 2)
    if too_small or conv.groups > 1 or isinstance(conv.padding, str):
        return None
    in_eights = n_out % 8 == 0 and n_in % 8 == 0
    if not has_avx512():
        return _write_channels_first if in_eights and max(n_out, n_in) <= _MOST_CHANNELS_OF_AVX2 else None
    if min(n_out, n_in) >= 8 and (in_eights or max(n_out, n_in) > _FEW_CHANNELS):
        return _write_channels_first
    odd = not is_intels() and (n_out % 8 != 0 or (n_in % 8 != 0 and n_in > 4))
    return _write_channels_last if odd and min(kernel) >= 5 and max(n_out, n_in) <= _FEW_CHANNELS else None


def _write_channels_first(conv: Convolution, delta: Tensor, out: Tensor) -> None:
    """All leaks as the groups of one convolution, whose weight has their gradients."""
    x, delta = (conv.per_leak(part).transpose(0, 1).flatten(1, 2) for part in (conv.input, delta))
    out.copy_(_grouped_weight_gradient(conv, x, delta, conv.n_leaks).view_as(out))


def _write_channels_last(conv: Convolution, delta: Tensor, out: Tensor) -> None:
    """The same, with the leaks' channels side by side at every position."""
    parts = (conv.per_leak(conv.input), conv.per_leak(delta), out)
    for x, its_delta, kept in zip(*(part.split(_LEAKS_AT_ONCE) for part in parts), strict=True):
        sides = (_side_by_side(conv, x, "input"), _side_by_side(conv, its_delta, "delta"))
        kept.copy_(_grouped_weight_gradient(conv, *sides, len(x)).view_as(kept))


def _side_by_side(conv: Convolution, tensor: Tensor, purpose: str) -> Tensor:
    """``(B, N, C, H, W)`` to ``(N, B · C, H, W)``, channels last."""
    n_leaks, n_images, n_channels, *size = tensor.shape
    moved = conv.scratch.empty(purpose, (n_images, size[0] * size[1], n_leaks * n_channels), tensor)
    for image, its in zip(moved, tensor.unbind(1), strict=True):
        image.copy_(its.reshape(-1, image.shape[0]).t())  # a transposed matrix: three times as fast as a permutation
    return moved.view(n_images, *size, -1).permute(0, 3, 1, 2)


def _grouped_weight_gradient(conv: Convolution, x: Tensor, delta: Tensor, n_leaks: int) -> Tensor:
    n_in, height, width = conv.weight_shape[1:]
    settings = (conv.stride, conv.padding, conv.dilation, False, [0, 0], n_leaks)
    # Of the weight only the shape is read; but one in another order than the images is copied before.
    if x.is_contiguous():
        placeholder = conv.scratch.empty("placeholder", (delta.shape[1], n_in, height, width), x)
    else:
        placeholder = conv.scratch.empty("placeholder", (delta.shape[1], height, width, n_in), x).permute(0, 3, 1, 2)
    wanted = [False, True, False]
    result: Tensor = torch.ops.aten.convolution_backward(delta, x, placeholder, None, *settings, wanted)[1]
    return result


def _write_products_of_patches(conv: Convolution, delta: Tensor, out: Tensor) -> None:
    """Products of ``δ`` with the unfolded input, of so many leaks at once that it does not leave the cache."""
    channels_last = _unfolds_channels_last(conv, delta)
    patches = conv.per_leak(_whole_pixels(conv) if channels_last else _rows_of_channels(conv))
    its_delta = conv.per_leak(delta.flatten(2))
    product = out
    if channels_last:
        product = conv.scratch.empty("product", (conv.n_leaks, delta.shape[1], patches[0, 0, 0, 0].numel()), out)
    n_parts = ceil(patches.numel() / _CACHED_PATCHES) if delta.device.type == "cpu" else 1
    at_once = ceil(conv.n_leaks / n_parts)
    for x, d, kept in zip(*(part.split(at_once) for part in (patches, its_delta, product)), strict=True):
        if conv.weight_shape[2:] != (1, 1):
            # One copy of an overlapping view: two to four times as fast as `F.unfold` on a CPU.
            x = conv.scratch.empty("unfolded", tuple(x.shape), x).copy_(x)
        if channels_last:
            write_products(d, x.flatten(2, 3).flatten(3), kept)
        else:
            sides = (side.unflatten(2, (conv.groups, -1)) for side in (d, x.flatten(2, 4).flatten(3)))
            left, right = (side.transpose(1, 2).flatten(0, 1) for side in sides)
            write_products(left, right.transpose(2, 3), kept.view(len(left), left.shape[2], -1))
    if channels_last:
        out.copy_(product.unflatten(2, (*out.shape[3:], -1)).permute(0, 1, 4, 2, 3))


def _unfolds_channels_last(conv: Convolution, delta: Tensor) -> bool:
    """Whether runs of ``kernel width · channels`` are so much longer than rows that reordering the result pays."""
    (n_out, n_in, _, width), (rows, columns) = conv.weight_shape, delta.shape[2:]
    plain = conv.groups == 1 and conv.dilation[1] == 1
    return plain and 4 * n_out <= rows * columns and columns <= 8 <= n_in and width >= 5


def _whole_pixels(conv: Convolution) -> Tensor:
    """What each weight meets at each position, as a view ``(S, rows, columns, height, width · channels)``."""
    height, width = conv.weight_shape[2:]
    return _windows(_pixels(conv.input, conv.margins), (height, width), conv.stride, conv.dilation[0])


def _pixels(x: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """``(S, C, H, W)`` with margins (above, under, left, right), channels last."""
    above, under, left, right = margins
    # A transposed matrix first, then whole rows: faster than moving the dimensions of a padded image.
    moved = x.flatten(2).transpose(1, 2).contiguous().unflatten(1, x.shape[2:])
    return F.pad(moved, (0, 0, left, right, above, under)).contiguous()


def _windows(pixels: Tensor, kernel: tuple[int, int], stride: tuple[int, int], below: int) -> Tensor:
    (height, width), (down, right) = kernel, stride
    rows = (pixels.shape[1] - below * (height - 1) - 1) // down + 1
    columns = (pixels.shape[2] - width) // right + 1
    n, n_rows, n_columns, channels = pixels.shape  # strides of dimensions of size 1 may be anything
    row, shape = n_columns * channels, (n, rows, columns, height, width * channels)
    return pixels.as_strided(shape, (n_rows * row, down * row, right * channels, below * row, 1))


def _rows_of_channels(conv: Convolution) -> Tensor:
    """What each weight meets at each position, as a view ``(S, channels, height, width, rows, columns)``."""
    (height, width), (down, right), (below, beside) = conv.weight_shape[2:], conv.stride, conv.dilation
    x = _padded(conv)
    rows = (x.shape[2] - below * (height - 1) - 1) // down + 1
    columns = (x.shape[3] - beside * (width - 1) - 1) // right + 1
    image, channel, row, column = x.stride()
    shape = (*x.shape[:2], height, width, rows, columns)
    return x.as_strided(shape, (image, channel, below * row, beside * column, down * row, right * column))


def _padded(conv: Convolution) -> Tensor:
    above, under, left, right = conv.margins
    return F.pad(conv.input, (left, right, above, under)) if above or under or left or right else conv.input


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """A convolution of whose weight and bias autograd wants no gradient."""
    n_out, n_in = weight.shape[:2]
    # Where channels do not fill vectors, oneDNN is slow to carry δ back, most of all through a stride.
    square = stride[0] == stride[1] and min(weight.shape[2:]) >= stride[0]
    few = n_out % 8 != 0 and n_in % 8 != 0 and max(n_out, n_in) <= 16
    plain = groups == 1 and not isinstance(padding, str) and max(dilation) == 1
    if square and few and plain and x.requires_grad and x.device.type == "cpu" and x.dtype == torch.float32:
        result: Tensor = _FewChannels.apply(x, weight, bias, stride[0], tuple(padding))
        return result
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class _FewChannels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.size = stride, padding, x.shape[2:]
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        (above, left), (height, width) = ctx.padding, weight.shape[2:]
        if ctx.stride == 1 and above < height and left < width:
            kernels, margins = weight.transpose(0, 1).flip(2, 3), (height - 1 - above, width - 1 - left)
            return F.conv2d(deltas[0], kernels, None, 1, margins), None, None, None, None
        return carried_through_stride(deltas[0], weight, ctx.stride, ctx.padding, ctx.size), None, None, None, None


def carried_through_stride(
    delta: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], size: torch.Size
) -> Tensor:
    """``Wᵀ * δ`` of a strided convolution, as one convolution of stride 1 and a shuffle (Shi et al. 2016, §3.2).

    Inputs at rows ``s·m + r`` meet only every ``s``-th row of the kernel, from ``(r + padding) mod s`` on: for each
    ``r`` that is an ordinary convolution of ``δ`` with those rows. All ``s²`` of them share ``δ``.

    Args:
        delta: ``(B, O, rows, columns)``.
        weight: ``(O, I, height, width)``.
        stride: ``s``, of both axes.
        padding: rows, columns.
        size: ``(H, W)`` of the input.

    Returns:
        ``(B, I, H, W)``.
    """
    vertical, horizontal = (
        _Phases.of(weight.shape[2 + axis], stride, padding[axis], size[axis], delta.shape[2 + axis]) for axis in (0, 1)
    )
    padded = F.pad(weight, (*horizontal.around_kernel, *vertical.around_kernel))
    taps = padded.unflatten(3, (horizontal.n_taps, stride)).unflatten(2, (vertical.n_taps, stride)).flip(2, 4)
    # (O, I, taps, s, taps, s) to (s · s · I, O, taps, taps)
    kernels = taps.permute(3, 5, 1, 0, 2, 4).flatten(0, 2)
    found = _convolved(delta, kernels, (*vertical.around_delta, *horizontal.around_delta))
    # Stacks interleave the phases four times as fast as a pixel shuffle.
    rows = [torch.stack(row.unbind(1), dim=4) for row in found.unflatten(1, (stride, stride, -1)).unbind(1)]
    return torch.stack(rows, dim=3).flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


def _convolved(x: Tensor, kernels: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """A convolution of stride 1."""
    above, under, left, right = margins
    if has_avx512() or x.device.type != "cpu":
        return F.conv2d(F.pad(x, (left, right, above, under)), kernels)
    windows = _windows(_pixels(x, margins), (kernels.shape[2], kernels.shape[3]), (1, 1), 1)
    patches = windows.flatten(3).flatten(1, 2)
    matrix = kernels.permute(0, 2, 3, 1).flatten(1)
    return torch.bmm(matrix.expand(len(x), -1, -1), patches.transpose(1, 2)).unflatten(2, windows.shape[1:3])


class _Phases(NamedTuple):
    """One axis of `carried_through_stride`."""

    n_taps: int
    around_kernel: tuple[int, int]
    around_delta: tuple[int, int]

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int, n_inputs: int, n_outputs: int) -> "_Phases":
        # Input s·m + r meets kernel row k = s·q + r + padding at output m − q.
        lowest, highest = -((stride - 1 + padding) // stride), (kernel - 1 - padding) // stride
        n_taps = highest - lowest + 1
        before = -(stride * lowest + padding)
        n_blocks = -(-n_inputs // stride)
        after = n_blocks - n_outputs - highest + n_taps - 1
        return cls(n_taps, (before, stride * n_taps - before - kernel), (highest, after))
