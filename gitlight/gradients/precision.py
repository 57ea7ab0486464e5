"""Full float32 precision, whatever shortcuts a GPU would take."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it, float32 convolutions and matrix products are IEEE float32, not TF32.

    PyTorch lets convolutions use TF32 on GPUs by default: a relative error of 1e-3, a thousand times that of float32,
    and closed-form inversion amplifies it.
    """
    with ExitStack() as restore:
        cudnn = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
        # On CPUs, oneDNN would use bfloat16 where `torch.set_float32_matmul_precision` allows it.
        onednn = [
            b for b in (getattr(torch.backends.mkldnn, name, None) for name in ("conv", "matmul")) if b is not None
        ]
        for backend in (cudnn, torch.backends.cuda.matmul, *onednn):
            restore.callback(_set, backend, _set(backend, "ieee"))
        yield


@contextmanager
def autograd_on(device_type: str) -> Iterator[None]:
    """Autograd on and mixed precision off, wherever gradients are made from."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def plain_autograd(device_type: str) -> Iterator[None]:
    """`autograd_on` in `full_float32`."""
    with autograd_on(device_type), full_float32():
        yield


def plain_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor outside any graph, of this precision if it has one; tensors made in inference mode are copied."""
    tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
    return tensor.clone() if tensor.is_inference() else tensor


def _set(backend: Any, precision: str) -> str:
    """Set a backend's float32 precision; the former one."""
    if hasattr(backend, "fp32_precision"):
        former = str(backend.fp32_precision)
        backend.fp32_precision = precision
        return former
    former = "tf32" if backend.allow_tf32 else "ieee"  # before PyTorch 2.9
    backend.allow_tf32 = precision != "ieee"
    return former
