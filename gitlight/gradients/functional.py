"""A network as a function of its weights, right for modules and parameters that it has at several places."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that PyTorch keeps its own in: parameters, buffers, modules, hooks."""


def functional(
    network: nn.Module, then: Callable[[Tensor], Any] = lambda logits: logits
) -> Callable[[Mapping[str, Tensor], Tensor], Any]:
    """``f(tensors, images)``: the network's logits, or what ``then`` makes of them.

    ``tensors`` has the names of ``named_parameters`` and ``named_buffers``.

    A parameter that several modules share (tied weights) has one name and is replaced at all of them. A module that is
    registered under two names is replaced once. ``torch.func.functional_call`` replaces, and later restores, it twice,
    in the same order, so that it leaves the network with the tensors that it was called with. They are replaced until
    ``then`` is done: a backward pass in it may run parts of the network again (``torch.utils.checkpoint``).

    Tensors that the network keeps in attributes as it runs, as a bias that evaluation mode computes only once, are of
    the tensors that it was called with, and forgotten, with all else that their module keeps in attributes. Those of
    other modules stay as the run has left them.

    >>> network = nn.Sequential(*[nn.Linear(2, 2)] * 2)
    >>> weight = network[0].weight
    >>> tensors = {name: parameter * 2 for name, parameter in network.named_parameters()}
    >>> functional(network)(tensors, weight.new_zeros(1, 2)).shape
    torch.Size([1, 2])
    >>> network[0].weight is weight
    True
    """
    names: dict[int, str] = {}
    places: list[tuple[str, str]] = []
    for path, module in network.named_modules():  # each module once
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                place = f"{path}.{key}" if path else key
                places.append((place, names.setdefault(id(tensor), place)))

    def call(tensors: Mapping[str, Tensor], images: Tensor) -> Any:
        everywhere = {f"network.{place}": tensors[name] for place, name in places}
        run = _Then(network, then)
        if torch.compiler.is_compiling():  # who compiles it puts back what the whole has left
            return functional_call(run, everywhere, (images,), tie_weights=False)
        with no_tensors_left_in(network):
            return functional_call(run, everywhere, (images,), tie_weights=False)

    return call


@contextmanager
def no_tensors_left_in(network: nn.Module) -> Iterator[None]:
    """Put back all attributes of modules that have kept tensors of a run; other modules' stay as the run has left them.

    All, as a size or a flag beside a tensor says that it is there.
    """
    before = [_contents(module) for module in network.modules()]
    try:
        yield
    finally:
        for holders in before:
            if any(_keeps_others(holder, former) for holder, former in holders):
                for holder, former in holders:
                    _put_back(holder, former)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """A module's attributes, and the dicts and lists among and within them, each with a copy of what it holds."""
    attributes = vars(module)
    found: list[tuple[Any, Any]] = [(attributes, attributes.copy())]
    known: set[int] = set()
    remaining = [value for name, value in attributes.items() if name not in _OF_EVERY_MODULE]
    while remaining:
        holder = remaining.pop()
        if isinstance(holder, dict | list) and id(holder) not in known:
            known.add(id(holder))
            found.append((holder, holder.copy()))
            remaining += holder.values() if isinstance(holder, dict) else holder
    return found


def _keeps_others(holder: Any, former: Any) -> bool:
    """Whether tensors have come or gone."""
    if isinstance(holder, list):
        same = len(holder) == len(former) and all(a is b for a, b in zip(holder, former, strict=True))
        return not same and (_holds_tensors(holder) or _holds_tensors(former))
    names = [name for name in {**former, **holder} if holder.get(name) is not former.get(name)]
    return any(_holds_tensors(holder.get(name)) or _holds_tensors(former.get(name)) for name in names)


def _put_back(holder: Any, former: Any) -> None:
    if isinstance(holder, list):
        holder[:] = former
        return
    for name in [name for name in holder if name not in former]:
        del holder[name]
    holder.update(former)


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple | set):
        return isinstance(value, Tensor)
    return any(map(_holds_tensors, value))


class _Then(nn.Module):
    def __init__(self, network: nn.Module, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self.then = then

    def forward(self, images: Tensor) -> Any:
        return self.then(self.network(images))
