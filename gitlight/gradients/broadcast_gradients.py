"""Rules of operations that broadcast a parameter: sums and products with it, and copies of it for every image."""

import torch
from torch import Tensor

from gitlight.gradients.layer_gradients import Call, NoRuleError, gradient_rule


@gradient_rule("add", "sub")
def add(call: Call, delta: Tensor) -> None:
    """A sum with a parameter, such as a position embedding."""
    for argument in ("self", "other"):
        if (out := call.gradient(argument)) is not None:
            write_broadcast(call, delta, call.values[argument].shape, out)
            factor = call.values["alpha"] * (1 if call.kind == "add" else -1)
            if argument == "other" and factor != 1:
                out.mul_(factor)


@gradient_rule("mul")
def mul(call: Call, delta: Tensor) -> None:
    """A product with a parameter, such as a layer's learned scale."""
    for argument, other in (("self", "other"), ("other", "self")):
        if (out := call.gradient(argument)) is not None:
            write_broadcast(call, delta * call.values[other], call.values[argument].shape, out)


@gradient_rule("div")
def div(call: Call, delta: Tensor) -> None:
    """A quotient of which a parameter is a part, such as logits over a learned temperature."""
    values = call.values
    if (out := call.gradient("self")) is not None:
        write_broadcast(call, delta / values["other"], values["self"].shape, out)
    if (out := call.gradient("other")) is not None:
        write_broadcast(call, -delta * values["self"] / values["other"].square(), values["other"].shape, out)


@gradient_rule("prelu")
def prelu(call: Call, delta: Tensor) -> None:
    """One slope below zero, or one for each channel."""
    if (out := call.gradient("weight")) is not None:
        x = call.values["self"]
        shape = call.values["weight"].shape
        if shape.numel() > 1:  # of channels, which come second
            shape = torch.Size((*shape, *[1] * (x.dim() - 2)))
        write_broadcast(call, delta * x.clamp(max=0), shape, out.view(len(out), *shape))


@gradient_rule("expand", "expand_as", "broadcast_to")
def expand(call: Call, delta: Tensor) -> None:
    """A parameter repeated for every image, such as a class token."""
    if (out := call.gradient("self")) is not None:
        write_broadcast(call, delta, call.values["self"].shape, out)


@gradient_rule("repeat")
def repeat(call: Call, delta: Tensor) -> None:
    """The same, and as often as is asked for along its other dimensions."""
    if (out := call.gradient("self")) is None:
        return
    times, shape = call.values["repeats"], call.values["self"].shape
    dim, outer, inner = call.layouts["output"]
    missing = len(times) - len(shape)
    if outer * inner > 1 or (dim >= missing and shape[dim - missing] != 1):
        raise NoRuleError("a parameter that is not the same for every image")
    # Copies lie one after the other along each dimension.
    for d in reversed(range(missing, len(times))):
        if d != dim and times[d] > 1:
            delta = delta.unflatten(d, (times[d], -1)).sum(d)
    write_broadcast(call, delta, shape, out)


def write_broadcast(call: Call, delta: Tensor, shape: torch.Size, out: Tensor) -> None:
    """Write the gradient of a parameter that was broadcast to the output's shape: δ summed over what was repeated."""
    dim, outer, inner = call.layouts["output"]
    padded = (1,) * (delta.dim() - len(shape)) + tuple(shape)
    if padded[dim] != 1:
        raise NoRuleError("a parameter that is not the same for every image")
    if outer * inner > 1:  # what is merged with the images, as windows are, is broadcast along as well
        delta = call.examples_first(delta, "output").flatten(1, 2).sum(1).movedim(0, dim)
    repeated = [d for d in range(delta.dim()) if padded[d] == 1 and delta.shape[d] > 1 and d != dim]
    if repeated:
        delta = delta.sum(dim=repeated, keepdim=True)
    torch.sum(call.per_leak(delta.movedim(dim, 0)).reshape(call.n_leaks, -1, *shape), dim=1, out=out)
