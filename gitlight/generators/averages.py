"""δ-weighted averages: what a layer's weight and bias gradients together say of its input, without any weight."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, MOVES, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.generators.scaling import StandardisedFeatures
from gitlight.gradients.precision import full_float32

_LARGEST = 10.0
"""Standard deviations beyond which an average is cut off: where ``Σ δ`` nearly vanishes it says nothing."""

_ROUNDING = 100.0
"""``‖∂L/∂b‖ / ‖∂L/∂W‖``, in units of the gradients' precision, up to which ``Σ δ`` is taken for rounding: some biases
have no gradient at all, such as those of attention's keys."""


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
    convolution without a bias takes that of the batch norm behind it (with running statistics), which is right up to a
    factor for each output. Networks do not learn quotients easily. An input of one image that a sigmoid or tanh has
    made is taken back through it.
    """

    def __init__(
        self,
        architecture: Architecture,
        client_batch_size: int,
        names: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        """Find the layers.

        Args:
            architecture: the leaked model's. Sketched weights have no average.
            client_batch_size: images per leak.
            names: weights whose layers alone are wanted; None: all.
            limit: entries at most, those of the smallest layers first; None: no limit.
        """
        pairs = [pair for pair in _pairs(architecture, client_batch_size) if names is None or pair.weight in names]
        if limit is not None:
            pairs = _smallest(pairs, limit)
        sizes = [pair.n_entries for pair in pairs]
        super().__init__(sum(sizes), sizes)
        self._pairs = pairs

    @property
    def n_layers(self) -> int:
        """How many layers have an average."""
        return len(self._pairs)

    def standardise(self, features: Tensor) -> Tensor:
        """Averages to mean 0 and standard deviation 1, cut off where they are far away."""
        return super().standardise(features).clamp(-_LARGEST, _LARGEST)

    def split(self, averages: Tensor) -> dict[str, Tensor]:
        """The result of `forward` or `features` by layer: name of the weight → ``(B, entries)``."""
        parts = averages.split([pair.n_entries for pair in self._pairs], dim=1)
        return {pair.weight: part for pair, part in zip(self._pairs, parts, strict=True)}

    def smallest(self, limit: int) -> tuple[str, ...]:
        """The weights of the smallest layers, whose averages have at most ``limit`` entries together."""
        return tuple(pair.weight for pair in _smallest(self._pairs, limit))

    def features(self, gradients: Gradients) -> Tensor:
        """The averages, ``(B, n_entries)``; zero where ``Σ δ`` is zero for all outputs, but for rounding."""
        if not self._pairs:
            first = next(iter(gradients.values()))
            return first.new_zeros(len(first), 0, dtype=torch.float32)
        device = next(iter(gradients.values())).device
        with torch.autocast(device.type, enabled=False), full_float32():
            found = [self._average(pair, gradients) for pair in self._pairs]
        return torch.nan_to_num(torch.cat(found, dim=1))

    def _average(self, pair: _Pair, gradients: Gradients) -> Tensor:
        # Sizes in double precision: squares of small gradients would vanish. Products in the gradients' own: they are
        # no more exact than that, and a copy of all weights' in double takes longer than all else.
        delta, weight = gradients[pair.bias], gradients[pair.weight].flatten(2)
        size = torch.linalg.vector_norm(delta, dim=1, keepdim=True, dtype=torch.float64).clamp_min(1e-300)
        least = torch.linalg.vector_norm(weight, dim=(1, 2), dtype=torch.float64)
        least = _ROUNDING * torch.finfo(weight.dtype).eps * least
        unit = (delta / size).to(weight.dtype)
        average = (unit.unsqueeze(1) @ weight).squeeze(1) / size
        if pair.activation:
            average = _INVERSES[pair.activation](average)
        says_something = size > least.unsqueeze(1).clamp_min(1e-300)
        return torch.where(says_something, average, 0.0).float()


def _smallest(pairs: Sequence[_Pair], limit: int) -> list[_Pair]:
    """Those of the smallest layers that have at most ``limit`` entries together, in their order."""
    fitting, total = set(), 0
    for pair in sorted(pairs, key=lambda pair: pair.n_entries):
        total += pair.n_entries
        if total <= limit:
            fitting.add(pair.weight)
    return [pair for pair in pairs if pair.weight in fitting]


def _pairs(architecture: Architecture, client_batch_size: int) -> list[_Pair]:
    consumers: dict[str, list[Layer]] = defaultdict(list)
    for layer in architecture.layers:
        for name in layer.inputs:
            consumers[name].append(layer)
    uses = Counter(name for layer in architecture.layers for name in layer.parameters.values())
    found = []
    for layer in architecture.layers:
        weight, bias = layer.parameters.get("weight"), _bias(layer, consumers[layer.name])
        plain = layer.kind in ("linear", "conv2d") and layer.arguments.get("groups", 1) == 1
        plain = plain and bool(layer.inputs)  # others are of parameters alone, as where these make weights
        if not plain or weight is None or bias is None or uses[weight] > 1 or uses[bias] > 1:
            continue
        if weight not in architecture.sketched and bias not in architecture.sketched:
            shape = architecture.parameter_shapes[weight]
            exact = client_batch_size == 1 and prod(layer.output_shape) == shape[0]
            found.append(
                _Pair(weight, bias, shape[1:].numel(), _activation_below(architecture, layer) if exact else "")
            )
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


def _bias(layer: Layer, consumers: Sequence[Layer]) -> str | None:
    """The parameter whose gradient is ``Σ δ`` of a layer's outputs, up to a factor for each."""
    norms = [consumer for consumer in consumers if consumer.kind == "batch_norm"]
    if any(norm.arguments["training"] for norm in norms):
        return None  # batch statistics take the mean out of δ: the bias' gradient is rounding, the norm's another sum
    if "bias" in layer.parameters:
        return layer.parameters["bias"]
    return norms[0].parameters.get("bias") if len(norms) == len(consumers) == 1 else None
