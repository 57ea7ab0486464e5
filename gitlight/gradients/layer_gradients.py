"""Rules: the gradient per leak of one operation's parameters, from its input and the gradient δ of its output.

A rule is a function with the decorator `gradient_rule`, which takes the operation's name as `torch.export` gives it. It
gets a `Call` and δ, and writes ``(B, *parameter.shape)`` for each parameter that leaks::

    @gradient_rule("rms_norm")
    def rms_norm(call: Call, delta: Tensor) -> None:
        if (out := call.gradient("weight")) is not None:  # normalised over the last dimension
            normalised = F.rms_norm(call.values["input"], call.values["normalized_shape"], eps=call.values["eps"])
            torch.sum(call.positions(delta * normalised, "output"), dim=(1, 2), out=out)

Operations without a rule are differentiated by autograd, for each leak apart: `differentiated`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.gradients.buffers import Scratch
from gitlight.gradients.convolutions import Convolution, write_weight_gradient
from gitlight.gradients.products import channel_products, write_products


class NoRuleError(Exception):
    """An operation has no rule, or is used in a way that its rule does not cover."""


class Layout(NamedTuple):
    """Where a tensor has its examples: dimension ``dim`` holds ``outer · S · inner`` entries, ``S`` examples.

    ``outer`` and ``inner`` are 1 unless the model merges the batch with another dimension, as attention does.
    """

    dim: int = 0
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Call:
    """One operation with parameters, while a chunk of ``B`` leaks of ``N`` images passes through it.

    Attributes:
        kind: the operation's name.
        values: the operation's arguments by name, members of lists by `with_members`; parameters are detached.
        layouts: where the arguments that depend on the images, and ``output``, have their examples.
        n_leaks: ``B``.
        destination: argument → tensor ``(B, *shape)`` to write its gradient into; None where it does not leak.
        scratch: memory for what is on the way there.
        operation: the ATen operation.
    """

    kind: str
    values: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    n_leaks: int
    destination: Callable[[str], Tensor | None]
    scratch: Scratch = field(default_factory=Scratch)
    operation: Any = None

    def gradient(self, argument: str) -> Tensor | None:
        """The tensor ``(B, *shape)`` to write an argument's gradient into; None where it does not leak."""
        return self.destination(argument)

    def examples_first(self, tensor: Tensor, argument: str) -> Tensor:
        """``tensor``, which lies as ``argument`` does, as a view with its examples in the leading dimension."""
        dim, outer, inner = self.layouts[argument]
        if outer * inner > 1:
            tensor = tensor.unflatten(dim, (outer, tensor.shape[dim] // (outer * inner), inner))
            dim += 1
        return tensor.movedim(dim, 0)

    def positions(self, tensor: Tensor, argument: str) -> Tensor:
        """``tensor``, which lies as ``argument`` does, as ``(B, N, positions, features)``."""
        tensor = self.examples_first(tensor, argument)
        return self.per_leak(tensor.reshape(len(tensor), -1, tensor.shape[-1]))

    def per_leak(self, tensor: Tensor) -> Tensor:
        """``(B · N, …)``, examples first, to ``(B, N, …)``."""
        return tensor.unflatten(0, (self.n_leaks, -1))

    def leaks_first(self, tensor: Tensor, argument: str) -> Tensor:
        """``tensor``, which lies as ``argument`` does, as ``(B, …)``: each leak as if no other had passed."""
        dim, outer, inner = self.layouts[argument]
        apart = tensor.unflatten(dim, (outer, self.n_leaks, -1, inner))
        return apart.movedim(dim + 1, 0).flatten(dim + 1, dim + 3)

    def check_images_outermost(self) -> None:
        """For rules that take the leading dimension for the images'.

        Raises:
            NoRuleError: another dimension is outside of it, as where a model puts two copies of a batch together.
        """
        for argument in ("input", "output"):
            dim, outer, _ = self.layouts.get(argument, Layout())
            if dim != 0 or outer != 1:
                raise NoRuleError("its images are not in its outermost dimension")


Rule = Callable[[Call, Tensor], None]
_RULES: dict[str, Rule] = {}


def gradient_rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by ATen name without overload, such as ``linear``."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def rule_for(kind: str) -> Rule:
    """The rule for an operation; `differentiated` where it has none of its own."""
    return _RULES.get(kind, differentiated)


def differentiated(call: Call, delta: Tensor) -> None:
    """For any operation: autograd differentiates it, for each leak apart; vectorised where the operation can be."""
    outs = {
        argument: out
        for argument, value in call.values.items()
        if isinstance(value, Tensor) and argument not in call.layouts and (out := call.gradient(argument)) is not None
    }
    leaves = {argument: call.values[argument].detach() for argument in outs}
    of_images = {name: call.leaks_first(call.values[name].detach(), name) for name in call.layouts if name != "output"}

    def of_one(images: dict[str, Tensor], its_delta: Tensor) -> dict[str, Tensor]:
        def forward(parameters: dict[str, Tensor]) -> Tensor:
            result: Tensor = applied(call.operation, {**call.values, **images, **parameters})
            return result

        _, pull = vjp(forward, leaves)  # type: ignore[misc]  # three only with has_aux
        made: dict[str, Tensor] = pull(its_delta)[0]
        return made

    deltas = call.leaks_first(delta, "output")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernels
        try:
            found = vmap(of_one)(of_images, deltas)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # some overwrite what they make, which cannot be vectorised
            parts = [of_one({name: x[b] for name, x in of_images.items()}, deltas[b]) for b in range(call.n_leaks)]
            found = {argument: torch.stack([part[argument] for part in parts]) for argument in leaves}
    for argument, out in outs.items():
        out.copy_(found[argument])


def with_members(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, and each member of a list by a name of its own, which a rule sees its gradient wanted by.

    >>> with_members({"equation": "bi,io->bo", "tensors": ["x", "w"]})
    {'equation': 'bi,io->bo', 'tensors': ['x', 'w'], 'tensors[0]': 'x', 'tensors[1]': 'w'}
    """
    lists = {name: value for name, value in arguments.items() if isinstance(value, list | tuple)}
    return {**arguments, **{f"{name}[{n}]": member for name, value in lists.items() for n, member in enumerate(value)}}


def applied(operation: Any, values: Mapping[str, Any]) -> Any:
    """An ATen operation's result, of arguments by name; of what is in lists, by `with_members`."""

    def value(name: str) -> Any:
        found = values[name]
        return [values[f"{name}[{n}]"] for n in range(len(found))] if isinstance(found, list | tuple) else found

    schema = operation._schema.arguments
    positional = [value(a.name) for a in schema if not a.kwarg_only]
    return operation(*positional, **{a.name: value(a.name) for a in schema if a.kwarg_only})


@gradient_rule("linear")
def linear(call: Call, delta: Tensor) -> None:
    """``y = W x + b`` at every position."""
    delta = call.positions(delta, "output")
    if (out := call.gradient("weight")) is not None:
        write_products(delta.transpose(2, 3), call.positions(call.values["input"], "input"), out)
    if (out := call.gradient("bias")) is not None:
        torch.sum(delta, dim=(1, 2), out=out)


@gradient_rule("matmul")
def matmul(call: Call, delta: Tensor) -> None:
    """``y = x W``, a matrix of parameters on the right."""
    if "other" in call.layouts or call.values["other"].dim() != 2:
        differentiated(call, delta)
        return
    if (out := call.gradient("other")) is None:
        return
    x = call.positions(call.values["self"], "self")
    write_products(x.transpose(2, 3), call.positions(delta, "output"), out)


@gradient_rule("conv2d")
def conv2d(call: Call, delta: Tensor) -> None:
    """A convolution of any stride, padding, dilation and groups."""
    call.check_images_outermost()
    if (out := call.gradient("weight")) is not None:
        write_weight_gradient(_convolution(call), delta, out)
    if (out := call.gradient("bias")) is not None:
        torch.sum(call.per_leak(delta.flatten(2)), dim=(1, 3), out=out)


def _convolution(call: Call) -> Convolution:
    values = call.values
    how = (values["stride"], values["padding"], values["dilation"], values["groups"])
    return Convolution(values["input"], values["weight"].shape, *how, call.n_leaks, call.scratch)


@gradient_rule("conv2d_batch_norm")
def conv2d_batch_norm(call: Call, delta: Tensor) -> None:
    """A convolution with the batch norm behind it folded in: ``y = s (W ∗ x + b − μ) + β``, ``s = γ / √(σ² + ε)``.

    With ``H = Σ δ ⊗ x`` over positions the gradients are ``s H`` for ``W``, ``s Σ δ`` for ``b``, ``Σ δ`` for ``β``, and
    for ``γ`` ``(⟨W, H⟩ + (b − μ) Σ δ) / √(σ² + ε)``: the batch norm costs no pass over activations.
    """
    call.check_images_outermost()
    sums = call.per_leak(delta.flatten(2)).sum(dim=(1, 3))
    scale = call.values["scale"]
    if (out := call.gradient("beta")) is not None:
        out.copy_(sums)
    if (out := call.gradient("conv_bias")) is not None:
        torch.mul(sums, scale, out=out)
    weight_out, gamma_out = call.gradient("conv_weight"), call.gradient("gamma")
    if weight_out is None and gamma_out is None:
        return
    weight = call.values["conv_weight"]
    outer = weight.new_empty(call.n_leaks, *weight.shape) if weight_out is None else weight_out
    write_weight_gradient(_convolution(call), delta, outer)
    if gamma_out is not None:
        inner = channel_products(outer.flatten(2), weight.flatten(1))
        torch.mul(inner + call.values["shift"] * sums, call.values["rstd"], out=gamma_out)
    outer.mul_(scale.view(-1, 1, 1, 1))


@gradient_rule("batch_norm")
def batch_norm(call: Call, delta: Tensor) -> None:
    """Batch norm in evaluation mode, an affine map of each channel."""
    call.check_images_outermost()
    values = call.values
    if (out := call.gradient("bias")) is not None:
        torch.sum(_channels(call, delta), dim=(1, 3), out=out)
    if (out := call.gradient("weight")) is not None:
        mean, rstd = values["running_mean"], (values["running_var"] + values["eps"]).rsqrt()
        normalised = (values["input"].movedim(1, -1) - mean).movedim(-1, 1)
        torch.sum(_channels(call, delta * normalised), dim=(1, 3), out=out)
        out.mul_(rstd)


@gradient_rule("group_norm")
def group_norm(call: Call, delta: Tensor) -> None:
    """Group norm: every channel's own scale and shift."""
    call.check_images_outermost()
    if (out := call.gradient("bias")) is not None:
        torch.sum(_channels(call, delta), dim=(1, 3), out=out)
    if (out := call.gradient("weight")) is not None:
        normalised = F.group_norm(call.values["input"], call.values["num_groups"], eps=call.values["eps"])
        torch.sum(_channels(call, delta * normalised), dim=(1, 3), out=out)


def _channels(call: Call, tensor: Tensor) -> Tensor:
    """``(B · N, C, …)`` to ``(B, N, C, positions)``."""
    return call.per_leak(tensor.reshape(*tensor.shape[:2], -1))


@gradient_rule("layer_norm")
def layer_norm(call: Call, delta: Tensor) -> None:
    """Layer norm over the trailing dimensions: every entry's own scale and shift."""
    shape = call.values["normalized_shape"]
    if (out := call.gradient("bias")) is not None:
        torch.sum(_entries(call, delta, "output", len(shape)), dim=(1, 2), out=out)
    if (out := call.gradient("weight")) is not None:
        normalised = F.layer_norm(call.values["input"], shape, eps=call.values["eps"])
        torch.sum(_entries(call, delta * normalised, "output", len(shape)), dim=(1, 2), out=out)


def _entries(call: Call, tensor: Tensor, argument: str, n_kept: int) -> Tensor:
    """``tensor`` as ``(B, N, positions, *its last n_kept dimensions)``."""
    tensor = call.examples_first(tensor, argument)
    return call.per_leak(tensor.reshape(len(tensor), -1, *tensor.shape[-n_kept:]))
