"""A network as a function of its weights, right for modules and parameters that it has at several places."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    the tensors that it was called with, and forgotten. Other attributes stay as the run has left them.

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
        with _no_tensors_left_in(network):
            return functional_call(_Then(network, then), everywhere, (images,), tie_weights=False)

    return call


@contextmanager
def _no_tensors_left_in(network: nn.Module) -> Iterator[None]:
    """Put back what modules had as attributes, and in dicts that are attributes, in place of tensors kept since."""
    held: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for module in network.modules():
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        held.append((vars(module), own))
        held += [(value, value.copy()) for value in own.values() if type(value) is dict]
    try:
        yield
    finally:
        for holder, former in held:
            for name in [name for name, value in holder.items() if _holds_tensors(value)]:
                if name not in former:
                    del holder[name]
                elif former[name] is not holder[name]:
                    holder[name] = former[name]


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(isinstance(one, Tensor) for one in value))


class _Then(nn.Module):
    def __init__(self, network: nn.Module, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self.then = then

    def forward(self, images: Tensor) -> Any:
        return self.then(self.network(images))
