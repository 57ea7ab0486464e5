"""Convolutions of the captured method: the gradient of each leak's weight.

There are several exact ways to be computed; which one is fastest depends on shapes (figures in docs/decisions.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gitlight.gradients.buffers import Scratch
from gitlight.gradients.products import has_avx512, has_whole_avx512, is_intels, write_products
from gitlight.gradients.unfolding import pixels, windows

# Channels up to which oneDNN's kernels for channels last gain, where the vectors of the others would not be full.
_FEW_CHANNELS = 48

# The most channels for which, without AVX-512, grouped convolutions gain over products with the unfolded input.
_MOST_CHANNELS_OF_AVX2 = 32

# Of how many times the channels a convolution still gains, with a large kernel and with any.
_MOST_PADDED, _MOST_PADDED_OF_ANY_KERNEL = 1.8, 1.35

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

    The one for channels first wants channels in eights, to fill its vectors; some others are padded until they do. The
    one for channels last takes any number, and gains where there are few, but only with whole vectors of AVX-512, and
    not over MKL's products with them. All need positions enough to sum over.
    """
    if delta.device.type != "cpu" or delta.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return None
    (n_out, n_in, *kernel), (rows, columns) = conv.weight_shape, delta.shape[2:]
    too_small = columns < 8 or rows * columns < max(64, n_out // 2)
    if too_small or conv.groups > 1 or isinstance(conv.padding, str):
        return None
    in_eights, largest = n_out % 8 == 0 and n_in % 8 == 0, max(n_out, n_in)
    if not has_whole_avx512():
        most = rows * columns if has_avx512() else _MOST_CHANNELS_OF_AVX2
        if in_eights:
            return _write_channels_first if largest <= most else None
        padded = _in_sixteens(n_out) * _in_sixteens(n_in) / (n_out * n_in)
        gains = padded <= (_MOST_PADDED if min(kernel) >= 5 else _MOST_PADDED_OF_ANY_KERNEL)
        return _write_padded if gains and largest <= _FEW_CHANNELS else None
    if min(n_out, n_in) >= 8 and (in_eights or largest > _FEW_CHANNELS):
        return _write_channels_first
    odd = not is_intels() and (n_out % 8 != 0 or (n_in % 8 != 0 and n_in > 4))
    return _write_channels_last if odd and min(kernel) >= 5 and largest <= _FEW_CHANNELS else None


def _write_channels_first(conv: Convolution, delta: Tensor, out: Tensor) -> None:
    """All leaks as the groups of one convolution, whose weight has their gradients."""
    x, delta = (conv.per_leak(part).transpose(0, 1).flatten(1, 2) for part in (conv.input, delta))
    out.copy_(_grouped_weight_gradient(conv, x, delta, conv.n_leaks).view_as(out))


def _write_padded(conv: Convolution, delta: Tensor, out: Tensor) -> None:
    """The same, with channels of zeros that fill the kernel's vectors."""
    for x, its_delta, kept in _parts(conv, delta, out):
        sides = (_in_whole_vectors(conv, x, "input"), _in_whole_vectors(conv, its_delta, "delta"))
        made = _grouped_weight_gradient(conv, *sides, len(x)).unflatten(0, (len(x), -1))
        kept.copy_(made[:, : kept.shape[1], : kept.shape[2]])


def _in_whole_vectors(conv: Convolution, tensor: Tensor, purpose: str) -> Tensor:
    """``(B, N, C, H, W)`` to ``(N, B · C', H, W)``, where ``C'`` is ``C`` in sixteens."""
    n_leaks, n_images, n_channels, *size = tensor.shape
    padded = conv.scratch.empty(purpose, (n_images, n_leaks, _in_sixteens(n_channels), *size), tensor)
    padded[:, :, :n_channels] = tensor.transpose(0, 1)
    padded[:, :, n_channels:] = 0
    return padded.flatten(1, 2)


def _in_sixteens(n_channels: int) -> int:
    return 16 * ceil(n_channels / 16)


def _write_channels_last(conv: Convolution, delta: Tensor, out: Tensor) -> None:
    """The same, with the leaks' channels side by side at every position."""
    for x, its_delta, kept in _parts(conv, delta, out):
        sides = (_side_by_side(conv, x, "input"), _side_by_side(conv, its_delta, "delta"))
        kept.copy_(_grouped_weight_gradient(conv, *sides, len(x)).view_as(kept))


def _parts(conv: Convolution, delta: Tensor, out: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Input ``(B, N, …)``, δ and result of as many leaks as stay in the cache."""
    sides = (conv.per_leak(conv.input), conv.per_leak(delta), out)
    return zip(*(side.split(_LEAKS_AT_ONCE) for side in sides), strict=True)


def _side_by_side(conv: Convolution, tensor: Tensor, purpose: str) -> Tensor:
    """``(B, N, C, H, W)`` to ``(N, B · C, H, W)``, channels last."""
    n_leaks, n_images, n_channels, *size = tensor.shape
    moved = conv.scratch.empty(purpose, (n_images, size[0] * size[1], n_leaks * n_channels), tensor)
    for image, its in zip(moved, tensor.unbind(1), strict=True):
        image.copy_(its.reshape(-1, image.shape[0]).t())  # a transposed matrix: three times as fast as a permutation
    return moved.view(n_images, *size, -1).permute(0, 3, 1, 2)


def _grouped_weight_gradient(conv: Convolution, x: Tensor, delta: Tensor, n_leaks: int) -> Tensor:
    n_in, (height, width) = x.shape[1] // n_leaks, conv.weight_shape[2:]
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
    return windows(pixels(conv.input, conv.margins), (height, width), conv.stride, conv.dilation[0])


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
