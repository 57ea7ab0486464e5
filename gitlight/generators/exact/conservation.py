"""A conservation law of back-propagation that gives leaked weights from gradients alone.

Euler's theorem for homogeneous functions: where ``a = σ(z)`` with ``σ(t·z) = t·σ(z)`` for ``t > 0`` (ReLU, leaky ReLU,
max and average pooling, and everything that only moves entries), ``Σ δ_z z = Σ δ_a a`` channel by channel. Both sides
are sums over products of a layer's weights and its weight gradients,

    Σ_p δ_z(p) z(p)  =  ⟨W_o, ∂L/∂W_o⟩ + b_o ∂L/∂b_o          for the layer below, output channel o,
    Σ_p δ_a(p) a(p)  =  Σ_k ⟨W_ko, ∂L/∂W_ko⟩                   for the layer above, input channel o,

so that, once the layer above is known, every leak gives one linear equation in the weights of the layer below. No
image, no activation, no ``δ`` is needed. (The law itself is known from gradient flow, where it makes the difference of
squared norms of two layers' weights a constant: Du, Hu and Lee 2018, "Algorithmic regularization in learning deep
homogeneous models", §2.)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gitlight.architecture import Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.moves import MoveRule
from gitlight.generators.exact.pooling import AveragePoolingRule, MaxPoolingRule
from gitlight.generators.exact.rule import InverseRule, Weights


def conserved(architecture: Architecture, rules: Mapping[str, InverseRule]) -> bool:
    """Whether the law gives sums over channels between all layers of a chain.

    It does where nothing but homogeneous operations is above the first of layers whose weights have no groups, and each
    input channel of a layer stems from one output channel of the layer below.
    """
    affine = []
    for layer in architecture.layers:
        rule = rules[layer.name]
        if isinstance(rule, AffineRule):
            if rule.groups != 1 or (rule.weight is None) or (rule.bias is None and layer.constants):
                return False
            affine.append(layer)
        elif affine and not rule.homogeneous:
            return False
    return all(_channels_below(architecture, rules, layer) is not None for layer in affine[:-1])


def share_of(
    architecture: Architecture, rules: Mapping[str, InverseRule], layer: Layer, gradients: Gradients, weights: Weights
) -> Tensor:
    """``Σ_p δ(p) z(p)`` of each output channel of ``layer``, from the layer with a weight above: ``(B, outputs)``."""
    above = layer_above(architecture, rules, layer)
    products = weights[above.parameters["weight"]] * gradients[above.parameters["weight"]]
    # (B, outputs, inputs, …): summed over all but the inputs.
    return summed_by_channel(architecture, rules, layer, products.sum(dim=[1, *range(3, products.dim())]))


def layer_above(architecture: Architecture, rules: Mapping[str, InverseRule], layer: Layer) -> Layer:
    """The next layer of a chain that has a weight."""
    position = architecture.layers.index(layer) + 1
    while not isinstance(rules[architecture.layers[position].name], AffineRule):
        position += 1
    return architecture.layers[position]


def summed_by_channel(
    architecture: Architecture, rules: Mapping[str, InverseRule], layer: Layer, shares: Tensor
) -> Tensor:
    """Sums over each output channel of ``layer``, from numbers for the input features of the layer above.

    Args:
        architecture: a chain.
        rules: of its layers.
        layer: the layer below.
        shares: ``(B, features)``, the features being entries or channels of that input.
    """
    channels = _channels_below(architecture, rules, layer)
    assert channels is not None, "conserved says so"
    sums = shares.new_zeros(len(shares), int(_channel_numbers(layer).max()) + 1)
    return sums.index_add_(1, channels.to(shares.device), shares)


def _channels_below(architecture: Architecture, rules: Mapping[str, InverseRule], layer: Layer) -> Tensor | None:
    """Which output channel of ``layer`` each input channel of the layer above stems from: ``(features,)`` int64.

    None where one stems from several, whose shares cannot be told apart.
    """
    above = layer_above(architecture, rules, layer)
    first, last = architecture.layers.index(layer) + 1, architecture.layers.index(above)
    numbers = _channel_numbers(layer)
    for step in architecture.layers[first:last]:
        rule = rules[step.name]
        if isinstance(rule, MoveRule):
            numbers = rule.moved(numbers)
        elif isinstance(rule, AveragePoolingRule | MaxPoolingRule):
            # Windows are of rows and columns; a mean says itself what it is over, the batch being dimension 0.
            over = [-2, -1] if step.kind != "mean" else [at - (at > 0) for at in step.arguments["dim"]]
            if not _agree(numbers, over):
                return None
            pooled = numbers.amax(over, keepdim=True)
            dropped = len(step.output_shape) < pooled.dim()
            numbers = pooled.reshape(step.output_shape) if dropped else pooled.expand(step.output_shape)
    features = numbers.flatten(1) if above.kind != "linear" else numbers.reshape(-1, numbers.shape[-1]).T
    return features[:, 0] if _agree(features, [1]) else None


def _agree(numbers: Tensor, over: list[int]) -> bool:
    """Whether all entries along these dimensions are equal."""
    return torch.equal(numbers.amin(over), numbers.amax(over))


def _channel_numbers(layer: Layer) -> Tensor:
    """The number of its channel at each entry of an affine layer's output: ``(*output_shape)`` int64."""
    shape = layer.output_shape
    if layer.kind == "linear":
        return torch.arange(shape[-1]).expand(shape)
    return torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
