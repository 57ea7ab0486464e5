"""δ in the order in which norms' backward passes read it, which on CPUs PyTorch gets wrong."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NORMS = frozenset(
    norm
    for kind in ("batch_norm", "instance_norm")
    for norm in (getattr(torch, kind), getattr(torch.nn.functional, kind), getattr(torch.ops.aten, kind).default)
)


def is_such_a_norm(operation: object) -> bool:
    """Whether an operation is one that `delta_in_order` is for."""
    return operation in _NORMS


def delta_in_order(device_type: str, has_norms: bool = True) -> AbstractContextManager[object]:
    """Within it, batch and instance norms that are run get the right gradients from autograd.

    PyTorch (2.15) takes an input whose channels are outermost in memory and a δ whose channels are innermost, or the
    other way round, for one order where the norm's batch is one, as the stride of such a dimension says nothing;
    instance norm is batch norm of a batch of one, whatever the images. Tokens with the batch within, weighted or under
    a softmax, make such a δ, and for instance norm channels last. Here δ gets the order of the norm's result: that is
    its input's, and of an instance norm, which copies inputs that are in another, channels first. On GPUs, or where
    ``has_norms`` says that there are none, it does nothing.
    """
    return _DeltaInOrder() if has_norms and device_type == "cpu" else nullcontext()


class _DeltaInOrder(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _NORMS and result.requires_grad:
            result.register_hook(partial(_in_order, result.stride()))
        return result


def _in_order(strides: tuple[int, ...], delta: Tensor) -> Tensor:
    if delta.stride() == strides:
        return delta
    return torch.empty_strided(delta.shape, strides, dtype=delta.dtype, device=delta.device).copy_(delta)
