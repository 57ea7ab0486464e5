"""Matrix products, by the library that is fastest for their size.

On CPUs, PyTorch multiplies float32 matrices by MKL and convolves by oneDNN. MKL keeps to AVX2 on processors that
are not Intel's; oneDNN uses AVX-512 wherever there is any, and is then up to twice as fast. On Intel's own it is
slower, and on AMD's Zen 4, which makes two halves of each vector, no faster (docs/decisions.md).
"""

import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Entries of a temporary product that stay in a CPU's cache; the sum that follows then costs little.
_CACHED = 2**22

# Multiplications and additions from which on one call of oneDNN for each matrix pays.
_LEAST_WORK = 4e6


def write_products(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write ``Σ_n left_n @ right_n`` of ``(B, N, O, L)`` and ``(B, N, L, I)`` to ``out``, ``(B, O, I)``.

    The products of a leak's images are summed as they are made: none but one is held.
    """
    by_position = left.transpose(2, 3)
    if left.shape[1] > 1 and _rows_are_even(by_position) and _rows_are_even(right):
        # Products image by image pass over the result once for each: with few positions most of the work.
        left, right = by_position.flatten(1, 2).mT.unsqueeze(1), right.flatten(1, 2).unsqueeze(1)
    if left.shape[1] == left.shape[3] == 1:  # an outer product: for this, bmm is twice as slow
        torch.mul(left[:, 0], right[:, 0], out=out)
    elif left.shape[3] >= 32 and has_whole_avx512() and _by_onednn(left, 2 * left[0, 0].numel() * right.shape[3]):
        for leak in range(len(left)):
            out[leak] = _onednn(left[leak, 0], right[leak, 0].t(), None)
            for image in range(1, left.shape[1]):
                out[leak] += _onednn(left[leak, image], right[leak, image].t(), None)
    else:
        torch.bmm(left[:, 0], right[:, 0], out=out)
        for image in range(1, left.shape[1]):
            out.baddbmm_(left[:, image], right[:, image])


def _rows_are_even(tensor: Tensor) -> bool:
    """Whether ``(B, N, L, K)`` is ``(B, N · L, K)`` without a copy."""
    return tensor.shape[2] == 1 or tensor.stride(1) == tensor.shape[2] * tensor.stride(2)


def channel_products(left: Tensor, right: Tensor) -> Tensor:
    """``Σ_k left[b, o, k] · right[o, k]``: ``(B, O, K)`` and ``(O, K)`` to ``(B, O)``.

    ``bmm`` of vectors, which this would be, is two to five times as slow.
    """
    at_once = min(len(left), max(1, _CACHED // right.numel()) if left.device.type == "cpu" else len(left))
    products, sums = left.new_empty(at_once, *right.shape), left.new_empty(left.shape[:2])
    for part, kept in zip(left.split(at_once), sums.split(at_once), strict=True):
        torch.sum(torch.mul(part, right, out=products[: len(part)]), dim=2, out=kept)
    return sums


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b``, where a hook makes the gradients of ``W`` and ``b``.

    All rows of ``x`` are one matrix: of a weight without gradient, PyTorch would make a product of each row where the
    first dimensions are swapped, as attention has them. The result is laid out as PyTorch's, and no view: what
    overwrites a view cuts off its hook.
    """
    if x.dim() > 2:
        rows = frozen_linear(x.flatten(0, -2), weight, bias)
        whole: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])
        return whole
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if frozen and x.dim() == 2 and _by_onednn(x, 2 * x.numel() * len(weight)):
        result: Tensor = _FrozenLinear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None]:
        (delta,), (weight,) = deltas, ctx.saved_tensors
        return _onednn(delta, weight.t(), None) if ctx.needs_input_grad[0] else None, None, None


@cache
def has_avx512() -> bool:
    """Whether this processor, and PyTorch on it, has vectors of sixteen float32."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@cache
def is_intels() -> bool:
    """Whether this processor is one that MKL uses all vectors of."""
    return "GenuineIntel" in _processor()


@cache
def has_whole_avx512() -> bool:
    """Whether `has_avx512`, and the processor is none of AMD's before Zen 5 (family 26): these halve its vectors."""
    family = re.search(r"cpu family\s*:\s*(\d+)", described := _processor())
    halves = "AuthenticAMD" in described and family is not None and int(family[1]) < 26
    return has_avx512() and not halves


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()


def _by_onednn(tensor: Tensor, work: int) -> bool:
    fits = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and work >= _LEAST_WORK
    fits = fits and has_avx512() and not is_intels()
    return fits and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # For matrices with gaps between their rows, oneDNN falls back to a kernel a thousand times as slow.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    if matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous() if matrix.stride(1) == 1 else matrix.t().contiguous().t()
