"""A network as a function of its weights, right for modules and parameters that it has at several places."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def functional(
    network: nn.Module, then: Callable[[Tensor], Any] = lambda logits: logits
) -> Callable[[Mapping[str, Tensor], Tensor], Any]:
    """``f(tensors, images)``: the network's logits, or what ``then`` makes of them.

    ``tensors`` has the names of ``named_parameters`` and ``named_buffers``.

    A parameter that several modules share (tied weights) has one name and is replaced at all of them. A module that is
    registered under two names is replaced once. ``torch.func.functional_call`` replaces, and later restores, it twice,
    in the same order, so that it leaves the network with the tensors that it was called with. They are replaced until
    ``then`` is done: a backward pass in it may run parts of the network again (``torch.utils.checkpoint``).

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
        return functional_call(_Then(network, then), everywhere, (images,), tie_weights=False)

    return call


class _Then(nn.Module):
    def __init__(self, network: nn.Module, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self.then = then

    def forward(self, images: Tensor) -> Any:
        return self.then(self.network(images))
