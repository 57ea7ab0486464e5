"""The last layer under noise: its input and its output error from everything that the cross-entropy says of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.generators.exact.labels import labels_from_bias_gradient
from gitlight.generators.exact.leading import leading_direction

_STEPS = 50
_ARRIVED = 1e-13
"""Relative size of a step after which the next would be rounding: each is a thousandth of the one before, or less."""

_FARTHEST = 6.0
"""Standard deviations of the bias gradient's own error that the scale may move by: beyond, the weights do not fit."""


class Head(NamedTuple):
    """What is found of the last layer.

    Attributes:
        inputs: ``(B, features)``.
        inputs_variance: of their errors, ``(B, features)``.
        delta: ``(B, classes)``.
        delta_variance: ``(B, classes)``; errors of `delta` are independent but for those of the scale.
        scale_variance: ``(B,)``, of the relative error that all of `delta` share.
    """

    inputs: Tensor
    inputs_variance: Tensor
    delta: Tensor
    delta_variance: Tensor
    scale_variance: Tensor


def solve_head(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    noise: Tensor,
    weight: Tensor,
    bias: Tensor,
    rounding: float = torch.finfo(torch.float64).eps,
) -> Head:
    """Input and output error of a last linear layer whose weights are known.

    Weight and bias gradient together are ``δ ⊗ [a; 1]``, of rank one: their leading singular vectors average the noise
    over all entries, and give both factors up to a scale. The bias gradient alone would fix the scale to its own
    relative error; the forward pass, ``softmax(W a + b) − y = δ``, fixes it far better.

    Args:
        weight_gradient: ``(B, classes, features)``.
        bias_gradient: ``(B, classes)``.
        noise: ``(B,)``, standard deviation of the error of an entry, above zero.
        weight: ``(classes, features)``, up to a row common to all classes.
        bias: ``(classes,)``, likewise.
        rounding: relative error of the leaked model's own probabilities, that of its precision.
    """
    joined = torch.cat([weight_gradient, bias_gradient.unsqueeze(2)], dim=2)
    left, value, right = leading_direction(joined)
    # The scale t: a = t · direction, and δ = size · error / t.
    sign = torch.where(right[:, -1] >= 0, 1.0, -1.0).to(right)[:, None]
    direction, error = sign * right[:, :-1], sign * left * value[:, None]
    first = 1 / right[:, -1].abs().clamp_min(1e-300)
    relative = noise / bias_gradient.norm(dim=1).clamp_min(1e-300)
    label = torch.nn.functional.one_hot(labels_from_bias_gradient(bias_gradient), bias_gradient.shape[1]).to(error)
    logits = direction @ weight.T

    def own(scale: Tensor) -> Tensor:
        """Variance of the direction's errors, in units of the input."""
        return (noise / value.clamp_min(1e-300) * scale).square()

    scale = first
    precision = torch.zeros_like(first)
    for _ in range(_STEPS):
        probabilities = torch.softmax(scale[:, None] * logits + bias, dim=1)
        missing = probabilities - label - error / scale[:, None]
        inner = (probabilities * logits).sum(dim=1, keepdim=True)
        slope = probabilities * (logits - inner) + error / scale[:, None].square()
        # Errors of the gradient, of size noise / t, and those that the direction's own errors make of probabilities.
        moved = probabilities.unsqueeze(2) * (weight - (probabilities @ weight).unsqueeze(1))
        covariance = own(scale)[:, None, None] * (moved @ moved.mT)
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        diagonal += (noise / scale).square()[:, None] + (rounding * probabilities).square()
        # In units of its own size, from which no tiny gradient underflows. Where rounding has left it singular the
        # answer is not finite, and the bias gradient's scale stays.
        size = diagonal.mean(dim=1).clamp_min(1e-300)
        weighed, _ = torch.linalg.solve_ex(covariance / size[:, None, None], torch.stack([slope, missing], dim=2))
        weighed = weighed / size[:, None, None]
        of_bias = 1 / (relative * first).square()
        precision = (slope * weighed[:, :, 0]).sum(dim=1) + of_bias
        step = ((slope * weighed[:, :, 1]).sum(dim=1) + of_bias * (scale - first)) / precision
        step = torch.maximum(torch.minimum(step, 0.2 * scale), -0.2 * scale)
        scale = scale - step
        if bool((step.abs() < _ARRIVED * scale).all()):
            break
    fits = ((scale - first).abs() < _FARTHEST * relative * first) & torch.isfinite(scale)
    scale = torch.where(fits, scale, first)
    of_scale = torch.where(fits, 1 / (precision * scale.square()), relative.square())
    inputs, delta = scale[:, None] * direction, error / scale[:, None]
    return Head(
        inputs,
        own(scale)[:, None] + of_scale[:, None] * inputs.square(),
        delta,
        (noise / scale).square()[:, None].expand_as(delta),
        of_scale,
    )
