"""The leaked network as a graph for any number of images, with every operation that uses a leaked parameter marked."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.passes import move_to_device_pass
from torch.fx.node import map_arg

from gitlight.architecture import ImageShape
from gitlight.exported import (
    arguments_of,
    draws_random_numbers,
    held_tensors,
    kind_of,
    lifted_constants,
    module_path,
)
from gitlight.gradients import broadcast_gradients  # noqa: F401  # registers its rules
from gitlight.gradients.delta_in_order import is_such_a_norm
from gitlight.gradients.exporting import exported_for_any_number
from gitlight.gradients.in_place import out_of_place
from gitlight.gradients.layer_gradients import NoRuleError, differentiated, rule_for, with_members
from gitlight.gradients.precision import plain_tensor
from gitlight.gradients.selection import depends_on_memory, move_selections, overwritten_inputs
from gitlight.gradients.steps import FoldedNorm, Slot, Step


@dataclass(frozen=True)
class TracedNetwork:
    """A network in three parts.

    Attributes:
        constants: tensors that the network makes for itself, by name.
        held: name in the graph → name of the parameter or buffer in the network.
        prologue: operations on parameters and buffers alone, run once for many images.
        body: the rest, as ``body(recorder, image, externals)``; a step is ``recorder.run(number, *tensors)``.
        steps: the operations that use leaked parameters.
        overwrites: whether the body overwrites anything, images perhaps.
        overwritten: names of constants, and in the graph of parameters and buffers, that may be overwritten.
        makes_integers: whether it takes integers out of real numbers, as of pixels for embeddings.
    """

    constants: Mapping[str, Tensor]
    held: Mapping[str, str]
    prologue: tuple[fx.Node, ...]
    body: Any
    steps: tuple[Step, ...]
    overwrites: bool
    overwritten: frozenset[str]
    makes_integers: bool

    @cached_property
    def has_norms(self) -> bool:
        """Whether it runs norms that `delta_in_order` is for; those that convolutions have absorbed are none."""
        operations = [*(step.operation for step in self.steps), *(node.target for node in self.body.graph.nodes)]
        return any(map(is_such_a_norm, operations))

    def in_precision(self, dtype: torch.dtype) -> "TracedNetwork":
        """The same, with constants of another precision."""
        return replace(self, constants={name: plain_tensor(each, dtype) for name, each in self.constants.items()})


def trace(
    network: nn.Module, leaked: frozenset[str], image_shape: ImageShape, dtype: torch.dtype, device: torch.device
) -> TracedNetwork:
    """Trace a network in its present mode (training or evaluation).

    Args:
        network: images ``(S, C, H, W)`` to logits.
        leaked: names of the parameters whose gradients are wanted, by ``named_parameters``.
        image_shape: ``(C, H, W)``.
        dtype: precision of the images.
        device: where images are.

    Raises:
        NoRuleError: it cannot be traced for any number of images, is random or ties its images together in this mode,
            or an operation uses a leaked parameter in a way that no rule covers. The message names it.
    """
    exported = exported_for_any_number(network, image_shape, dtype)
    if device.type != "cpu":
        exported = move_to_device_pass(exported, str(device))
    held = held_tensors(exported, network)
    images = frozenset(exported.graph_signature.user_inputs)
    out_of_place(exported.graph, images, {name for name, target in held.items() if target in leaked})
    move_selections(exported.graph)
    constants = {name: exported.constants[target].to(device) for name, target in lifted_constants(exported).items()}
    builder = _Builder(held, constants, leaked, images)
    for node in exported.graph.nodes:
        builder.add(node)
    return TracedNetwork(
        constants,
        held,
        tuple(builder.prologue),
        builder.module(),
        tuple(builder.steps),
        depends_on_memory(exported.graph),
        frozenset(overwritten_inputs(exported.graph)) & frozenset({*held, *constants}),
        any(map(_makes_integers, exported.graph.nodes)),
    )


class _Builder:
    """Sorts the nodes of an exported graph into a `TracedNetwork`."""

    def __init__(
        self, held: Mapping[str, str], constants: Mapping[str, Tensor], leaked: frozenset[str], inputs: frozenset[str]
    ) -> None:
        self._external = set(held) | set(constants)
        self._wanted = {name for name, target in held.items() if target in leaked}
        self._inputs = inputs
        self._graph = fx.Graph()
        self._recorder = self._graph.placeholder("recorder")
        self._image = self._graph.placeholder("image")
        self._externals = self._graph.placeholder("externals")
        self._known: dict[fx.Node, fx.Node] = {}
        self._fetched: dict[str, fx.Node] = {}
        self._after_step: set[fx.Node] = set()
        self._folded: dict[fx.Node, fx.Node] = {}
        self.prologue: list[fx.Node] = []
        self.steps: list[Step] = []

    def module(self) -> fx.GraphModule:
        return fx.GraphModule(nn.Module(), self._graph)

    def add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name in self._inputs:
                self._known[node] = self._image
        elif node.op == "output":
            self._graph.output(self._known[node.args[0][0]])  # type: ignore[index]
        elif node.op != "call_function" or not _plain(node.target):
            raise NoRuleError(f"{node.target} of {_place(node)} runs a graph of its own")
        elif _mixes_images(node):
            raise NoRuleError(f"{_place(node)} draws random numbers, or is in training mode")
        elif not any(source in self._known for source in node.all_input_nodes):
            self._external.add(node.name)
            self.prologue.append(node)
            if any(source.name in self._wanted for source in node.all_input_nodes):
                self._wanted.add(node.name)
        elif (norm := _norm_to_fold(node)) is not None and norm.all_input_nodes[0] is node and self._direct(norm):
            self._folded[norm] = node  # the convolution is run with its norm
            self._known[node] = self._known[node.all_input_nodes[0]]
        elif node in self._folded:
            self._step(self._folded[node], norm=node)
        elif any(source.name in self._wanted for source in node.all_input_nodes):
            self._step(node)
        else:
            self._copy(node)

    def _direct(self, norm: fx.Node) -> bool:
        conv = norm.all_input_nodes[0]
        tensors = [*conv.all_input_nodes[1:], *norm.all_input_nodes[1:]]
        held = all(source.op == "placeholder" and source.name in self._external for source in tensors)
        return held and any(source.name in self._wanted for source in tensors)

    def _copy(self, node: fx.Node) -> None:
        target = node.target
        first = node.args[0] if node.args else None
        schema: Any = getattr(target, "_schema", None)
        overwrites = schema is not None and schema.name.endswith("_") and not schema.name.endswith("__")
        # A step without steps before it starts the backward pass; autograd forbids to overwrite such a result.
        starts = isinstance(first, fx.Node) and self._known.get(first) in self._starts()
        if overwrites and starts:
            packet = getattr(torch.ops.aten, schema.name.split("::")[-1].removesuffix("_"))
            target = getattr(packet, schema.overload_name or "default")
        copied = self._graph.create_node(
            "call_function", target, map_arg(node.args, self._value), map_arg(node.kwargs, self._value)
        )
        self._known[node] = copied
        if overwrites and starts:
            former = self._known[first]  # type: ignore[index]
            self._known = {n: copied if known is former else known for n, known in self._known.items()}
        if any(source in self._after_step for source in copied.all_input_nodes):
            self._after_step.add(copied)

    def _starts(self) -> set[fx.Node]:
        return {n for n in self._after_step if not any(s in self._after_step for s in n.all_input_nodes)}

    def _step(self, node: fx.Node, norm: fx.Node | None = None) -> None:
        operation: Any = node.target
        kind = kind_of(node) or str(operation)
        kind = f"{kind}_batch_norm" if norm is not None else kind
        rule = rule_for(kind)
        if _is_complex(node) and self._can_be_divided(node):
            rule = differentiated  # the others are of real numbers
        elif rule is differentiated and not self._can_be_divided(node):
            raise NoRuleError(f"{_place(node)} uses a parameter, and there is no rule for {kind}")
        sources: list[fx.Node] = []

        def slot(source: fx.Node) -> Any:
            if source not in sources:
                sources.append(source)
            return Slot(sources.index(source))

        given = with_members(arguments_of(node))
        arguments = {name: map_arg(value, slot) for name, value in given.items()}
        names = {name: v.name for name, v in given.items() if isinstance(v, fx.Node) and v.name in self._wanted}
        step = Step(_place(node), kind, operation, rule, arguments, [], names)
        step.sources = [None if source in self._known else source.name for source in sources]
        step.symbolic = {
            name: tuple(v.meta["val"].shape)
            for name, v in given.items()
            if isinstance(v, fx.Node) and v in self._known and isinstance(v.meta["val"], Tensor)
        }
        step.symbolic["output"] = tuple(node.meta["val"].shape)
        if norm is not None:
            step.norm = _fold(step, norm, self._wanted)
        computed = [self._value(source) for source in sources if source in self._known]
        run = self._graph.call_method("run", (self._recorder, len(self.steps), *computed))
        self._known[norm if norm is not None else node] = run
        self._after_step.add(run)
        self.steps.append(step)

    def _can_be_divided(self, node: fx.Node) -> bool:
        """Whether an operation can be run for the images of one leak alone.

        It has one result, overwrites nothing, and takes images as tensors, no number of them.
        """
        result, schema = node.meta["val"], getattr(node.target, "_schema", None)
        of_images = [source.meta["val"] for source in node.all_input_nodes if source in self._known]
        tensors = all(isinstance(value, Tensor) for value in of_images)
        has_gradient = isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())
        return has_gradient and tensors and schema is not None and not schema.is_mutable

    def _value(self, node: fx.Node) -> fx.Node:
        if node in self._known:
            return self._known[node]
        if node.name not in self._fetched:
            # All externals are read at the start: values in the middle could come after a use of theirs.
            with self._graph.inserting_after(self._externals):
                self._fetched[node.name] = self._graph.call_function(operator.getitem, (self._externals, node.name))
        return self._fetched[node.name]


def _fold(step: Step, norm: fx.Node, wanted: set[str]) -> FoldedNorm:
    """Turn a convolution's step into that of the convolution and its norm."""
    given = arguments_of(norm)
    step.names = {f"conv_{name}": source for name, source in step.names.items()}
    tensors: dict[str, Any] = {}
    for argument, name in (("gamma", "weight"), ("beta", "bias")):
        tensors[argument] = given[name].name if given[name] is not None else None
        if tensors[argument] in wanted:
            step.names[argument] = tensors[argument]
    mean, variance = given["running_mean"].name, given["running_var"].name
    return FoldedNorm(**tensors, mean=mean, variance=variance, epsilon=given["eps"])


def _norm_to_fold(node: fx.Node) -> fx.Node | None:
    """The batch norm that alone takes a convolution's result."""
    if node.target != torch.ops.aten.conv2d.default or len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.target == torch.ops.aten.batch_norm.default and not arguments_of(user)["training"] else None


def _makes_integers(node: fx.Node) -> bool:
    if kind_of(node) not in ("to", "_to_copy", "type_as"):
        return False
    before, after = node.all_input_nodes[0].meta["val"].dtype, node.meta["val"].dtype
    return bool(before.is_floating_point and not after.is_floating_point and after != torch.bool)


def _is_complex(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor) and node.meta["val"].is_complex()


def _plain(target: Any) -> bool:
    """Whether a node calls an ATen operation or computes with sizes."""
    if isinstance(target, torch._ops.OpOverload):
        return True
    return getattr(target, "__module__", "") in ("_operator", "operator", "math", "builtins", "torch")


def _mixes_images(node: fx.Node) -> bool:
    """Whether a node draws random numbers, or normalises over the batch."""
    name, given = kind_of(node).removesuffix("_"), arguments_of(node)
    if name == "batch_norm":
        return bool(given["training"])
    return draws_random_numbers(node.target, given)


def _place(node: fx.Node) -> str:
    path, name = module_path(node), kind_of(node) or str(node.target)
    return f"{name} {path!r}" if path else f"{name} {node.name!r}"
