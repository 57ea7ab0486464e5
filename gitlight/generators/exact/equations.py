"""The linear equations that pairs give for one layer's weight: what closed-form fits solve and descent descends."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gitlight.architecture import Layer
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.conservation import layer_above, share_of, summed_by_channel
from gitlight.generators.exact.forward import forward_values
from gitlight.generators.exact.leaks import Leaks, imbalance, last_delta

if TYPE_CHECKING:
    from gitlight.generators.exact.inversion import Inversion
    from gitlight.generators.exact.walk import Found


class LogitEquations(NamedTuple):
    """``log(δ + y) = W a + b − const``: input and output error of the last layer.

    Attributes:
        inputs: ``(B, features)``.
        delta: ``(B, classes)``.
        noise: ``(B,)``, standard deviation of the error of ``delta`` beyond rounding; zero where there is none.
    """

    inputs: Tensor
    delta: Tensor
    noise: Tensor


class OutputEquations(NamedTuple):
    """``patches · Wᵀ + b = outputs``: a layer's input and output.

    Attributes:
        patches: ``(B, positions, inputs)``.
        outputs: ``(B, positions, outputs)``.
        weights: ``(B, positions)``, inverse variance of the outputs' errors; zero where one is not known.
    """

    patches: Tensor
    outputs: Tensor
    weights: Tensor


class ConservationEquations(NamedTuple):
    """``⟨W_o, ∂L/∂W_o⟩ + b_o ∂L/∂b_o = share_o``: the layer's own gradients, and what the layer above gives.

    Attributes:
        rows: ``(B, outputs, inputs)``, the bias among the inputs where there is one.
        shares: ``(B, outputs)``.
        weights: ``(B, outputs)``, inverse variance; zero where the equation says nothing.
    """

    rows: Tensor
    shares: Tensor
    weights: Tensor


def logit_equations(leaks: Leaks, found: "Found", layer: Layer) -> LogitEquations:
    """Of the last layer."""
    # Rounding is relative to each entry of δ, however small; only noise beyond it drowns small probabilities.
    beyond = leaks.noise > 30 * leaks.rounding
    noise, inputs = torch.where(beyond, leaks.noise, 0.0), found.values[layer.inputs[0]].value.flatten(1)
    if "bias" not in layer.parameters:  # δ is a factor of the weight's gradient
        noise = noise / inputs.norm(dim=1).clamp_min(1e-300)
    return LogitEquations(inputs, found.deltas[layer.name], noise)


def output_equations(inversion: "Inversion", found: "Found", layer: Layer, images: Tensor | None) -> OutputEquations:
    """Of a layer whose output is solved from gradients.

    Args:
        inversion: holds the rules, and the weights below.
        found: what the walk gave.
        layer: the layer.
        images: ``(B, C, H, W)``, whose values at the layer's input are computed; None: the input is found as well.
    """
    output = found.values[layer.name]
    if images is None:
        inputs = found.values[layer.inputs[0]].value
    else:
        inputs = forward_values(inversion.architecture, images, inversion.weights())[layer.inputs[0]]
    rule = inversion.rules[layer.name]
    assert isinstance(rule, AffineRule)
    # An equation counts by the mean error of the outputs at its position; where one is unknown, all are.
    variance = rule.outputs(output.variance.expand_as(output.value)).mean(dim=2)
    weights = torch.where(torch.isfinite(variance), 1 / variance.clamp_min(1e-300), 0.0)
    value = torch.nan_to_num(rule.outputs(output.value), posinf=0.0, neginf=0.0)
    return OutputEquations(rule.patches(inputs), value, weights)


def conservation_equations(inversion: "Inversion", leaks: Leaks, layer: Layer) -> ConservationEquations:
    """By the conservation law of `gitlight.generators.exact.conservation`."""
    architecture, rules = inversion.architecture, inversion.rules
    shares = share_of(architecture, rules, layer, leaks.gradients, inversion.weights())
    rows = leaks.gradients[layer.parameters["weight"]].flatten(2)
    if "bias" in layer.parameters:
        rows = torch.cat([rows, leaks.gradients[layer.parameters["bias"]].unsqueeze(2)], dim=2)
    acts = inversion.unseen_acts(layer_above(architecture, rules, layer), leaks.gradients).double()
    seen = summed_by_channel(architecture, rules, layer, acts) == 0
    # Rounding is relative to a leak's own entries, noise is not. The last layer's weight is known up to a common row;
    # its share is what δ, rounded, fails to add up to zero by.
    size = rows.norm(dim=2)
    relative = torch.finfo(leaks.dtype).eps + imbalance(last_delta(rules[architecture.output], leaks))
    error = leaks.noise.unsqueeze(1) + relative.unsqueeze(1) * size
    weights = torch.where((size > 0) & seen, error.clamp_min(1e-150).square().reciprocal(), 0.0)
    return ConservationEquations(rows, shares, weights)
