"""A model as a graph of torch.export: how one is made without weights, and what is read off it."""

import copy
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gitlight.errors import ArchitectureError, first_line
from gitlight.unregistered import check_all_registered, check_none_wants_a_gradient

_TORCH = Path(torch.__file__).parent

_BY_HOOKS = {
    WeightNorm: "torch.nn.utils.weight_norm; use torch.nn.utils.parametrizations.weight_norm",
    SpectralNorm: "torch.nn.utils.spectral_norm; use torch.nn.utils.parametrizations.spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune; torch.nn.utils.prune.remove(module, name) makes it permanent",
}
"""Hooks that compute a weight before each run, by kind: what made them, and what to do."""

_UNTRACEABLE = (
    "A model whose control flow depends on values, or that takes values out of tensors (.item(), .tolist(), .numpy(), "
    "printing), cannot be inverted layer by layer. Compute with tensors alone, as torch.where does."
)


def export_bare(model: nn.Module, image_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The operations of a model, stripped of its weights, on one image in evaluation mode.

    Args:
        model: it is copied, not changed, and its hooks do not fire.
        image_shape: ``(C, H, W)``.

    Raises:
        ArchitectureError: ``torch.export`` cannot trace the model, an image of this shape does not fit it, or it
            returns anything but one tensor.
    """
    check_traceable(model)
    try:
        return _export(model, image_shape)
    except ArchitectureError:
        raise
    except Exception as error:  # whatever the user's modules and torch.export raise
        if not _names_two_devices(error):
            raise _untraceable(model, image_shape, error) from error
    try:
        return _export_on_the_cpu(model, image_shape)
    except ArchitectureError:
        raise
    except Exception as error:
        raise _untraceable(model, image_shape, error) from error


def _untraceable(model: nn.Module, image_shape: tuple[int, int, int], error: Exception) -> ArchitectureError:
    name, cause = type(model).__name__, _failure_of(error)
    if _runs_on(model, image_shape):
        return ArchitectureError(f"{name} cannot be traced by torch.export: {cause} {_UNTRACEABLE}")
    return ArchitectureError(
        f"{name} does not accept an image of shape {image_shape} (channels, height, width): {cause}"
    )


def _export(model: nn.Module, image_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    bare = without_hooks(copied(model)).to("meta", torch.float32).eval()
    image = torch.empty(1, *image_shape, device="meta")
    with torch.no_grad(), warnings.catch_warnings(), without_autocast():
        warnings.simplefilter("ignore")
        result = bare(image)
        if not isinstance(result, Tensor):
            raise _no_tensor(model, type(result).__name__)
        exported = torch.export.export(bare, (image,), strict=False)
    check_none_wants_a_gradient(model, exported.constants)
    return exported


def _export_on_the_cpu(model: nn.Module, image_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """For a model with tensors that do not follow it to another device, as constants that are no buffers.

    Its weights are without values here, too: torch.export runs no operation on any.
    """
    bare = without_hooks(copied(model)).to("meta", torch.float32).to_empty(device="cpu").eval()
    with torch.no_grad(), warnings.catch_warnings(), without_autocast():
        warnings.simplefilter("ignore")
        exported = torch.export.export(bare, (torch.empty(1, *image_shape),), strict=False)
    check_none_wants_a_gradient(model, exported.constants)
    check_all_registered(bare, exported.constants)
    if not exported.call_spec.out_spec.is_leaf():
        raise _no_tensor(model, exported.call_spec.out_spec.type.__name__)
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool)
    for node in exported.graph.nodes:
        if isinstance(node.meta.get("val"), numbers):
            lines = re.findall(r'File "(.*)", line (\d+)', node.meta.get("stack_trace") or "")
            where = f" ({Path(lines[-1][0]).name}, line {lines[-1][1]})" if lines else ""
            raise ArchitectureError(
                f"{type(model).__name__} cannot be traced by torch.export: it takes a value out of a tensor{where}. "
                f"{_UNTRACEABLE}"
            )
    return exported


def _no_tensor(model: nn.Module, what: str) -> ArchitectureError:
    return ArchitectureError(
        f"{type(model).__name__} returns {what}, not one tensor of logits. Wrap it in a module whose forward returns "
        "these alone."
    )


def _names_two_devices(error: Exception) -> bool:
    return all(device in str(error) for device in ("meta", "cpu"))


def _failure_of(error: Exception) -> str:
    """A sentence on what a model's code raised, and in which line of it."""
    cause = first_line(error).rstrip(".")
    if "torch.nonzero()" in cause:  # which goes on with advice on torch's own switches
        cause = "how many entries x[mask] and torch.nonzero give depends on values"
    elif not isinstance(error, RuntimeError | ValueError):
        cause = f"{type(error).__name__}: {cause}"  # which says little without it, as a KeyError's
    libraries = (str(_TORCH), str(Path(__file__).parent))
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(libraries)]
    return f"{cause} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})." if frames else f"{cause}."


def _runs_on(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether a model, in evaluation mode, takes an image that has values; a copy of it is run."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            without_hooks(copied(model)).eval()(image)
    except Exception:  # whatever the user's modules raise
        return False
    return True


def check_traceable(model: nn.Module) -> None:
    """Raises: ArchitectureError, if a model holds what hides its operations, or parameters of no shape or not real."""
    name = type(model).__name__
    for path, module in model.named_modules():
        where = f"module {path!r} of {name}" if path else name
        if isinstance(module, torch.jit.ScriptModule):
            raise ArchitectureError(
                f"{where} is compiled by torch.jit, which keeps its operations to itself. Give the model that it was "
                "made from."
            )
        for hook in module._forward_pre_hooks.values():
            for kind, what in _BY_HOOKS.items():
                if isinstance(hook, kind):
                    raise ArchitectureError(f"The weight of {where} is computed by a hook of {what}.")
    for path, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ArchitectureError(f"{path!r} of {name} has no shape yet. Run the model on an image first.")
        if parameter.is_complex():
            raise ArchitectureError(
                f"{path!r} of {name} is complex: complex parameters are not supported. Hold real and imaginary part as "
                "two parameters, and use torch.complex."
            )


def copied(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy.

    Args:
        model: what to copy, hooks included.
        shared: tensors that the copy has in common with it.

    Raises:
        ArchitectureError: there can be none.
    """
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except Exception as error:  # whatever the user's modules raise
        raise ArchitectureError(
            f"{type(model).__name__} cannot be copied: {first_line(error).rstrip('.')}. What is computed from "
            "parameters belongs in forward, and what cannot be copied outside the model."
        ) from error


def without_hooks(model: nn.Module) -> nn.Module:
    """The model itself; what its user registered to watch it run is not to see the tracing."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return model


@contextmanager
def without_autocast(kept_where_on: bool = False) -> Iterator[None]:
    """Trace regions of ``torch.autocast`` as all others: a graph would hold each as one operation, with a graph within.

    Args:
        kept_where_on: whether those that autocast stay regions, for who needs their rounding. Those that only switch
            it off (``enabled=False``) are none in any case.
    """
    autocast: Any = torch.autocast
    init, enter, leave = autocast.__init__, autocast.__enter__, autocast.__exit__

    def begun(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)  # which it does not take

    def entered(self: Any) -> Any:
        return enter(self) if kept_where_on and self._enabled else self

    def left(self: Any, *raised: Any) -> Any:
        return leave(self, *raised) if kept_where_on and self._enabled else None

    autocast.__init__, autocast.__enter__, autocast.__exit__ = begun, entered, left
    try:
        yield
    finally:
        autocast.__init__, autocast.__enter__, autocast.__exit__ = init, enter, leave


def lifted_constants(exported: Any) -> dict[str, str]:
    """Nodes of tensors that are neither parameters nor buffers → their names in the program."""
    return dict(getattr(exported.graph_signature, "inputs_to_lifted_tensor_constants", {}))


def held_tensors(exported: Any, model: nn.Module) -> dict[str, str]:
    """Nodes of the model's parameters and buffers → their names.

    Of one that has several it is the first, which `named_parameters` and `named_buffers` give.
    """
    signature = exported.graph_signature
    held = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    first: dict[int, str] = {}
    everywhere = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name: first.setdefault(id(tensor), name) for name, tensor in everywhere}
    return {str(node): names.get(name, str(name)) for node, name in held.items()}


def kind_of(node: fx.Node) -> str:
    """The operation's name, as ``conv2d``, or ``library::conv2d`` where it is not ATen's.

    Empty for Python's own, such as picking one of several results.
    """
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, defaults filled in; by position, where its operation has no names for them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(position): value for position, value in enumerate(node.args)}
    found: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def draws_random_numbers(operation: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether an operation draws random numbers.

    Args:
        operation: an ATen operation, or a library's own that carries PyTorch's tag for it.
        arguments: by name, defaults included; None or a node for tensors.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(operation, "tags", ()):
        return False
    # What drops values, and RReLU, carries the tag also where it is told to do nothing.
    trains = arguments.get("train", arguments.get("training", True))
    share = next((arguments[name] for name in ("p", "dropout_p", "dropout") if name in arguments), None)
    return bool(trains) and share != 0


def module_path(node: fx.Node) -> str:
    """Of the innermost module that a node was traced in; empty for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""
