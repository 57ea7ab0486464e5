"""`Layer`: one operation of a leaked model, without its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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

        >>> from torch import nn
        >>> from gitlight.architecture import Architecture
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
        if self.kind == "hardsigmoid":
            # PyTorch has no second derivative of it, which whatever descends on gradients takes.
            return nn.functional.hardtanh(inputs[0] + 3, 0.0, 6.0) / 6
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
