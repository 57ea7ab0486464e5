"""What a model computes with and has not told PyTorch of: it never leaks, and the user may not know."""

from collections.abc import Iterator, Mapping
from types import ModuleType

from torch import Tensor, nn

from gitlight.errors import ArchitectureError

_REGISTRIES = ("_modules", "_parameters", "_buffers")


def check_none_wants_a_gradient(model: nn.Module, constants: Mapping[str, object]) -> None:
    """Refuse a tensor that the model computes with, and that is trained and no parameter.

    Args:
        model: which.
        constants: what its graph holds beside parameters and buffers, by name.

    Raises:
        ArchitectureError: there is one.
    """
    for name, one in constants.items():
        if isinstance(one, Tensor) and one.requires_grad:
            raise ArchitectureError(
                f"{name} of {type(model).__name__} has requires_grad and is no parameter: to PyTorch it is none of the "
                "model's, and never leaks. Use torch.nn.Parameter, or a buffer without requires_grad."
            )


def check_all_registered(model: nn.Module, constants: Mapping[str, object]) -> None:
    """Refuse parameters that the model computes with and PyTorch does not see.

    Args:
        model: as it was traced, on the CPU.
        constants: what its graph holds beside parameters and buffers, by name.

    Raises:
        ArchitectureError: layers or parameters are in a list, or in another object that is no module.
    """
    places = {one.data_ptr() for one in constants.values() if isinstance(one, Tensor)}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _REGISTRIES:
                continue
            for parameter in _parameters_within(value):
                if parameter.numel() and parameter.data_ptr() in places:
                    raise ArchitectureError(
                        f"{'.'.join(filter(None, (path, name)))} of {type(model).__name__} is a {type(value).__name__} "
                        "with layers or parameters that are none of the model's to PyTorch, and never leak. Use "
                        "torch.nn.ModuleList, ModuleDict, ParameterList or ParameterDict."
                    )


def _parameters_within(whole: object) -> Iterator[nn.Parameter]:
    """Parameters in containers, modules and other objects, whatever holds them."""
    known: set[int] = set()
    remaining = [whole]
    while remaining:
        value = remaining.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, dict | list | tuple | set):
            remaining += value.values() if isinstance(value, dict) else value
        elif hasattr(value, "__dict__") and not isinstance(value, type | Tensor | ModuleType):
            remaining += vars(value).values()
