"""A last linear layer without a bias: its input and ``δ`` from the rank-one factor of its weight's gradient.

Of one image that gradient is ``δ ⊗ a``, which gives both up to a factor. ``δ = softmax(z) − y`` adds up to zero and its
label's entry alone is negative, which tells label and sign (Zhao et al. 2020). With ``q = 1 − p_y``, ``δ`` is ``q``
times the direction whose label's entry is −1, and ``a`` what is left over ``q``. Once the weight is known,
``softmax(W a) = δ + y`` is one equation a class in ``q`` alone.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypeIs

from gitlight.architecture import Architecture
from gitlight.generators.exact.head import Head
from gitlight.generators.exact.leading import leading_direction
from gitlight.generators.exact.linear import LinearRule
from gitlight.generators.exact.rule import InverseRule

_FARTHEST = 36.0
"""Logits of ``q`` between which it is sought."""

_GRID, _STARTS, _STEPS = 145, 3, 30


class Factor(NamedTuple):
    """The factor, scaled as for ``q = 1``.

    Attributes:
        delta: ``(B, classes)``; the label's entry is −1.
        inputs: ``(B, features)``.
        labels: ``(B,)`` int64.
    """

    delta: Tensor
    inputs: Tensor
    labels: Tensor


def allow_factor(architecture: Architecture, rules: Mapping[str, InverseRule]) -> None:
    """Let the last layer's rule use the factor, where there is one and no bias; for leaks of one image.

    Of two classes both entries of ``δ`` are of one size, and nothing tells which is the label's.
    """
    layer, rule = architecture[architecture.output], rules[architecture.output]
    if not isinstance(rule, LinearRule) or rule.weight is None or rule.bias is not None:
        return
    uses = Counter(name for its in architecture.layers for name in its.parameters.values())
    whole = rule.weight not in architecture.sketched and uses[rule.weight] == 1
    rule.by_factor = whole and rule.n_unknowns == 1 and not layer.constants and layer.output_shape[-1] > 2


def by_factor(rule: InverseRule) -> TypeIs[LinearRule]:
    """Whether a rule uses the factor."""
    return isinstance(rule, LinearRule) and rule.by_factor


def rank_one_factor(weight_gradient: Tensor) -> Factor:
    """Of ``(B, classes, features)`` float64, finite; the nearest one of rank one, where there is noise."""
    left, value, right = leading_direction(weight_gradient)
    # Of the two signs, that for which entries beside the smallest are less negative; one is right but for noise.
    wrong = [its.clamp_max(0).square().sum(dim=1) - its.amin(dim=1).square() for its in (left, -left)]
    sign = torch.where(wrong[0] <= wrong[1], 1.0, -1.0).to(left).unsqueeze(1)
    smallest, labels = (sign * left).min(dim=1, keepdim=True)
    # At least 1/√2 of a sum of zero; of a gradient that is zero, anything else would end in infinities.
    size = torch.where(smallest < -0.5, -smallest, 1.0)
    return Factor(sign * left / size, sign * right * size * value.unsqueeze(1), labels.squeeze(1))


def solve_factor(weight_gradient: Tensor, noise: Tensor, weight: Tensor, seen: Tensor | None = None) -> Head:
    """The last layer's input and ``δ``, the weight being known.

    ``q`` is that of least ``Σ_k [log(softmax(W a)_k + s) − log((δ + y)_k + s)]²``, ``s`` being the error of an entry of
    ``δ``: what is below it counts for nothing. By the Gauss-Newton method, from the best minima on a grid of its logit.

    Args:
        weight_gradient: ``(B, classes, features)``.
        noise: ``(B,)``, standard deviation of the error of an entry, above zero.
        weight: ``(classes, features)``, up to a row common to all classes.
        seen: ``(features,)`` bool, at which features it is known; None: all. Of a leak with others ``q`` stays 1, as
            its logits are anything, with a relative error of one in ``classes``: an untrained model's ``p_y``.
    """
    found = rank_one_factor(weight_gradient)
    size = found.inputs.norm(dim=1).clamp_min(1e-300)
    error = (noise / size).unsqueeze(1)
    label = torch.nn.functional.one_hot(found.labels, weight.shape[0]).to(weight)
    logits = found.inputs @ weight.T

    def mismatch(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For logits of ``q`` ``(B, 1)``: ``(B, classes)`` each of what is missing, its derivative, ``δ + y + s``."""
        share, rest = torch.sigmoid(at), torch.sigmoid(-at)
        given = torch.where(label > 0, rest, (share * found.delta).clamp_min(0))
        made = torch.softmax(logits / share, dim=1)
        slope = -logits / share * rest
        made_slope = made * (slope - (made * slope).sum(dim=1, keepdim=True))
        given_slope = share * rest * torch.where(label > 0, -1.0, found.delta.clamp_min(0))
        # In proportion to q: else a q of nearly zero and a softmax of nearly one would agree, whatever the weight.
        floor, floor_slope = share * error, share * rest * error
        made, made_slope = made + floor, made_slope + floor_slope
        given, given_slope = given + floor, given_slope + floor_slope
        return made.log() - given.log(), made_slope / made - given_slope / given, given

    grid = torch.linspace(-_FARTHEST, _FARTHEST, _GRID).to(size)
    sums = torch.stack([mismatch(at.expand(len(size), 1))[0].square().sum(dim=1) for at in grid])
    beside = torch.nn.functional.pad(sums, (0, 0, 1, 1), value=torch.inf)
    minima = torch.where((sums <= beside[:-2]) & (sums <= beside[2:]), sums, torch.inf)
    at, least = grid[sums.argmin(dim=0)].unsqueeze(1), torch.full_like(size, torch.inf)
    for start in grid[minima.topk(_STARTS, dim=0, largest=False).indices]:
        end = start.unsqueeze(1)
        for _ in range(_STEPS):
            missing, slope, _ = mismatch(end)
            step = (missing * slope).sum(dim=1) / slope.square().sum(dim=1).clamp_min(1e-300)
            end = (end - step.clamp(-0.5, 0.5).unsqueeze(1)).clamp(-_FARTHEST, _FARTHEST)
        left = mismatch(end)[0].square().sum(dim=1)
        at, least = torch.where((left < least).unsqueeze(1), end, at), torch.minimum(left, least)
    of_others = torch.zeros_like(weight_gradient[:, 0]) if seen is None else found.inputs * ~seen
    guessed = of_others.norm(dim=1) > 3 * noise * weight_gradient.shape[2] ** 0.5
    at = torch.where(guessed.unsqueeze(1), _FARTHEST, at)
    share, rest = torch.sigmoid(at), torch.sigmoid(-at)
    inputs, delta = found.inputs / share, found.delta * share
    _, slope, given = mismatch(at)
    # Errors of an entry of δ, and those that the direction's own errors make of logits.
    own = noise.unsqueeze(1) / (found.delta.norm(dim=1, keepdim=True) * share)
    variance = (error * share / given).square() + own.square() * weight.square().sum(dim=1)
    of_scale = (rest.square() * slope.square() * variance).sum(dim=1)
    of_scale = of_scale / slope.square().sum(dim=1).square().clamp_min(1e-300)
    of_scale = torch.where(guessed, 1 / weight.shape[0] ** 2, of_scale)
    own_of_delta = (error * share).square().expand_as(delta)
    return Head(inputs, own.square() + of_scale.unsqueeze(1) * inputs.square(), delta, own_of_delta, of_scale)
