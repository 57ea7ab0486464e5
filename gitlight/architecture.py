"""`Architecture`: the structure of a leaked model without its weights. All that a generator is ever built from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from gitlight.exported import arguments_of, export_bare, held_tensors, kind_of, lifted_constants, module_path

ImageShape = tuple[int, int, int]

IMAGE = "image"
"""What stands for the model's input among the inputs of a `Layer`."""

ELEMENTWISE = ("sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu")
"""Kinds of activation functions: each entry of the output depends on the same entry of the input alone."""

MOVES = (
    *("flatten", "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unflatten", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "expand", "select", "slice", "alias", "detach", "narrow", "dropout", "feature_dropout"),
)
"""Kinds that move entries without changing them (dropout does nothing in evaluation mode)."""


@dataclass(frozen=True)
class Layer:
    """One operation of a model: what it is, where it is, what it takes, and its shapes without the batch dimension.

    Attributes:
        name: the path of the module that it is, or, where a module does several things, that path and the operation.
        kind: the operation's ATen name, such as ``conv2d``, ``linear``, ``relu``, ``add``.
        operation: the ATen operation itself.
        arguments: the operation's other arguments by name, such as ``stride``; defaults included.
        inputs: names of the layers (or `IMAGE`) whose results it takes, in order.
        roles: how each tensor among the arguments is called there, in order of ``inputs``; a list's entries share one.
        parameters: argument name → name of the parameter, for parameters whose gradient leaks.
        constants: argument name → name, for buffers and parameters whose gradient does not leak; values unknown.
        weight_shape: shape of the argument ``weight``; empty where there is none.
        input_shapes: one example's shape of each input.
        batch_first: whether each input was traced with a batch of one in front of that shape; otherwise the shape is
            all of it, and the batch of one within.
        output_shape: one example's shape of the result; empty for operations with several results.
    """

    name: str
    kind: str
    operation: Any
    arguments: Mapping[str, Any]
    inputs: tuple[str, ...]
    roles: tuple[str, ...]
    parameters: Mapping[str, str]
    constants: Mapping[str, str]
    weight_shape: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    batch_first: tuple[bool, ...]
    output_shape: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layer":
        return self  # nothing in it changes, and mapping proxies cannot be copied

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The first input's shape."""
        return self.input_shapes[0]

    @property
    def place(self) -> str:
        """The layer in words, for messages.

        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> Architecture.of(model, (3, 2, 2), 2).layers[1].place
        "linear '1'"
        """
        return f"{self.kind} {self.name!r}"

    def as_traced(self, examples: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of one example, ``(*input_shape)`` each, with the batch of one where the model has it."""
        return [one.unsqueeze(0) if first else one for one, first in zip(examples, self.batch_first, strict=True)]

    def apply(self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """The operation's result; an operation in place leaves its inputs alone.

        Args:
            inputs: ``(1, *input_shape)`` each, or ``(B, …)`` for an operation whose arguments name no batch size.
            weights: parameter or buffer name → value, for all of ``parameters`` and ``constants``.
        """
        if self.kind == "getitem":
            picked: Tensor = inputs[0][self.arguments["1"]]
            return picked
        if self.operation._schema.is_mutable:
            inputs = [value.clone() for value in inputs]
        given: dict[str, Any] = dict(self.arguments)
        given |= {role: weights[name] for role, name in (*self.parameters.items(), *self.constants.items())}
        for role, value in zip(self.roles, inputs, strict=True):
            if isinstance(self.arguments.get(role), list):
                given[role] = [*(v for v in given[role] if v is not None), value]
            else:
                given[role] = value
        positional = [a for a in self.operation._schema.arguments if not a.kwarg_only]
        keywords = {a.name: given[a.name] for a in self.operation._schema.arguments if a.kwarg_only}
        result: Tensor = self.operation(*(given[a.name] for a in positional), **keywords)
        return result


@dataclass(frozen=True)
class Architecture:
    """A leaked model's structure: its operations, names, shapes. No weight is in it.

    The attacker of the threat model knows the architecture and not the parameters; generators are handed this object
    and nothing else, so that they cannot use what the attacker does not have.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Sigmoid(), nn.Linear(5, 2))
    >>> architecture = Architecture.of(model, image_shape=(3, 2, 2), n_classes=2)
    >>> dict(architecture.parameter_shapes)["1.weight"]
    torch.Size([5, 12])
    >>> [layer.kind for layer in architecture.layers]
    ['flatten', 'linear', 'sigmoid', 'linear']

    Attributes:
        layers: every operation, each after those whose results it takes.
        output: name of the layer that puts out the logits.
        parameter_shapes: name → shape of each parameter that has a gradient, in the model's order.
        image_shape: ``(C, H, W)`` of the model's input.
        n_classes: number of labels.
        sketched: name → shape of those gradients that reach the generator as a sketch.
        sketch_digest: a hash of the sketch; empty without one.
    """

    layers: tuple[Layer, ...]
    output: str
    parameter_shapes: Mapping[str, torch.Size]
    image_shape: ImageShape
    n_classes: int
    sketched: Mapping[str, torch.Size] = field(default_factory=dict)
    sketch_digest: bytes = b""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Architecture":
        return self  # as its layers

    @classmethod
    def of(cls, model: nn.Module, image_shape: ImageShape, n_classes: int) -> "Architecture":
        """Strip a model of its weights and trace it, in evaluation mode.

        Args:
            model: the leaked network; it is copied, not changed.
            image_shape: ``(C, H, W)`` of one input image.
            n_classes: number of labels.

        Raises:
            ArchitectureError: ``torch.export`` cannot trace the model, or an image of this shape does not fit it.
        """
        exported = export_bare(model, image_shape)
        # A frozen leaked model (requires_grad off everywhere) still leaks the gradients of all its parameters.
        is_frozen = not any(p.requires_grad for p in model.parameters())
        shapes = {key: p.shape for key, p in model.named_parameters() if p.requires_grad or is_frozen}
        layers, output = _layers(exported, frozenset(shapes), model)
        return cls(layers, output, MappingProxyType(shapes), image_shape, n_classes)

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name; KeyError where there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def results(self, image: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """What every layer puts out for one image.

        Args:
            image: ``(C, H, W)``.
            weights: parameter or constant name → value. Layers that need others, and what follows from them, are left
                out.

        Returns:
            name of the layer, or `IMAGE` → its result as traced, with a batch of one in front or wherever the model
            moves it; for operations with several results their list.
        """
        found: dict[str, Any] = {IMAGE: image.unsqueeze(0)}
        for layer in self.layers:
            needed = (*layer.parameters.values(), *layer.constants.values())
            if all(name in weights for name in needed) and all(name in found for name in layer.inputs):
                found[layer.name] = layer.apply([found[name] for name in layer.inputs], weights)
        return found

    @property
    def n_parameters(self) -> int:
        """Number of entries of one gradient."""
        return sum(shape.numel() for shape in self.parameter_shapes.values())

    @property
    def gradient_shapes(self) -> Mapping[str, torch.Size]:
        """Name → shape of each gradient as the generator gets it: that of the parameter, or of its sketch."""
        return {name: self.sketched.get(name, shape) for name, shape in self.parameter_shapes.items()}

    @property
    def n_activations(self) -> int:
        """Number of entries of the image and of all intermediate results that are not views of others."""
        computed = (prod(layer.output_shape) for layer in self.layers if layer.kind not in MOVES)
        return prod(self.image_shape) + sum(computed)

    @property
    def chain_break(self) -> Layer | None:
        """The first layer that does not take the one before as its only input; None for a chain."""
        before = IMAGE
        for layer in self.layers:
            if layer.inputs != (before,):
                return layer
            before = layer.name
        return None


def _layers(exported: Any, leaked: frozenset[str], model: nn.Module) -> tuple[tuple[Layer, ...], str]:
    """The exported graph's tensor operations as layers, and the name of the one that is put out."""
    held = held_tensors(exported, model) | lifted_constants(exported)
    nodes = [node for node in exported.graph.nodes if node.op == "call_function" and _makes_tensors(node)]
    owners = Counter(module_path(node) for node in nodes)
    names = {node: node.name for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs}
    names = dict.fromkeys(names, IMAGE)
    layers = []
    for node in nodes:
        path = module_path(node)
        alone = path and owners[path] == 1
        names[node] = path if alone else ".".join(part for part in (path, node.name) if part)
        layers.append(_layer(node, names, held, leaked))
    (result,) = (node for node in exported.graph.nodes if node.op == "output")
    output = names[result.args[0][0]]
    return tuple(layers), output


def _layer(node: fx.Node, names: Mapping[fx.Node, str], held: Mapping[str, str], leaked: frozenset[str]) -> Layer:
    operation: Any = node.target
    inputs: list[fx.Node] = []
    roles: list[str] = []
    parameters: dict[str, str] = {}
    constants: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    weight_shape: tuple[int, ...] = ()
    for role, value in arguments_of(node).items():
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            if not isinstance(one, fx.Node):
                continue
            if one in names:
                inputs.append(one)
                roles.append(role)
            else:
                own = held.get(one.name, one.name)
                (parameters if own in leaked else constants)[role] = own
                if role == "weight":
                    weight_shape = tuple(one.meta["val"].shape)
        cleaned = [None if isinstance(one, fx.Node) else one for one in values]
        arguments[role] = cleaned if isinstance(value, list | tuple) else cleaned[0]
    return Layer(
        name=names[node],
        kind=kind_of(node).removesuffix("_") or "getitem",
        operation=operation,
        arguments=MappingProxyType(arguments),
        inputs=tuple(names[one] for one in inputs),
        roles=tuple(roles),
        parameters=MappingProxyType(parameters),
        constants=MappingProxyType(constants),
        weight_shape=weight_shape,
        input_shapes=tuple(_shape(one) for one in inputs),
        batch_first=tuple(isinstance(v := one.meta["val"], Tensor) and v.shape[:1] == (1,) for one in inputs),
        output_shape=_shape(node),
    )


def _makes_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value))


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return ()
    # Traced with a batch of one image. Attention moves the batch dimension to the second place; all is shape then.
    return tuple(int(size) for size in (value.shape[1:] if value.shape[:1] == (1,) else value.shape))
