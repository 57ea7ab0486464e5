"""Tensors that say they are on a GPU, compute on the CPU, and like a GPU's refuse others that are not there.

So a machine without a GPU sees where code mixes devices: makes a tensor on the CPU, or asks one on the GPU for NumPy's.
Of `torch.vmap` it sees nothing, as that makes tensors of its own: use `as_on_the_cpu` for what is known to work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
# Made of operations among which some make a tensor where PyTorch believes this one to be.
_OF_SEVERAL = (torch.nn.functional.one_hot,)


class MixedDevicesError(RuntimeError):
    """A tensor is where PyTorch would refuse it."""


class OnGPU(Tensor):
    """A tensor that says so; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        # To PyTorch itself it is on the CPU, as its autograd would ask the GPU's driver for streams.
        made: OnGPU = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="cpu",
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGPU({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def held(value: Any) -> Any:
    """A tensor's values, where they are."""
    return value.held if isinstance(value, OnGPU) else value


def _wrapped(value: Any) -> Any:
    return OnGPU(value) if isinstance(value, Tensor) and not isinstance(value, OnGPU) else value


def _elsewhere(values: Any) -> list[tuple[int, ...]]:
    """Shapes of tensors that are not on the GPU, and no numbers."""
    return [
        tuple(x.shape) for x in tree_leaves(values) if isinstance(x, Tensor) and not isinstance(x, OnGPU) and x.dim()
    ]


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation of ATen's: checked, computed on the CPU, and its result put where PyTorch would."""
    there = any(isinstance(x, OnGPU) for x in tree_leaves((args, kwargs)))
    if func._schema.name in _INDEXING:
        indexed, _, *values = args
        # A GPU's tensor takes indices of the CPU, and not the other way round.
        wrong = _elsewhere(values) if isinstance(indexed, OnGPU) else [tuple(indexed.shape)] * there
    else:
        wrong = _elsewhere((args, kwargs)) if there and func not in _MOVES else []
    if wrong:
        raise MixedDevicesError(f"{func}: expected all tensors on cuda:0, found others of {wrong}")
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], OnGPU)
    computed = func(*tree_map(held, args), **tree_map(held, kwargs))
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, computed)) if there else computed


class _Move(torch.autograd.Function):
    """To the other device; its gradient back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return held(tensor).detach().clone() if isinstance(tensor, OnGPU) else OnGPU(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return held(gradient) if isinstance(gradient, OnGPU) else OnGPU(gradient)


def _on(tensor: Tensor, gpu: bool) -> Tensor:
    moved: Tensor = tensor if isinstance(tensor, OnGPU) is gpu else _Move.apply(tensor)
    return moved


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchFunctionMode):
    """What names a device, before PyTorch looks for its driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.cpu, Tensor.cuda):
            return _on(args[0], func is Tensor.cuda)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func in _OF_SEVERAL and isinstance(args[0], OnGPU):
            return _wrapped(func(*tree_map(held, args), **kwargs))
        device = kwargs.get("device")
        if device is None or not (_is_gpu(device) or isinstance(args[0] if args else None, OnGPU)):
            return func(*args, **kwargs)
        made = func(*tree_map(held, args), **{**kwargs, "device": "cpu"})
        return _on(made, _is_gpu(device))

    @staticmethod
    def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("non_blocking", None)
        device, others = kwargs.pop("device", None), []
        for value in args:
            if isinstance(value, Tensor):
                device, value = value.device, value.dtype
            if isinstance(value, str | torch.device):
                device = value
            elif isinstance(value, torch.dtype):
                others.append(value)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        tensor = tensor.to(*others, **kwargs) if others or kwargs else tensor
        return tensor if device is None else _on(tensor, _is_gpu(device))


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within it, ``cuda`` is a device, of `OnGPU` tensors."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Operations(), _Devices():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def as_on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does without what is pretended; its tensors have to be all on one device."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        there = any(isinstance(x, OnGPU) for x in tree_leaves((args, kwargs)))
        if not there:
            return function(*args, **kwargs)
        if wrong := _elsewhere((args, kwargs)):
            raise MixedDevicesError(f"{function.__name__}: expected all tensors on cuda:0, found others of {wrong}")
        with _disable_current_modes():
            return tree_map(_wrapped, function(*tree_map(held, args), **tree_map(held, kwargs)))

    return wrapper
