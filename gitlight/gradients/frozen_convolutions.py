"""Convolutions whose weights autograd wants no gradient of: values, and δ carried to the input."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gitlight.gradients.products import has_avx512
from gitlight.gradients.unfolding import pixels, windows


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
        if above == under >= 0 and left == right >= 0:  # no copy with margins
            return F.conv2d(x, kernels, padding=(above, left))
        return F.conv2d(F.pad(x, (left, right, above, under)), kernels)
    unfolded = windows(pixels(x, margins), (kernels.shape[2], kernels.shape[3]), (1, 1), 1)
    patches = unfolded.flatten(3).flatten(1, 2)
    matrix = kernels.permute(0, 2, 3, 1).flatten(1)
    return torch.bmm(matrix.expand(len(x), -1, -1), patches.transpose(1, 2)).unflatten(2, unfolded.shape[1:3])


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
