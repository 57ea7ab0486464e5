"""Operations of a traced network that use leaked parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from gitlight.gradients.frozen_convolutions import frozen_conv2d
from gitlight.gradients.layer_gradients import Layout, Rule, applied
from gitlight.gradients.products import frozen_linear


@dataclass(frozen=True)
class Slot:
    """Where an argument's value is among the tensors that a step is given."""

    position: int


@dataclass(frozen=True)
class FoldedNorm:
    """The batch norm that a convolution absorbs: names of its tensors in the graph; None where it has none."""

    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    epsilon: float


@dataclass
class Step:
    """An operation that uses leaked parameters.

    Attributes:
        place: the operation and its module, for messages.
        kind: its name, by which its rule is found.
        operation: the ATen operation.
        arguments: by name; a `Slot` where the value is given at run time.
        sources: for each slot, the external tensor's name; None for what is computed from images.
        names: argument → external tensor whose gradient is wanted.
        norm: a batch norm folded into a convolution.
        layouts: argument → where its examples are; found by `captured.CapturedGradients`.
        symbolic: the same arguments' symbolic shapes.
    """

    place: str
    kind: str
    operation: Any
    rule: Rule
    arguments: dict[str, Any]
    sources: list[str | None]
    names: dict[str, str]
    norm: FoldedNorm | None = None
    symbolic: dict[str, Sequence[Any]] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)

    def bind(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """The arguments with their values."""
        bound = map_aggregate(self.arguments, lambda a: tensors[a.position] if isinstance(a, Slot) else a)
        return dict(bound)

    def apply(self, values: Mapping[str, Any]) -> Tensor:
        """The operation's result."""
        if self.operation == torch.ops.aten.linear.default:
            return frozen_linear(values["input"], values["weight"], values["bias"])
        if self.operation == torch.ops.aten.conv2d.default:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            return frozen_conv2d(*(values[name] for name in names))
        result: Tensor = applied(self.operation, values)
        return result

    def folded(self, externals: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a convolution's rule and result need once it has absorbed its norm.

        Args:
            externals: the graph's tensors by name, detached.
        """
        norm = self.norm
        assert norm is not None
        weight, bias = (externals.get(self._source(name)) for name in ("weight", "bias"))
        assert weight is not None
        mean, rstd = externals[norm.mean], (externals[norm.variance] + norm.epsilon).rsqrt()
        scale = rstd if norm.gamma is None else rstd * externals[norm.gamma]
        shift = -mean if bias is None else bias - mean
        folded_bias = shift * scale if norm.beta is None else torch.addcmul(externals[norm.beta], shift, scale)
        values = {"conv_weight": weight, "scale": scale, "rstd": rstd, "shift": shift}
        return values | {"weight": weight * scale.view(-1, 1, 1, 1), "bias": folded_bias}

    def _source(self, argument: str) -> str:
        slot = self.arguments[argument]
        return (self.sources[slot.position] or "") if slot is not None else ""
