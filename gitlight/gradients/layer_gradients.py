"""Rules: the gradient per leak of one operation's parameters, from its input and the gradient δ of its output.

A rule is a function with the decorator `gradient_rule`, which takes the operation's name as `torch.export` gives it. It
gets a `Call` and δ, and writes ``(B, *parameter.shape)`` for each parameter that leaks::

    @gradient_rule("prelu")
    def prelu(call: Call, delta: Tensor) -> None:
        if (out := call.gradient("weight")) is not None:  # one slope a channel
            products = (delta * call.values["self"].clamp(max=0)).flatten(2)
            torch.sum(call.per_leak(products), dim=(1, 3), out=out)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
        values: the operation's arguments by name; parameters are detached.
        layouts: where the arguments that depend on the images, and ``output``, have their examples.
        n_leaks: ``B``.
        destination: argument → tensor ``(B, *shape)`` to write its gradient into; None where it does not leak.
    """

    kind: str
    values: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    n_leaks: int
    destination: Callable[[str], Tensor | None]

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


def rule_for(kind: str) -> Rule | None:
    """The rule for an operation; None where there is none."""
    return _RULES.get(kind)


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
    if (out := call.gradient("other")) is None or call.values["other"].dim() != 2:
        raise NoRuleError("a product with parameters that are not a matrix on the right")
    x = call.positions(call.values["self"], "self")
    write_products(x.transpose(2, 3), call.positions(delta, "output"), out)


@gradient_rule("conv2d")
def conv2d(call: Call, delta: Tensor) -> None:
    """A convolution of any stride, padding, dilation and groups."""
    call.check_images_outermost()
    if (out := call.gradient("weight")) is not None:
        write_convolution(call, delta, out)
    if (out := call.gradient("bias")) is not None:
        torch.sum(call.per_leak(delta.flatten(2)), dim=(1, 3), out=out)


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
    write_convolution(call, delta, outer)
    if gamma_out is not None:
        inner = channel_products(outer.flatten(2), weight.flatten(1))
        torch.mul(inner + call.values["shift"] * sums, call.values["rstd"], out=gamma_out)
    outer.mul_(scale.view(-1, 1, 1, 1))


def write_convolution(call: Call, delta: Tensor, out: Tensor) -> None:
    """Write the gradient of a convolution's weight: by oneDNN, or as the product of δ with the unfolded input."""
    groups = call.values["groups"]
    if groups == 1 and _prefers_onednn(call, delta):
        out.copy_(_grouped_weight_gradient(call, delta).view_as(out))
        return
    if groups == 1 and _prefers_channels_last(call, delta):
        unfolded = call.per_leak(_unfolded_channels_last(call))
        product = out.new_empty(call.n_leaks, delta.shape[1], unfolded.shape[3])
        write_products(call.per_leak(delta.flatten(2)), unfolded, product)
        height, width = out.shape[3:]
        out.copy_(product.unflatten(2, (height, width, -1)).permute(0, 1, 4, 2, 3))
        return
    unfolded = call.per_leak(_unfolded(call)).unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)
    delta = call.per_leak(delta.flatten(2)).unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)
    write_products(delta, unfolded.transpose(2, 3), out.view(len(delta), delta.shape[2], -1))


def _prefers_onednn(call: Call, delta: Tensor) -> bool:
    """Whether channels fill the vectors of oneDNN's kernels, and there are positions enough to sum over."""
    weight, positions = call.values["weight"], delta.shape[2] * delta.shape[3]
    wide = min(weight.shape[:2]) >= 16 and positions >= max(64, weight.shape[0] // 2) and delta.shape[3] >= 8
    fits = delta.device.type == "cpu" and delta.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return wide and fits and not isinstance(call.values["padding"], str)


def _grouped_weight_gradient(call: Call, delta: Tensor) -> Tensor:
    """All leaks as the groups of one convolution, whose weight has their gradients: ``(B · O, I, height, width)``."""
    values = call.values
    x, delta = (call.per_leak(part).transpose(0, 1).flatten(1, 2) for part in (values["input"], delta))
    shape = (delta.shape[1], *values["weight"].shape[1:])
    settings = (values["stride"], values["padding"], values["dilation"], False, [0, 0], call.n_leaks)
    # Of the weight only the shape is read.
    placeholder = x.new_empty(1).expand(shape)
    wanted = [False, True, False]
    result: Tensor = torch.ops.aten.convolution_backward(delta, x, placeholder, None, *settings, wanted)[1]
    return result


def _prefers_channels_last(call: Call, delta: Tensor) -> bool:
    """Whether runs of ``kernel width · channels`` are so much longer than rows that reordering the result pays."""
    weight, columns = call.values["weight"], delta.shape[3]
    small = 4 * weight.shape[0] <= delta.shape[2] * columns
    return small and columns <= 8 <= weight.shape[1] and weight.shape[3] >= 5 and call.values["dilation"][1] == 1


def _unfolded_channels_last(call: Call) -> Tensor:
    """A convolution's input as ``(S, positions, kernel · channels)``, channels last."""
    values = call.values
    (height, width), (down, right), below = values["weight"].shape[2:], values["stride"], values["dilation"][0]
    x = _padded(values["input"], values["padding"], below * (height - 1), width - 1).permute(0, 2, 3, 1).contiguous()
    rows = (x.shape[1] - below * (height - 1) - 1) // down + 1
    columns = (x.shape[2] - width) // right + 1
    image, row, column, channel = x.stride()
    shape = (len(x), rows, columns, height, width * x.shape[3])
    strides = (image, down * row, right * column, below * row, channel)
    return x.as_strided(shape, strides).reshape(len(x), rows * columns, -1)


def _unfolded(call: Call) -> Tensor:
    """A convolution's input as ``(S, channels · kernel, positions)``: what each weight meets at each position."""
    values = call.values
    (height, width), (down, right), (below, beside) = values["weight"].shape[2:], values["stride"], values["dilation"]
    x = _padded(values["input"], values["padding"], below * (height - 1), beside * (width - 1))
    if height == width == 1:
        return x[:, :, ::down, ::right].flatten(2)
    # One copy of an overlapping view: two to four times as fast as `F.unfold` on a CPU.
    rows = (x.shape[2] - below * (height - 1) - 1) // down + 1
    columns = (x.shape[3] - beside * (width - 1) - 1) // right + 1
    image, channel, row, column = x.stride()
    shape = (*x.shape[:2], height, width, rows, columns)
    strides = (image, channel, below * row, beside * column, down * row, right * column)
    return x.as_strided(shape, strides).reshape(len(x), -1, rows * columns)


def _padded(x: Tensor, padding: Any, extra_rows: int, extra_columns: int) -> Tensor:
    """The padded input; ``same`` may put one more at the end than at the start."""
    if padding == "same":
        above, left = extra_rows // 2, extra_columns // 2
        return F.pad(x, (left, extra_columns - left, above, extra_rows - above))
    above, left = (0, 0) if padding == "valid" else padding
    return F.pad(x, (left, left, above, above)) if above or left else x


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


@gradient_rule("expand")
def expand(call: Call, delta: Tensor) -> None:
    """A parameter repeated for every image, such as a class token."""
    if (out := call.gradient("self")) is not None:
        write_broadcast(call, delta, call.values["self"].shape, out)


def write_broadcast(call: Call, delta: Tensor, shape: torch.Size, out: Tensor) -> None:
    """Write the gradient of a parameter that was broadcast to the output's shape: δ summed over what was repeated."""
    dim, outer, inner = call.layouts["output"]
    padded = (1,) * (delta.dim() - len(shape)) + tuple(shape)
    if outer * inner > 1 or padded[dim] != 1:
        raise NoRuleError("a parameter that is not the same for every image")
    repeated = [d for d in range(delta.dim()) if padded[d] == 1 and delta.shape[d] > 1 and d != dim]
    if repeated:
        delta = delta.sum(dim=repeated, keepdim=True)
    torch.sum(call.per_leak(delta.movedim(dim, 0)).reshape(call.n_leaks, -1, *shape), dim=1, out=out)
