"""`Inversion`: closed-form inversion of one architecture: its weights' estimates, priors, and the walk."""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.generators.base import PairFit, ParameterEstimate
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.doubt import doubtful
from gitlight.generators.exact.factor import allow_factor, by_factor
from gitlight.generators.exact.fits import (
    ConservationFit,
    FitStep,
    HeadFit,
    OutputFit,
    Way,
    affordable,
    needed_fits,
    plan_fits,
    refits,
)
from gitlight.generators.exact.forward import computable
from gitlight.generators.exact.leaks import Leaks, last_delta, rounded, usable_leaks
from gitlight.generators.exact.matching import matching_fits
from gitlight.generators.exact.plan import Plan, plan_walk, rules_of
from gitlight.generators.exact.posterior import Prior
from gitlight.generators.exact.prior_fit import PriorFit
from gitlight.generators.exact.solvability import Do
from gitlight.generators.exact.status import Status, worsen
from gitlight.generators.exact.walk import Found, walk


def _seen(key: str) -> str:
    return key.replace("weight", "seen")


class Inversion(nn.Module):
    """Inverts back-propagation in closed form, without any leaked weight: those that it needs it fits from pairs.

    Attributes:
        rules: the inverse rule of each layer.
        steps: the fits to make, in order.
        unreachable: names of layers whose weights no fit reaches.
        is_cut: whether the walk would go on, were it not for ``depth``.
        separated_plan: that of client batches, where ``separated`` is given.
    """

    def __init__(
        self,
        architecture: Architecture,
        noise: float | None,
        client_batch_size: int,
        strict: bool = True,
        stacked: bool = True,
        depth: int | None = None,
        separated: int | None = None,
        factor: bool = False,
    ) -> None:
        """Plan the fits and the walk.

        Args:
            architecture: the leaked model's.
            noise: relative noise of the gradients; None: estimated leak by leak.
            client_batch_size: images per leak.
            strict: whether an operation without a rule is an error; else the walk ends above it.
            stacked: whether to use forward equations and priors, too: exact where gradient equations alone are not, at
                up to a second an image on a laptop.
            depth: the most layers whose inputs are wanted, from the output down; None: all.
            separated: images of a client batch that a walk takes apart with these weights, which single images give.
            factor: whether a last layer without a bias is inverted by the factor of its weight's gradient.

        Raises:
            ArchitectureError: an operation has no inverse rule, and ``strict``.
        """
        super().__init__()
        self.architecture = architecture
        self.rules = rules_of(architecture, strict)
        if factor:
            allow_factor(architecture, self.rules)
        self.n_images = client_batch_size
        self._noise = noise
        fits = plan_fits(architecture, self.rules, client_batch_size, every_weight=separated is not None)
        self.steps, self.unreachable = fits if stacked else (fits[0], ())
        if separated is not None:
            self.steps = tuple(takewhile(lambda step: affordable(step, self.rules[step.layer.name]), self.steps))
        everything = [step.layer for step in self.steps] + [architecture[name] for name in self.unreachable]
        weights = {name for layer in everything for name in layer.parameters.values()}
        whole = plan_walk(architecture, self.rules, weights, client_batch_size, stacked)
        self.is_cut = depth is not None and depth < len(whole.solves)
        if not stacked or self.is_cut:
            fits = (self.steps, self.unreachable)
            most = depth if self.is_cut or separated else None
            self.steps, self.unreachable = needed_fits(
                architecture, self.rules, fits, client_batch_size, stacked, most, separated
            )
        self._estimated: dict[str, str] = {}
        layers = [*(step.layer for step in self.steps), *(architecture[name] for name in self.unreachable)]
        for number, name in enumerate(n for layer in layers for n in layer.parameters.values()):
            self._estimated[name] = f"weight{number}"
            shape = architecture.parameter_shapes[name]
            self.register_buffer(f"weight{number}", torch.zeros(shape, dtype=torch.float64))
            self.register_buffer(f"seen{number}", torch.ones(shape, dtype=torch.bool))
        self._found: set[str] = set()
        self.separated_plan: Plan | None = None
        if separated is not None:
            apart = plan_walk(architecture, self.rules, set(self._estimated), separated, stacked=False, separated=True)
            self.separated_plan = apart.first(min(depth or len(apart.solves), len(apart.solves)))
            # That of single images solves for the same layers, and for others whose bias reveals δ.
            single = plan_walk(architecture, self.rules, set(self._estimated), client_batch_size, stacked).solves
            wanted = {action.layer.name for action in self.separated_plan.solves}
            depth = max((n for n, action in enumerate(single, 1) if action.layer.name in wanted), default=None)
        self._plan = plan_walk(architecture, self.rules, set(self._estimated), client_batch_size, stacked).first(depth)
        on_the_way = [*layers, *(action.layer for action in self._plan.actions), architecture[architecture.output]]
        # Where the image is found, all gradients are compared with those that it gives.
        used = {name for layer in on_the_way for name in layer.parameters.values()}
        self._used = set(architecture.parameter_shapes) if stacked else used
        self._priors: dict[str, str] = {}
        self._made_priors: dict[str, tuple[tuple[int, int, int], Prior]] = {}
        from_images = computable(architecture, self._estimated)
        for action in self._plan.actions:
            if action.do in (Do.STACK, Do.BOUND) and action.layer.inputs[0] in from_images:
                size = torch.Size(action.layer.input_shape).numel()
                name = action.layer.inputs[0]
                self._priors[name] = f"prior{len(self._priors)}"
                self.register_buffer(f"{self._priors[name]}_mean", torch.zeros(size, dtype=torch.float64))
                # In single precision: a prior need not be exact, and there are size² entries.
                self.register_buffer(f"{self._priors[name]}_precision", torch.zeros(size, size))

    @property
    def plan(self) -> Plan:
        """What is found once all fits are made."""
        return self._plan

    @property
    def parameters_to_fit(self) -> tuple[str, ...]:
        """Names of the parameters that are estimated."""
        return tuple(self._estimated)

    def weights(self) -> dict[str, Tensor]:
        """The estimates that have been made so far."""
        return {name: self._buffer(key) for name, key in self._estimated.items() if name in self._found}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}noise_factor", None)  # of earlier runs; it was always one
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._found = set(self._estimated)

    def keep(self, layer: Layer, values: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        """Store a layer's estimates.

        Args:
            layer: whose they are.
            values: ``weight`` and ``bias`` → value.
            seen: the same → bool, which entries the public images determined; a unit that is off in all of them leaves
                its weights open.
        """
        for role, name in layer.parameters.items():
            key = self._estimated[name]
            for buffer, given in ((self._buffer(key), values[role]), (self._buffer(_seen(key)), seen[role])):
                buffer.copy_(given.reshape(buffer.shape))
            self._found.add(name)

    def weights_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The estimates in another inversion's state, by parameter name."""
        return {name: state[key] for name, key in self._estimated.items() if key in state}

    def keep_matched(self, values: Mapping[str, Tensor]) -> None:
        """Store estimates by parameter name, of weights that no closed form gave."""
        for name, value in values.items():
            self._buffer(self._estimated[name]).copy_(value)
            self._found.add(name)

    def keep_prior(self, name: str, mean: Tensor, precision: Tensor) -> None:
        """Store what is known beforehand of a layer's result."""
        self._buffer(f"{self._priors[name]}_mean").copy_(mean)
        self._buffer(f"{self._priors[name]}_precision").copy_(precision)

    def fits(self, matching_epochs: int = 20, start: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[PairFit]:
        """One pass over the pairs each; to be finished before the next is asked for.

        Args:
            matching_epochs: passes of gradient matching for the weights that no closed form reaches.
            start: parameter name → value that gradient matching starts from.
        """
        for step in self.steps:
            yield self.fit_of(step)
            yield from refits(self, step)
        if self.unreachable:
            yield from matching_fits(self, self.unreachable, matching_epochs, 0, start)
        if self._priors:
            yield PriorFit(self, list(self._priors))

    def fit_of(self, step: FitStep) -> PairFit:
        """One of ``steps``, when those before it are finished."""
        if step.way is Way.LOGITS:
            return HeadFit(self, step.layer)
        return ConservationFit(self, step.layer) if step.way is Way.CONSERVED else OutputFit(self, step)

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The fitted weights; the last layer's up to a row common to all classes."""
        head = set(self.architecture[self.architecture.output].parameters.values())
        return {name: ParameterEstimate(value, name in head) for name, value in self.weights().items()}

    def current_plan(self) -> Plan:
        """What is found with the weights that have been fitted so far."""
        found = set(self.weights())
        if len(found) == len(self._estimated):
            return self._plan
        return plan_walk(self.architecture, self.rules, found, self.n_images, stacked=False)

    def usable(self, gradients: Gradients, plan: Plan | None = None) -> Leaks:
        """The leaks that are finite and not zero, in float64, with their noise.

        Args:
            gradients: of all parameters.
            plan: the only one that is to be carried out, of whose layers alone gradients are kept, and the last one's;
                None: any.
        """
        head = self.rules[self.architecture.output]
        last_weight = None
        if isinstance(head, AffineRule) and (by_factor(head) or head.reveals_delta()):
            last_weight = None if head.weight in self.architecture.sketched else head.weight
        used = self._used
        if plan is not None:
            layers = [self.architecture[self.architecture.output], *(action.layer for action in plan.actions)]
            used = {name for layer in layers for name in layer.parameters.values()}
        return usable_leaks(gradients, used, self._noise, last_weight)

    def unseen_acts(self, layer: Layer, gradients: Gradients) -> Tensor:
        """``(B, inputs)`` bool: at which inputs of a layer weights have a gradient that no public image determined.

        Units that ReLU keeps off in nearly all images are of that kind.
        """
        name = layer.parameters["weight"]
        acts = (gradients[name] != 0) & ~self._buffer(_seen(self._estimated[name]))
        return acts.flatten(3).any(dim=3).any(dim=1) if acts.dim() > 3 else acts.any(dim=1)

    def find(self, leaks: Leaks, plan: Plan | None = None) -> Found:
        """What the equations give, with the weights that have been found so far; nothing of no leaks.

        Args:
            leaks: as of `usable`, for the same plan.
            plan: part of `current_plan`; None: all of it.
        """
        if not leaks.n:
            return Found({}, {}, leaks.which)
        weights = self.weights()
        its = (plan or self.current_plan(), leaks.gradients, leaks.noise, weights, self._current_priors(), leaks.dtype)
        found = walk(self.architecture, self.rules, *its, seen=self._seen_by_factor())
        fitted = self.steps if len(weights) == len(self._estimated) else ()
        for layer in (step.layer for step in fitted if step.layer.parameters["weight"] in leaks.gradients):
            unseen = self.unseen_acts(layer, leaks.gradients).any(dim=1)
            found.status = worsen(found.status, unseen, Status.UNSEEN)
        if self.steps:
            delta = last_delta(self.rules[self.architecture.output], leaks)
            found.status = worsen(found.status, rounded(delta, leaks.noise), Status.ROUNDED)
        if IMAGE in found.values:
            doubt = doubtful(self.architecture, its[0], found, leaks, weights)
            found.status = worsen(found.status, doubt, Status.ESTIMATE)
        return found

    def _seen_by_factor(self) -> Tensor | None:
        """At which inputs public images determined the weight of a last layer without a bias, ``(features,)`` bool."""
        rule = self.rules[self.architecture.output]
        if not by_factor(rule) or rule.weight not in self._found:
            return None
        return self._buffer(_seen(self._estimated[rule.weight]))[0]

    def _current_priors(self) -> Mapping[str, Prior]:
        if len(self.weights()) < len(self._estimated):
            return {}
        priors = {}
        for name, key in self._priors.items():
            mean, precision = self._buffer(f"{key}_mean"), self._buffer(f"{key}_precision")
            if not bool(precision[0, 0] > 0):
                continue
            # Its factorisation takes as long as an image: once, as long as the buffers are what they were.
            state = (id(precision), precision._version, mean._version)
            if name not in self._made_priors or self._made_priors[name][0] != state:
                self._made_priors[name] = (state, Prior(mean, precision.double()))
            priors[name] = self._made_priors[name][1]
        return priors

    def _buffer(self, name: str) -> Tensor:
        buffer = getattr(self, name)
        assert isinstance(buffer, Tensor)
        return buffer
