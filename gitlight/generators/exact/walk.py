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
from gitlight.generators.exact.errors import Noise, carry_errors, row_noise
from gitlight.generators.exact.factor import by_factor, rank_one_factor, solve_factor
from gitlight.generators.exact.head import solve_head
from gitlight.generators.exact.linear import LinearRule
from gitlight.generators.exact.plan import Action, Plan
from gitlight.generators.exact.posterior import Prior, Stacked, solve_stacked
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights
from gitlight.generators.exact.signs import TwoSlopes, expected_outputs, solve_with_signs, unsure
from gitlight.generators.exact.solvability import Do
from gitlight.generators.exact.status import Status, worsen

_OPEN = 1e-10
"""Damping where equations leave directions open, for a ``δ`` of norm one: it keeps rounding out of these, and
refinement takes it out of all others."""

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
    dtype: torch.dtype = torch.float64,
    until: Callable[[Action], bool] | None = None,
    seen: Tensor | None = None,
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
        dtype: precision that the gradients were made in.
        until: stop before the first action for which this holds.
        seen: ``(features,)`` bool, at which of its inputs the last layer's weight is known; None: at all.
    """
    return Walker(architecture, rules, gradients, noise, weights, priors, dtype, seen).follow(plan, until)


def bounds_of(architecture: Architecture, name: str) -> tuple[float | None, float | None]:
    """Between what bounds the result of a layer lies."""
    if name == IMAGE:
        return (0.0, 1.0)
    kinds = {"relu": (0.0, None), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}
    layer = architecture[name]
    while layer.kind in ("dropout", "flatten", "max_pool2d", "reshape", "view") and layer.inputs[0] != IMAGE:
        layer = architecture[layer.inputs[0]]
    return kinds.get(layer.kind, (None, None))


class Walker:
    """What has been found so far, and the steps that find more.

    Attributes:
        values: name of a layer, or `IMAGE` → estimate of its result.
        deltas: name of a layer → ``δ`` of its result.
        errors: name of a layer → samples of the error of that ``δ``.
        samples: where these are drawn.
        status: ``(B,)`` int64, one of `Status` each.
    """

    def __init__(
        self,
        architecture: Architecture,
        rules: Mapping[str, InverseRule],
        gradients: Gradients,
        noise: Tensor,
        weights: Weights,
        priors: Mapping[str, Prior],
        dtype: torch.dtype,
        seen: Tensor | None = None,
    ) -> None:
        self._seen = seen
        self._rounding = torch.finfo(dtype).eps
        self._architecture, self._rules, self._priors = architecture, rules, priors
        self._gradients, self._noise, self._weights = gradients, noise, weights
        self.samples = Noise()
        self.errors: dict[str, Tensor] = {}
        self._two_slopes: dict[str, TwoSlopes] = {}  # layer that an activation with two slopes, and nothing else, takes
        self.values: dict[str, Estimate] = {}
        self.deltas: dict[str, Tensor] = {}
        self.status = torch.full((len(noise),), int(Status.EXACT), dtype=torch.int64, device=noise.device)

    def follow(self, plan: Plan, until: Callable[[Action], bool] | None = None) -> Found:
        """Carry out a plan, up to the first action for which ``until`` holds."""
        steps = {Do.REVEAL: self.reveal, Do.INVERT: self.invert, Do.CARRY: self.carry}
        for action in plan.actions:
            if until is not None and until(action):
                break
            steps.get(action.do, self.solve)(action)
        return Found(self.values, self.deltas, self.status)

    def reveal(self, action: Action) -> None:
        """``δ`` is the gradient of a parameter, or a factor of one."""
        layer, rule = action.layer, self._rules[action.layer.name]
        if by_factor(rule):
            assert rule.weight is not None
            factor = rank_one_factor(self._gradients[rule.weight])
            error = self._noise / factor.inputs.norm(dim=1).clamp_min(1e-300)
            its_errors = self.samples.normal(factor.delta) * _like(error, factor.delta).unsqueeze(1)
            self.keep_delta(layer.name, factor.delta, its_errors)
            return
        name = rule.reveals_delta()
        assert name is not None
        delta = self._gradients[name].reshape(len(self._noise), *layer.output_shape)
        self.keep_delta(layer.name, delta, self.samples.normal(delta) * _like(self._noise, delta).unsqueeze(1))

    def invert(self, action: Action) -> None:
        """An operation's input from its output."""
        layer = action.layer
        others = [self.values.get(name) for name in layer.inputs]
        inverted = self._rules[layer.name].invert(self.values[layer.name], action.position, others, self._weights)
        self.values[layer.inputs[action.position]] = inverted

    def carry(self, action: Action) -> None:
        """``δ``, and what may be wrong with it, to an operation's input."""
        layer, rule, position = action.layer, self._rules[action.layer.name], action.position
        below = layer.inputs[position]
        inputs = [self.values.get(name) for name in layer.inputs]
        output = self.values.get(layer.name)
        delta, errors = self.deltas[layer.name], self.errors[layer.name]
        passed = rule.carry(delta, position, inputs, output, self._weights)
        its_errors = carry_errors(rule, delta, errors, position, inputs, output, self._weights, self.samples)
        if layer.name == self._architecture.output and isinstance(rule, LinearRule) and rule.weight is not None:
            # The row that no fit sees, common to all classes, drops out as far as δ adds up to zero.
            row = self.samples.normal(passed) * self._weights[rule.weight].square().mean().sqrt()
            its_errors = its_errors + _like(delta.flatten(1).sum(dim=1), passed).unsqueeze(1) * row
        alone = below not in self.deltas
        if not alone:
            passed, its_errors = self.deltas[below] + passed, self.errors[below] + its_errors
        self.keep_delta(below, passed, its_errors)
        if alone and rule.slopes is not None and output is not None:
            self._two_slopes[below] = TwoSlopes(output, delta, errors, rule.slopes)
        if isinstance(rule, SigmoidRule | TanhRule) and output is not None:
            self.status = worsen(self.status, rule.saturated(output) > _MOST_SATURATED, Status.SATURATED)

    def solve(self, action: Action) -> None:
        """An affine layer's input from its gradients, and from whatever else is known."""
        layer, rule = action.layer, self._rules[action.layer.name]
        assert isinstance(rule, AffineRule)
        assert rule.weight is not None
        delta = self.deltas[layer.name]
        size = delta.flatten(1).norm(dim=1)
        usable = (size > 0) & torch.isfinite(size)
        self.status = worsen(self.status, ~usable, Status.SINGULAR)
        if action.do is Do.SOLVE:
            found = self._by_gradients_alone(rule, delta, size)
        else:
            nothing = delta.new_zeros(len(delta), *layer.input_shape)
            found = Estimate(nothing, torch.full_like(nothing, torch.inf))
            picked = usable.nonzero().squeeze(1)
            if len(picked):
                self._with_outputs(action.do, rule, picked, found)
        self.values[layer.inputs[0]] = found

    def _by_gradients_alone(self, rule: AffineRule, delta: Tensor, size: Tensor) -> Estimate:
        layer = rule.layer
        assert rule.weight is not None
        if layer.name == self._architecture.output and self._head_is_known(rule):
            return self._head(rule)
        # Damped by what noise there is against a spread of about one, the prior of those who know nothing else.
        damping = (self._noise / size.clamp_min(1e-300)).square() / 0.1 + (0.0 if rule.exact else _OPEN)
        value, variance, solved = rule.solve(delta, self._gradients[rule.weight], damping)
        rows = row_noise(rule, self.errors[layer.name], self._noise, self._priors.get(layer.inputs[0]))
        variance = variance * _like(rows.square().mean(dim=1), value)
        if rule.determined is not None and not rule.exact:
            # Of what no equation meets, the solution of least norm says nothing.
            open_entries = (~rule.determined).to(value.device).expand_as(rule.columns(value))
            variance = torch.where(rule.from_columns(open_entries.double()) > 0, torch.inf, variance)
        self.status = worsen(self.status, ~solved, Status.SINGULAR)
        return Estimate(value, variance)

    def _with_outputs(self, do: Do, rule: AffineRule, picked: Tensor, found: Estimate) -> None:
        """Fill in the examples that are picked."""
        name, below = rule.layer.name, rule.layer.inputs[0]
        assert rule.weight is not None
        output, prior = self.values[name], self._priors.get(below)
        weight, bias = self._weights[rule.weight], rule.bias_of(self._weights)
        gradient = self._gradients[rule.weight]
        if do is Do.BOUND:
            its = (rule, self.deltas[name][picked], gradient[picked], self._noise[picked], _of(output, picked))
            estimate, determined = solve_bounded(*its, weight, bias, prior, bounds_of(self._architecture, below))
            self.status[picked] = worsen(self.status[picked], ~determined, Status.ESTIMATE)
            found.value[picked], found.variance[picked] = estimate.value, estimate.variance
            return
        activation = self._two_slopes.get(name)
        settled = torch.zeros_like(picked, dtype=torch.bool)
        if activation is not None and prior is not None:
            expected = expected_outputs(rule, weight, bias, prior, len(picked))
            settled = unsure(activation.of(picked), expected)
            self._settle(rule, activation, picked[settled], prior, found)
        rest = picked[~settled]
        if len(rest):
            rows = row_noise(rule, self.errors[name][rest], self._noise[rest], prior)
            its = (rule, self.deltas[name][rest], gradient[rest], self._noise[rest], _of(output, rest))
            self._keep_stacked(solve_stacked(*its, weight, bias, prior, row_noise=rows), rest, found)

    def _settle(self, rule: AffineRule, activation: TwoSlopes, which: Tensor, prior: Prior, found: Estimate) -> None:
        if len(which) == 0:
            return
        name = rule.layer.name
        assert rule.weight is not None
        settled = solve_with_signs(
            rule,
            activation.of(which),
            self._gradients[rule.weight][which],
            None if rule.bias is None else self._gradients[rule.bias][which],
            self._noise[which],
            self._weights[rule.weight],
            rule.bias_of(self._weights),
            prior,
        )
        self._keep_stacked(settled.stacked, which, found)
        self.deltas[name] = self.deltas[name].index_copy(0, which, settled.delta)
        self.errors[name] = self.errors[name].index_copy(0, which, settled.errors)
        output = self.values[name]
        self.values[name] = Estimate(
            output.value.index_copy(0, which, settled.output.value),
            output.variance.expand_as(output.value).index_copy(0, which, settled.output.variance),
        )

    def _keep_stacked(self, stacked: Stacked, which: Tensor, found: Estimate) -> None:
        found.value[which], found.variance[which] = stacked.estimate.value, stacked.estimate.variance
        self.status[which] = worsen(self.status[which], stacked.damped, Status.ESTIMATE)
        self.status[which] = worsen(self.status[which], ~stacked.solved, Status.SINGULAR)

    def _head_is_known(self, rule: AffineRule) -> bool:
        known = rule.weight in self._weights and (rule.bias is None or rule.bias in self._weights)
        return known and isinstance(rule, LinearRule) and (by_factor(rule) or rule.reveals_delta() is not None)

    def _head(self, rule: AffineRule) -> Estimate:
        """The last layer's input, and its ``δ`` once more: what the cross-entropy says of both."""
        assert rule.weight is not None
        if rule.bias is None:
            head = solve_factor(self._gradients[rule.weight], self._noise, self._weights[rule.weight], self._seen)
        else:
            head = solve_head(
                self._gradients[rule.weight], self._gradients[rule.bias], self._noise,
                self._weights[rule.weight], self._weights[rule.bias], self._rounding,
            )  # fmt: skip
        own = self.samples.normal(head.delta) * head.delta_variance.sqrt().unsqueeze(1)
        shared = self.samples.normal(head.scale_variance) * head.scale_variance.sqrt().unsqueeze(1)
        self.keep_delta(rule.layer.name, head.delta, own + shared.unsqueeze(2) * head.delta.unsqueeze(1))
        return Estimate(head.inputs.view(-1, *rule.layer.input_shape), head.inputs_variance)

    def keep_delta(self, name: str, delta: Tensor, errors: Tensor) -> None:
        """Of a layer's result."""
        self.deltas[name], self.errors[name] = delta, errors
        self._two_slopes.pop(name, None)


def _of(estimate: Estimate, which: Tensor) -> Estimate:
    variance = estimate.variance.expand_as(estimate.value)[which]
    return Estimate(estimate.value[which], variance, None if estimate.at_most is None else estimate.at_most[which])


def _like(per_example: Tensor, tensor: Tensor) -> Tensor:
    """``(B,)`` in a shape that broadcasts with ``(B, …)``."""
    return per_example.view(-1, *[1] * (tensor.dim() - 1))
