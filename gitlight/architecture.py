"""`Architecture`: the structure of a leaked model without its weights. All that a generator is ever built from."""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from gitlight.errors import ArchitectureError

ImageShape = tuple[int, int, int]

ELEMENTWISE = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU)
"""Activation functions that act on each entry alone."""

RESHAPES: tuple[Any, ...] = (nn.Flatten, nn.Identity, torch.flatten, "flatten", "view", "reshape")
"""Modules, functions and tensor methods that move entries without changing them."""


@dataclass(frozen=True)
class Layer:
    """One step of a model that is a chain: where it is, what it does, and its shapes without the batch dimension.

    Attributes:
        name: the module's name in the model, or the name of the function's node in the traced graph.
        operation: the module (parameters on the ``meta`` device, so without values), the function, or the name of
            the tensor method.
        parameters: names of the step's own parameters in ``named_parameters()``; empty for activations and the like.
        input_shape: shape of one example's input.
        output_shape: shape of one example's output.
    """

    name: str
    operation: Any
    parameters: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The operation's name, for messages."""
        operation = self.operation
        if isinstance(operation, nn.Module):
            return type(operation).__name__
        return operation if isinstance(operation, str) else f"{operation.__module__}.{operation.__name__}"

    def is_one_of(self, kinds: tuple[Any, ...]) -> bool:
        """Whether the operation is among ``kinds``: module classes, functions, names of tensor methods."""
        if isinstance(self.operation, nn.Module):
            return isinstance(self.operation, tuple(kind for kind in kinds if isinstance(kind, type)))
        return any(self.operation is kind or self.operation == kind for kind in kinds)


@dataclass(frozen=True)
class Architecture:
    """A leaked model's structure: its traced graph on the ``meta`` device, names, shapes. No weight is in it.

    The attacker of the threat model knows the architecture and not the parameters; generators are handed this object
    and nothing else, so that they cannot use what the attacker does not have.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Sigmoid(), nn.Linear(5, 2))
    >>> architecture = Architecture.of(model, image_shape=(3, 2, 2), n_classes=2)
    >>> dict(architecture.parameter_shapes)["1.weight"]
    torch.Size([5, 12])
    >>> [layer.kind for layer in architecture.chain()]
    ['Flatten', 'Linear', 'Sigmoid', 'Linear']

    Attributes:
        graph: the model traced by ``torch.fx``, parameters and buffers on the ``meta`` device; every node carries its
            shape for a batch of one in ``node.meta["tensor_meta"]``.
        parameter_shapes: name → shape of each parameter that has a gradient, in the model's order.
        image_shape: ``(C, H, W)`` of the model's input.
        n_classes: number of labels.
    """

    graph: fx.GraphModule
    parameter_shapes: Mapping[str, torch.Size]
    image_shape: ImageShape
    n_classes: int

    @classmethod
    def of(cls, model: nn.Module, image_shape: ImageShape, n_classes: int) -> "Architecture":
        """Strip a model of its weights and trace it.

        Args:
            model: the leaked network; it is copied, not changed.
            image_shape: ``(C, H, W)`` of one input image.
            n_classes: number of labels.

        Raises:
            ArchitectureError: ``torch.fx`` cannot trace the model, or an image of this shape does not fit it.
        """
        bare = copy.deepcopy(model).to("meta", torch.float32).eval()
        name = type(model).__name__
        try:
            graph = fx.symbolic_trace(bare)
        except Exception as error:  # torch.fx raises whatever the traced code raises on a proxy
            raise ArchitectureError(
                f"{name} cannot be traced by torch.fx: {error} "
                "Models with control flow that depends on values cannot be inverted layer by layer."
            ) from error
        try:
            ShapeProp(graph).propagate(torch.empty(1, *image_shape, device="meta"))
        except RuntimeError as error:
            raise ArchitectureError(
                f"{name} does not accept an image of shape {image_shape} (channels, height, width): "
                f"{str(error.__cause__ or error).splitlines()[0]}"
            ) from error
        shapes = {key: p.shape for key, p in model.named_parameters() if p.requires_grad or not _any_trainable(model)}
        return cls(graph, MappingProxyType(shapes), image_shape, n_classes)

    @property
    def n_parameters(self) -> int:
        """Number of entries of one gradient."""
        return sum(shape.numel() for shape in self.parameter_shapes.values())

    @property
    def n_activations(self) -> int:
        """Number of entries of all intermediate results for one image."""
        return sum(_shape(node).numel() for node in self.graph.graph.nodes if "tensor_meta" in node.meta)

    def chain(self) -> tuple[Layer, ...]:
        """The model's steps from input to output, if it is a chain: each step has one input, the step before.

        Raises:
            ArchitectureError: a step joins or splits branches (a residual sum, attention, a concatenation); the
                message names it and its place.
        """
        layers: list[Layer] = []
        modules = dict(self.graph.named_modules())
        nodes = [node for node in self.graph.graph.nodes if node.op != "output"]
        for before, node in itertools.pairwise(nodes):
            if node.all_input_nodes != [before]:
                raise ArchitectureError(
                    f"{node.name} ({node.op} {node.target}), step {len(layers) + 1} of the leaked model, does not take "
                    f"the step before it as its only input: inputs {[n.name for n in node.all_input_nodes]}. "
                    "This generator handles models whose layers follow one another; "
                    "mlp handles every leaked model: generator.name=mlp."
                )
            module = node.op == "call_module"
            operation = modules[node.target] if module else node.target
            owned = [f"{node.target}.{key}" for key, _ in operation.named_parameters()] if module else []
            layers.append(
                Layer(
                    name=node.target if module else node.name,
                    operation=operation,
                    parameters=tuple(key for key in owned if key in self.parameter_shapes),
                    input_shape=tuple(_shape(before)[1:]),
                    output_shape=tuple(_shape(node)[1:]),
                )
            )
        return tuple(layers)


def _any_trainable(model: nn.Module) -> bool:
    # A frozen leaked model (requires_grad off everywhere) still leaks the gradients of all its parameters.
    return any(p.requires_grad for p in model.parameters())


def _shape(node: fx.Node) -> torch.Size:
    shape = node.meta["tensor_meta"].shape
    assert isinstance(shape, torch.Size)
    return shape
