"""δ-weighted averages: what a layer's weight and bias gradients together say of its input, without any weight."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, MOVES, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.generators.scaling import StandardisedFeatures

_LARGEST = 10.0
"""Standard deviations beyond which an average is cut off: where ``Σ δ`` nearly vanishes it says nothing."""


_INVERSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda a: torch.logit(a, eps=1e-7),
    "tanh": lambda a: torch.atanh(a.clamp(-1 + 1e-7, 1 - 1e-7)),
}
"""Of activations that squash: units near their bounds differ in what the activation was made of."""


class _Pair(NamedTuple):
    """A weight, and the parameter whose gradient is ``Σ δ`` of its outputs, up to a factor for each.

    Attributes:
        weight: its name.
        bias: the other's.
        n_entries: entries of the average.
        activation: kind of the activation that the average is taken back through: where it is exact, and that squashes.
    """

    weight: str
    bias: str
    n_entries: int
    activation: str


class WeightedAverages(StandardisedFeatures):
    """For each layer the least-squares solution ``c`` of ``∂L/∂W_o = ∂L/∂b_o · c`` over its outputs ``o``.

    ``∂L/∂W_o = Σ_p δ_o(p) patch_p`` and ``∂L/∂b_o = Σ_p δ_o(p)`` (Eqs. (1) and (2) of docs/inversion.md), so ``c`` is
    an average of the patches that the layer saw, weighed by ``δ``. Where the layer has one position, as the last one
    has, ``c`` is its input itself; that the quotient of both gradients is, was seen by Phong et al. 2017 (§3). A
    convolution without a bias takes that of the batch norm behind it. Networks do not learn quotients easily. An input
    that a sigmoid or tanh has made is taken back through it.
    """

    def __init__(self, architecture: Architecture, names: Sequence[str] | None = None) -> None:
        """``names``: averages of layers with these weights alone; None: of all. Sketched weights have none."""
        pairs = _pairs(architecture)
        if names is not None:
            pairs = [pair for pair in pairs if pair.weight in names]
        super().__init__(sum(pair.n_entries for pair in pairs))
        self._pairs = pairs

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, …)`` per parameter to ``(B, n_entries)``, standardised, float32."""
        return super().forward(gradients).clamp(-_LARGEST, _LARGEST)

    def split(self, standardised: Tensor) -> dict[str, Tensor]:
        """The result of `forward` by layer: name of the weight → ``(B, entries)``."""
        parts = standardised.split([pair.n_entries for pair in self._pairs], dim=1)
        return {pair.weight: part for pair, part in zip(self._pairs, parts, strict=True)}

    def features(self, gradients: Gradients) -> Tensor:
        """The averages, ``(B, n_entries)``; zero where ``Σ δ`` is zero for all outputs."""
        if not self._pairs:
            first = next(iter(gradients.values()))
            return first.new_zeros(len(first), 0, dtype=torch.float32)
        found = []
        for pair in self._pairs:
            # In double precision, and relative to their size: squares of small gradients would vanish.
            delta = gradients[pair.bias].double()
            size = delta.norm(dim=1, keepdim=True).clamp_min(1e-300)
            delta = delta / size
            weight = gradients[pair.weight].flatten(2).double()
            average = torch.einsum("bo,boi->bi", delta, weight) / size
            if pair.activation:
                average = _INVERSES[pair.activation](average)
            found.append(torch.where(size > 1e-300, average, 0.0).float())
        return torch.nan_to_num(torch.cat(found, dim=1))


def _pairs(architecture: Architecture) -> list[_Pair]:
    norms = {layer.inputs[0]: layer for layer in architecture.layers if layer.kind == "batch_norm"}
    uses: dict[str, int] = {}
    for layer in architecture.layers:
        for name in layer.parameters.values():
            uses[name] = uses.get(name, 0) + 1
    found = []
    for layer in architecture.layers:
        weight, bias = layer.parameters.get("weight"), _bias(layer, norms)
        plain = layer.kind in ("linear", "conv2d") and layer.arguments.get("groups", 1) == 1
        if not plain or weight is None or bias is None or uses[weight] > 1 or uses[bias] > 1:
            continue
        if weight not in architecture.sketched and bias not in architecture.sketched:
            shape = architecture.parameter_shapes[weight]
            one_position = prod(layer.output_shape) == shape[0]
            activation = _activation_below(architecture, layer) if one_position else ""
            found.append(_Pair(weight, bias, shape[1:].numel(), activation))
    return found


def _activation_below(architecture: Architecture, layer: Layer) -> str:
    """The kind of the activation whose output is a layer's input; empty if it has no inverse here."""
    name = layer.inputs[0]
    while name != IMAGE:
        producer = architecture[name]
        if producer.kind not in MOVES or len(producer.inputs) != 1:
            return producer.kind if producer.kind in _INVERSES else ""
        name = producer.inputs[0]
    return ""


def _bias(layer: Layer, norms: Mapping[str, Layer]) -> str | None:
    norm = norms.get(layer.name)
    return layer.parameters.get("bias") or (None if norm is None else norm.parameters.get("bias"))
