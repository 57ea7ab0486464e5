"""`walk`: from the output down, every result of the leaked model that the equations give, for given weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, Architecture
from gitlight.data.pair import Gradients
from gitlight.generators.exact.activations import SigmoidRule, TanhRule
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.bounded import solve_bounded
from gitlight.generators.exact.plan import Action, Do, Plan
from gitlight.generators.exact.posterior import Prior, solve_stacked
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights
from gitlight.generators.exact.status import Status, worsen

_OPEN = 1e-10
"""Damping where equations leave directions open, over the mean diagonal: it keeps rounding out of these, and refinement
takes it out of all others."""

_MOST_SATURATED = 0.01
"""Share of a layer's units at their bounds from which a leak is reported as saturated."""


@dataclass
class Found:
    """What a walk found.

    Attributes:
        values: name of a layer, or `IMAGE` → estimate of its result.
        deltas: name of a layer → ``δ`` of its result.
        status: ``(B,)`` int64, one of `Status` each.
    """

    values: dict[str, Estimate]
    deltas: dict[str, Tensor]
    status: Tensor


def walk(
    architecture: Architecture,
    rules: Mapping[str, InverseRule],
    plan: Plan,
    gradients: Gradients,
    noise: Tensor,
    weights: Weights,
    priors: Mapping[str, Prior],
    until: Callable[[Action], bool] | None = None,
) -> Found:
    """Carry out a plan.

    Args:
        architecture: the leaked model's.
        rules: of all its layers.
        plan: made for these weights.
        gradients: of ``B`` leaks, finite and not zero, in float64.
        noise: ``(B,)``, standard deviation of the error of a gradient's entries, above zero.
        weights: estimates of the leaked parameters, float64.
        priors: name of a layer, or `IMAGE` → what is known beforehand of its result.
        until: stop before the first action for which this holds.
    """
    values: dict[str, Estimate] = {}
    deltas: dict[str, Tensor] = {}
    status = torch.full((len(noise),), int(Status.EXACT), dtype=torch.int64, device=noise.device)
    for action in plan.actions:
        if until is not None and until(action):
            break
        layer, rule = action.layer, rules[action.layer.name]
        below = layer.inputs[action.position] if layer.inputs else ""
        if action.do is Do.REVEAL:
            name = rule.reveals_delta()
            assert name is not None
            deltas[layer.name] = gradients[name].reshape(len(noise), *layer.output_shape)
        elif action.do is Do.INVERT:
            others = [values.get(name) for name in layer.inputs]
            values[below] = rule.invert(values[layer.name], action.position, others, weights)
        elif action.do is Do.CARRY:
            inputs = [values.get(name) for name in layer.inputs]
            output = values.get(layer.name)
            passed = rule.carry(deltas[layer.name], action.position, inputs, output, weights)
            deltas[below] = deltas[below] + passed if below in deltas else passed
            if isinstance(rule, SigmoidRule | TanhRule) and output is not None:
                status = worsen(status, rule.saturated(output) > _MOST_SATURATED, Status.SATURATED)
        else:
            assert isinstance(rule, AffineRule)
            values[below], status = _solve(
                action, rule, gradients, noise, weights, priors.get(below), values.get(layer.name),
                deltas[layer.name], status, bounds_of(architecture, below),
            )  # fmt: skip
    return Found(values, deltas, status)


def bounds_of(architecture: Architecture, name: str) -> tuple[float | None, float | None]:
    """Between what bounds the result of a layer lies."""
    if name == IMAGE:
        return (0.0, 1.0)
    kinds = {"relu": (0.0, None), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}
    layer = architecture[name]
    while layer.kind in ("dropout", "flatten", "max_pool2d", "reshape", "view") and layer.inputs[0] != IMAGE:
        layer = architecture[layer.inputs[0]]
    return kinds.get(layer.kind, (None, None))


def _solve(
    action: Action,
    rule: AffineRule,
    gradients: Gradients,
    noise: Tensor,
    weights: Weights,
    prior: Prior | None,
    output: Estimate | None,
    delta: Tensor,
    status: Tensor,
    bounds: tuple[float | None, float | None],
) -> tuple[Estimate, Tensor]:
    """An affine layer's input, and the statuses after it."""
    assert rule.weight is not None
    gradient = gradients[rule.weight]
    size = delta.flatten(1).norm(dim=1)
    usable = (size > 0) & torch.isfinite(size)
    status = worsen(status, ~usable, Status.SINGULAR)
    if action.do is Do.SOLVE:
        # Damped by what noise there is against a spread of about one, the prior of those who know nothing else.
        damping = (noise / size.clamp_min(1e-300)).square() / 0.1 + (0.0 if rule.exact else _OPEN)
        level = rule.normal(delta[:1] / size[:1].clamp_min(1e-300).view(-1, *[1] * (delta.dim() - 1)))
        mean_diagonal = level.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-300)
        value, variance, solved = rule.solve(delta, gradient, damping / mean_diagonal)
        variance = variance * noise.square().view(-1, *[1] * (value.dim() - 1))
        if rule.determined is not None and not rule.exact:
            # Of what no equation meets, the solution of least norm says nothing.
            open_entries = ~rule.determined.to(value.device).expand_as(rule.columns(value))
            variance = torch.where(rule.from_columns(open_entries.double()) > 0, torch.inf, variance)
        return Estimate(value, variance), worsen(status, ~solved, Status.SINGULAR)
    assert output is not None
    weight, bias = weights[rule.weight], rule.bias_of(weights)
    shape = rule.layer.input_shape
    value = delta.new_zeros(len(delta), *shape)
    variance = torch.full_like(value, torch.inf)
    picked = usable.nonzero().squeeze(1)
    if len(picked) == 0:
        return Estimate(value, variance), status
    its_output = Estimate(
        output.value[picked],
        output.variance.expand_as(output.value)[picked],
        None if output.at_most is None else output.at_most[picked],
    )
    its = (rule, delta[picked], gradient[picked], noise[picked], its_output, weight, bias, prior)
    if action.do is Do.BOUND:
        estimate, determined = solve_bounded(*its, bounds)
        status[picked] = worsen(status[picked], ~determined, Status.ESTIMATE)
    else:
        estimate, solved, damped = solve_stacked(*its)
        status[picked] = worsen(status[picked], damped, Status.ESTIMATE)
        status[picked] = worsen(status[picked], ~solved, Status.SINGULAR)
    value[picked] = estimate.value
    variance[picked] = estimate.variance
    return Estimate(value, variance), status
