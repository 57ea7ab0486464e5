"""Exact-GIT as the paper has it: the leaked weights are the generator's parameters, trained through the walk."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, Architecture
from gitlight.data.pair import Gradients
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.differentiable import solve_differentiably
from gitlight.generators.exact.plan import Plan
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights
from gitlight.generators.exact.solvability import Do
from gitlight.generators.exact.walk import bounds_of

_INSIDE = 1e-3
"""How far inside its bounds an activation is kept: with wrong weights estimates leave them, and σ' would vanish."""


def descend(
    architecture: Architecture,
    rules: Mapping[str, InverseRule],
    plan: Plan,
    gradients: Gradients,
    weights: Weights,
    damping: float,
) -> Tensor:
    """``a_{i-1} = K(δ_i)⁺ g_i`` and ``δ_{i-1} = (W̃_iᵀ * δ_i) ⊙ σ'`` from the output to the image, differentiable in W̃.

    Args:
        architecture: the leaked model's.
        rules: of all its layers.
        plan: made without forward equations; must reach the image.
        gradients: of ``B`` leaks in float64.
        weights: the generator's parameters, float64.
        damping: of each solve, over the mean diagonal of its normal matrix.

    Returns:
        ``(B, C, H, W)``, not clamped.
    """
    values: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for action in plan.actions:
        layer, rule = action.layer, rules[action.layer.name]
        below = layer.inputs[action.position] if layer.inputs else ""
        if action.do is Do.REVEAL:
            name = rule.reveals_delta()
            assert name is not None
            deltas[layer.name] = gradients[name].reshape(-1, *layer.output_shape)
        elif action.do is Do.INVERT:
            known = Estimate(values[layer.name], torch.zeros_like(values[layer.name]))
            values[below] = rule.invert(known, action.position, [None for _ in layer.inputs], weights).value
        elif action.do is Do.CARRY:
            output = None
            if layer.name in values:
                output = Estimate(values[layer.name], torch.zeros_like(values[layer.name]))
            inputs = [None for _ in layer.inputs]
            passed = rule.carry(deltas[layer.name], action.position, inputs, output, weights)
            deltas[below] = deltas[below] + passed if below in deltas else passed
        else:
            assert isinstance(rule, AffineRule)
            assert rule.weight is not None
            found = solve_differentiably(rule, deltas[layer.name], gradients[rule.weight], damping)
            values[below] = found if below == IMAGE else _kept_inside(found, *bounds_of(architecture, below))
    return values[IMAGE]


def _kept_inside(values: Tensor, low: float | None, high: float | None) -> Tensor:
    margin = 0.0 if low is None or high is None else _INSIDE * (high - low)
    return values.clamp(None if low is None else low + margin, None if high is None else high - margin)
