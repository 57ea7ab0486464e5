"""Which leaked weights can be fitted from pairs, in which order, and the fits themselves."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.conservation import conserved
from gitlight.generators.exact.equations import conservation_equations, logit_equations, output_equations
from gitlight.generators.exact.factor import by_factor
from gitlight.generators.exact.forward import computable
from gitlight.generators.exact.plan import advice_for_few_pairs, plan_walk
from gitlight.generators.exact.rule import InverseRule
from gitlight.generators.exact.solvability import Do, Known
from gitlight.generators.exact.weights import AffineFit, LeastSquares, LogitFit, solve_all

if TYPE_CHECKING:
    from gitlight.generators.exact.inversion import Inversion

_LARGEST_SUMS = 1 << 25
"""Entries of the triangular factors that a layer's weight is fitted from, 256 MiB."""


_MOST_REFITS, _STAYS = 11, 1e-6
"""Of the last layer without a bias; and the weight's relative change up to which it stays as it is."""


class Way(StrEnum):
    """How a layer's weight is found."""

    LOGITS = "from its input and the logarithms of the softmax probabilities"
    CONSERVED = "from the conservation law of its activation, by gradients alone"
    FROM_ABOVE = "from its input and output, both solved from gradients"
    FROM_BELOW = "from its input, computed from public images, and its output, solved from gradients"


@dataclass(frozen=True)
class FitStep:
    """One layer's fit."""

    way: Way
    layer: Layer


def plan_fits(
    architecture: Architecture, rules: Mapping[str, InverseRule], n_images: int, every_weight: bool = False
) -> tuple[tuple[FitStep, ...], tuple[str, ...]]:
    """The fits to make, in order; and the names of layers whose weights the walk needs and nothing reaches.

    None where the image is found without any weight, but for ``every_weight``. Of a layer with a parameter that does
    not leak there is none: nothing tells its value.
    """
    if n_images > 1:
        return (), ()
    if not every_weight and plan_walk(architecture, rules, (), 1).known.get(IMAGE) is Known.EXACT:
        return (), ()
    steps: list[FitStep] = []
    fitted: set[str] = set()

    def take(way: Way, layer: Layer) -> None:
        steps.append(FitStep(way, layer))
        fitted.update(layer.parameters.values())

    head = architecture[architecture.output]
    rule = rules[head.name]
    whole = set(architecture.parameter_shapes) - set(architecture.sketched)
    if by_factor(rule) or (isinstance(rule, AffineRule) and rule.reveals_delta() in whole and rule.weight in whole):
        take(Way.LOGITS, head)
    # A sketch of a weight's gradient neither solves for the layer's input nor obeys a conservation law.
    if not steps or architecture.chain_break is not None or architecture.sketched:
        return tuple(steps), ()
    affine = [layer for layer in architecture.layers if isinstance(rules[layer.name], AffineRule)]
    remaining = [layer for layer in affine if layer.name != head.name and not layer.constants]
    if conserved(architecture, rules):
        for layer in reversed(remaining):
            take(Way.CONSERVED, layer)
        return tuple(steps), ()
    while remaining:
        known = plan_walk(architecture, rules, fitted, 1, stacked=False).known
        from_below = remaining[0].inputs[0] in computable(architecture, fitted)
        step = _next_step(remaining, rules, known, from_below, lowest_first=not every_weight)
        if step is None:
            break
        take(step.way, step.layer)
        remaining.remove(step.layer)
    # Gradient matching runs the whole model.
    matched = {name for layer in remaining for name in layer.parameters.values()}
    possible = architecture.output in computable(architecture, fitted | matched)
    return tuple(steps), tuple(layer.name for layer in remaining) if possible else ()


def needed_fits(
    architecture: Architecture,
    rules: Mapping[str, InverseRule],
    fits: tuple[tuple[FitStep, ...], tuple[str, ...]],
    n_images: int,
    stacked: bool,
    depth: int | None,
    separated: int | None = None,
) -> tuple[tuple[FitStep, ...], tuple[str, ...]]:
    """Of what `plan_fits` gives, as much as a walk gains from; each fit may need those before it.

    Args:
        architecture: the leaked model's.
        rules: of all layers.
        fits: all of them, and the layers that would be matched.
        n_images: images per leak.
        stacked: whether the walk uses forward equations.
        depth: the most layers whose inputs are wanted; None: all.
        separated: images of a client batch that the walk takes apart; None: it is that of single images.
    """
    steps, unreachable = fits
    layers = [*(step.layer for step in steps), *(architecture[name] for name in unreachable)]

    def found(count: int) -> object:
        weights = {name for layer in layers[:count] for name in layer.parameters.values()}
        if separated is not None:
            plan = plan_walk(architecture, rules, weights, separated, stacked=False, separated=True).first(depth)
            ends = [(action.layer.name, plan.known[action.layer.inputs[0]]) for action in plan.solves]
            from_single = known_of_single_images(architecture, rules, weights)
            return ends, [action.layer.inputs[0] in from_single for action in plan.solves]
        plan = plan_walk(architecture, rules, weights, n_images, stacked)
        if depth is None:
            return plan.known
        plan, from_images = plan.first(depth), computable(architecture, weights)
        inputs = [(action.do, action.layer.inputs[0]) for action in plan.solves]
        return plan.actions, [(plan.known[name], do is Do.SOLVE or name in from_images) for do, name in inputs]

    # Forward equations make more of the last layer's input, too.
    least = 1 if (stacked or separated) and steps else 0
    wanted = found(len(layers))
    return next(((steps[:count], ()) for count in range(least, len(steps) + 1) if found(count) == wanted), fits)


def known_of_single_images(
    architecture: Architecture, rules: Mapping[str, InverseRule], weights: Collection[str]
) -> set[str]:
    """Results that are known of public images, with these weights: exactly from their gradients, or computed."""
    known = plan_walk(architecture, rules, weights, 1, stacked=False).known
    return computable(architecture, weights) | {name for name, how in known.items() if how is Known.EXACT}


def _next_step(
    remaining: Sequence[Layer],
    rules: Mapping[str, InverseRule],
    known: Mapping[str, Known],
    from_below: bool,
    lowest_first: bool,
) -> FitStep | None:
    """The next fit that can be made.

    Args:
        remaining: layers without a fitted weight, from the image up.
        rules: of all layers.
        known: what a walk with the weights fitted so far finds.
        from_below: whether the input of the lowest of them follows from the public images.
        lowest_first: whether that one is tried before those above it, whose inputs may then be computed; or after them,
            where it may be left out: of a first linear layer there are as many weights as pixels for each output.
    """
    lowest = remaining[0]
    for layer in (lowest, *reversed(remaining)) if lowest_first else (*reversed(remaining[1:]), lowest):
        rule = rules[layer.name]
        assert isinstance(rule, AffineRule)
        if layer.name not in known or known[layer.name] is Known.PARTLY or rule.groups != 1:
            continue
        if layer is lowest and from_below:
            return FitStep(Way.FROM_BELOW, layer)
        if known[layer.name] is Known.EXACT and known.get(layer.inputs[0]) is Known.EXACT:
            return FitStep(Way.FROM_ABOVE, layer)
    return None


def affordable(step: FitStep, rule: InverseRule) -> bool:
    """Whether the sums that a fit is made from are of a size that can be kept."""
    assert isinstance(rule, AffineRule)
    shape = rule.layer.weight_shape
    n_outputs, n_inputs = shape[0], 1 + prod(shape[1:])
    if step.way in (Way.LOGITS, Way.CONSERVED):
        return n_outputs * n_inputs**2 <= _LARGEST_SUMS
    return (n_inputs + n_outputs) ** 2 <= _LARGEST_SUMS


class HeadFit:
    """The `PairFit` of the last layer."""

    def __init__(self, inversion: "Inversion", layer: Layer) -> None:
        self._inversion, self._layer = inversion, layer
        self._fit = LogitFit(layer.output_shape[-1], by_factor="bias" not in layer.parameters)

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        inversion, layer = self._inversion, self._layer
        plan = inversion.current_plan().up_to(layer.inputs, [layer.name])
        leaks = inversion.usable(gradients, plan)
        if not leaks.n:
            return
        equations = logit_equations(leaks, inversion.find(leaks, plan), layer)
        self._fit.add(*equations, torch.finfo(leaks.dtype).eps)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self._fit.sums()

    def finish(self) -> None:
        """Keep the weight."""
        weight, bias, determined = self._fit.solve(advice_for_few_pairs(self._inversion.plan))
        values = {"weight": weight, "bias": bias}
        seen = {"weight": determined.expand_as(weight), "bias": torch.ones_like(bias, dtype=torch.bool)}
        self._inversion.keep(self._layer, values, seen)


def refits(inversion: "Inversion", step: FitStep) -> Iterator[HeadFit]:
    """Of a last layer without a bias alone, more fits after the first, until the weight stays as it is.

    The scale of an input is guessed before the first, and follows from the weight after it; most are as good as right
    at once, and the others are weighed by how sure they are.
    """
    name, most = step.layer.parameters["weight"], _MOST_REFITS if by_factor(inversion.rules[step.layer.name]) else 0
    for _ in range(most):
        before = inversion.weights()[name].clone()
        yield HeadFit(inversion, step.layer)
        now = inversion.weights()[name]
        if float((now - before).norm()) <= _STAYS * float(now.norm()):
            return


class OutputFit:
    """The `PairFit` of a layer whose input and output are known: from below or from above."""

    def __init__(self, inversion: "Inversion", step: FitStep) -> None:
        self._inversion, self._step = inversion, step
        self._fit = AffineFit()

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        inversion, layer = self._inversion, self._step.layer
        from_below = self._step.way is Way.FROM_BELOW
        plan = inversion.current_plan().up_to([layer.name] if from_below else [layer.name, *layer.inputs])
        leaks = inversion.usable(gradients, plan)
        if not leaks.n:
            return
        public = images[leaks.which, 0] if from_below else None
        self._fit.add(*output_equations(inversion, inversion.find(leaks, plan), layer, public))

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self._fit.sums()

    def finish(self) -> None:
        """Keep weight and bias."""
        layer = self._step.layer
        values, seen = self._fit.solve(f"the weight of {layer.place}")
        self._inversion.keep(layer, values, seen)


class ConservationFit:
    """The `PairFit` of a layer by the conservation law of `gitlight.generators.exact.conservation`."""

    def __init__(self, inversion: "Inversion", layer: Layer) -> None:
        self._inversion, self._layer = inversion, layer
        n_outputs = inversion.architecture.parameter_shapes[layer.parameters["weight"]][0]
        self._squares = [LeastSquares() for _ in range(n_outputs)]

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        inversion, layer = self._inversion, self._layer
        leaks = inversion.usable(gradients)
        if not leaks.n:
            return
        rows, shares, weights = conservation_equations(inversion, leaks, layer)
        for output, squares in enumerate(self._squares):
            squares.add(rows[:, output], shares[:, output : output + 1], weights[:, output])

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [total for squares in self._squares for total in squares.sums()]

    def finish(self) -> None:
        """Keep weight and bias."""
        solved = solve_all(self._squares, f"the weight of {self._layer.place}")
        rows = torch.stack([solution.squeeze(1) for solution, _ in solved])
        determined = torch.stack([its for _, its in solved])
        n_weights = rows.shape[1] - ("bias" in self._layer.parameters)
        values = {"weight": rows[:, :n_weights], "bias": rows[:, -1]}
        seen = {"weight": determined[:, :n_weights], "bias": determined[:, -1]}
        self._inversion.keep(self._layer, values, seen)
