"""Full float32 precision, whatever shortcuts a GPU would take."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it, float32 convolutions and matrix products are IEEE float32, not TF32.

    PyTorch lets convolutions use TF32 on GPUs by default: a relative error of 1e-3, a thousand times that of float32,
    and closed-form inversion amplifies it.
    """
    with ExitStack() as restore:
        for backend in (getattr(torch.backends.cudnn, "conv", torch.backends.cudnn), torch.backends.cuda.matmul):
            restore.callback(_set, backend, _set(backend, "ieee"))
        yield


@contextmanager
def plain_autograd(device_type: str) -> Iterator[None]:
    """Autograd on, mixed precision and TF32 off, wherever gradients are made from.

    Attention is made of plain matrix products, which `full_float32` governs and vmap has rules for.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device_type, enabled=False),
        full_float32(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def _set(backend: Any, precision: str) -> str:
    """Set a backend's float32 precision; the former one."""
    if hasattr(backend, "fp32_precision"):
        former = str(backend.fp32_precision)
        backend.fp32_precision = precision
        return former
    former = "tf32" if backend.allow_tf32 else "ieee"  # before PyTorch 2.9
    backend.allow_tf32 = precision != "ieee"
    return former
