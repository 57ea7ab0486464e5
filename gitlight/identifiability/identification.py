"""`identify`: which layers' inputs, and so which images, the gradients of an architecture determine.

What an attack would do is asked of the attack's own plan, so that the report cannot promise what it does not do. How
well its equations determine each layer's input is computed at random images and at random weights: of the leaked
model's initialisation, but never the leaked ones.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

import torch

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.config import Config
from gitlight.data.classes import count_classes
from gitlight.generators.exact.activations import SigmoidRule, TanhRule
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.fits import Way
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.exact.plan import Action, plan_walk
from gitlight.generators.exact.rule import OUTPUT, Estimate
from gitlight.generators.exact.separated import SeparatedFeatures, can_separate
from gitlight.generators.exact.solvability import Do, Known
from gitlight.gradients.updates import describe_leak
from gitlight.identifiability.drawn import DrawnLeak, draw_leaks
from gitlight.identifiability.report import MOST_SATURATED, IdentifiabilityReport, LayerReport, Verdict
from gitlight.identifiability.systems import System, measure
from gitlight.leaked.model import LeakedModel


def identify(config: Config) -> IdentifiabilityReport:
    """The identifiability report of a config's leaked model.

    Args:
        config: of which ``leaked`` and the images' shape and number of classes are used; no image is read, and no
            leaked weight.

    Raises:
        ArchitectureError: the leaked model cannot be traced.
        ConfigError: its settings do not fit.

    >>> from gitlight.config import FullyConnectedConfig
    >>> report = identify(Config(leaked=FullyConnectedConfig(hidden_sizes=[6])))
    >>> [layer.words for layer in report.layers]
    ['exact from the gradient alone', 'exact from the gradient alone']
    """
    data = config.data
    n_classes, assumed = count_classes(data)
    # Never the leaked weights themselves.
    settings = dataclasses.replace(config.leaked, seed=config.leaked.seed + 1, weights=None)
    leaked = LeakedModel(settings, (data.channels, data.image_size, data.image_size), n_classes)
    notes = []
    if assumed:
        notes.append(f"{n_classes} classes are assumed; there is no folder of data.name={data.name} to count them in.")
    leak = describe_leak(config.gradients.updates, data.client_batch_size)
    if data.client_batch_size > 1:
        notes.append(
            f"All this is for one image per leak. Of the average over data.client_batch_size={data.client_batch_size} "
            f"images {_of_client_batches(leaked.architecture, leak, data.client_batch_size)}."
        )
    if leak != "gradient":
        notes.append(f"All this is for gradients. Of updates of several local steps, {leak}, nothing is exact.")
    inversion = Inversion(leaked.architecture, None, 1, strict=False)
    leaks = draw_leaks(leaked.network, leaked.architecture)
    layers = tuple(layer_reports(inversion, leaks))
    image_is = _image_is(inversion, layers)
    saturated = _saturated(inversion, leaks)
    headline = (
        _what_is_found(inversion, image_is, layers),
        *_limits(inversion, saturated),
        _what_it_takes(inversion, image_is),
    )
    return IdentifiabilityReport(
        leaked=config.leaked.name,
        activation=config.leaked.activation,
        image=leaked.architecture.image_shape,
        n_classes=n_classes,
        n_images=len(leaks),
        image_is=image_is,
        headline=headline,
        layers=layers,
        lost=_lost(inversion),
        saturated=saturated,
        notes=tuple(notes),
    )


def _of_client_batches(architecture: Architecture, leak: str, n_images: int) -> str:
    """In words, what is found of each image of a client batch."""
    if leak != "gradient" or not can_separate(architecture, n_images):
        return "nothing is exact"
    features = SeparatedFeatures(architecture, None, n_images).features
    if features[-1].result == IMAGE and features[-1].exact:
        return "each one can mostly be found (hybrid does)"
    found = ", ".join(f"{feature.name}{'' if feature.exact else ' (an estimate)'}" for feature in features)
    return f"each one's {found} can mostly be found (hybrid does)"


def layer_reports(inversion: Inversion, leaks: list[DrawnLeak]) -> Iterator[LayerReport]:
    """From the output to the image."""
    architecture, rules, plan = inversion.architecture, inversion.rules, inversion.plan
    solved = {action.layer.name: action.do for action in plan.actions if action.do in (Do.SOLVE, Do.STACK, Do.BOUND)}
    without_weights = plan_walk(architecture, rules, (), 1).known
    for layer in reversed(architecture.layers):
        rule = rules[layer.name]
        if not isinstance(rule, AffineRule) or rule.weight is None:
            continue
        do = solved.get(layer.name)
        measured = [measure(architecture, rules, rule, leak, do in (Do.STACK, Do.BOUND)) for leak in leaks]
        stacked = do is not Do.SOLVE and measured[0].stacked is not None
        systems = [one.stacked if stacked else one.gradient for one in measured]
        system = _typical([one for one in systems if one is not None])
        verdict = _verdict(inversion, layer, system, without_weights.get(layer.inputs[0]) is Known.EXACT)
        reason = plan.obstacles.get(layer.name, "")
        if verdict is Verdict.UNDERDETERMINED and do is Do.BOUND:
            reason = "what units that are off and bounds of values say (inequalities), and then a prior, take over"
        elif verdict is Verdict.UNDERDETERMINED and plan.known[layer.inputs[0]] is Known.EXACT:
            reason = "there are enough equations, but they depend on one another"
        yield LayerReport(
            name=layer.name,
            kind=layer.kind,
            unknowns=rule.n_inputs,
            gradient_equations=architecture.parameter_shapes[rule.weight].numel(),
            forward_equations=round(sum(one.forward_equations for one in measured) / len(measured)),
            gradient_rank=_rank(one.gradient for one in measured),
            stacked_rank=_rank(one.stacked for one in measured),
            condition=None if system is None else system.condition,
            noise_amplification=None if system is None else system.amplification,
            reached=layer.name in plan.deltas,
            verdict=verdict,
            open=rule.n_inputs - system.rank if verdict is Verdict.UNDERDETERMINED and system is not None else 0,
            reason=reason,
        )


def _verdict(inversion: Inversion, layer: Layer, system: System | None, needs_no_weight: bool) -> Verdict:
    """The plan's, refined by the rank of the system that the attack solves."""
    plan = inversion.plan
    if layer.name in plan.obstacles:
        return Verdict.NOT_REACHED
    rule = inversion.rules[layer.name]
    assert isinstance(rule, AffineRule)
    if system is not None and system.rank < rule.n_inputs:
        return Verdict.UNDERDETERMINED
    if layer.name in _estimated_deltas(inversion):
        return Verdict.ABOVE
    if plan.known[layer.inputs[0]] is Known.EXACT:
        return Verdict.GRADIENT if needs_no_weight else Verdict.WEIGHTS
    return Verdict.OPEN if system is None else Verdict.HERE


def _estimated_deltas(inversion: Inversion) -> set[str]:
    """Layers whose ``δ`` is known, but passed a unit whose state is an estimate, such as that of a ReLU."""
    estimated: set[str] = set()
    for action in inversion.plan.actions:
        if action.do is Do.CARRY and (action.layer.name in estimated or _needs_an_estimate(inversion, action)):
            estimated.add(action.layer.inputs[action.position])
    return estimated


def _needs_an_estimate(inversion: Inversion, action: Action) -> bool:
    needs_output = inversion.rules[action.layer.name].carry_needs == OUTPUT
    return needs_output and inversion.plan.known.get(action.layer.name) is Known.ESTIMATE


def _typical(systems: list[System]) -> System | None:
    """The median of each number; None where nothing was computed."""
    if not systems:
        return None
    return System(
        int(median(one.rank for one in systems)),
        median(one.condition for one in systems),
        median(one.amplification for one in systems),
    )


def _rank(systems: Iterator[System | None]) -> int | None:
    ranks = [one.rank for one in systems if one is not None]
    return int(median(ranks)) if ranks else None


def _image_is(inversion: Inversion, layers: tuple[LayerReport, ...]) -> str:
    """The plan's word on the image, unless the ranks of what it is computed from say otherwise."""
    known = inversion.plan.known.get(IMAGE)
    if known is None:
        return "not reached"
    exact = {layer.name for layer in layers if layer.verdict.exact}
    moved = {IMAGE}  # the image, and what is made of it before the first layer with a weight
    for layer in inversion.architecture.layers:
        if not moved.isdisjoint(layer.inputs):
            if known is Known.EXACT and layer.name in exact:
                return "exact"
            if not isinstance(inversion.rules[layer.name], AffineRule):
                moved.add(layer.name)
    return "estimate"


def _what_is_found(inversion: Inversion, image_is: str, layers: tuple[LayerReport, ...]) -> str:
    if image_is == "exact":
        return "The image is exact: the equations of one image's gradient determine it."
    weak = next((layer for layer in layers if not layer.verdict.exact), None)
    found = "an estimate" if image_is == "estimate" else "not reached"
    if weak is None:
        return f"The image is {found}: {_lost_below(inversion)}."
    if image_is == "estimate":
        return f"The image is an estimate: the input of {weak.kind} {weak.name!r} is {weak.words}."
    if weak.verdict is Verdict.NOT_REACHED:
        return f"The image is not reached: the walk stops above {weak.kind} {weak.name!r}, since {weak.reason}."
    return f"The image is not reached: the input of {weak.kind} {weak.name!r} is {weak.words}."


def _lost_below(inversion: Inversion) -> str:
    """What keeps an image from being exact of which all inputs of layers with weights are."""
    known = inversion.plan.known
    for layer in reversed(inversion.architecture.layers):
        rule = inversion.rules[layer.name]
        if layer.name not in known or isinstance(rule, AffineRule):
            continue
        needed = (*layer.parameters.values(), *layer.constants.values())
        if missing := [name for name in needed if name not in inversion.parameters_to_fit]:
            return f"{layer.place} takes {', '.join(missing)}, which no gradient tells"
        if rule.loses and (rule.inverts == "partly" or any(name not in known for name in layer.inputs)):
            return f"{layer.place} loses {rule.loses}"
    return "what is known of the layers above does not tell it"


def _limits(inversion: Inversion, saturated: dict[str, float]) -> Iterator[str]:
    """What precision, not the equations, keeps from being exact."""
    passed = {action.layer.name for action in inversion.plan.actions if action.do is Do.CARRY}
    names = [name for name, share in saturated.items() if share > MOST_SATURATED and name in passed]
    if names:
        yield f"That is so but for rounding: units of {', '.join(names)} are saturated, so float32 gives estimates."


def _what_it_takes(inversion: Inversion, image_is: str) -> str:
    if not inversion.steps:
        needs = "No weight is needed, and so no pair" if image_is == "exact" else "No weight can be fitted"
        return f"{needs}."
    by_way: dict[str, list[str]] = defaultdict(list)
    for step in inversion.steps:
        by_way[step.way].append(step.layer.name)
    ways = [f"{', '.join(names)} {way}" for way, names in by_way.items()]
    if inversion.unreachable:
        ways.append(f"{', '.join(inversion.unreachable)} by gradient matching, which may fail")
    fitted = f"Weights are fitted: {'; '.join(ways)}."
    if inversion.unreachable or any(step.way is Way.FROM_BELOW for step in inversion.steps):
        return f"{fitted} That takes pairs."
    if image_is == "exact":
        return f"{fitted} That takes many leaks, but not their images."
    if image_is == "estimate":
        return f"{fitted} That takes many leaks; a prior takes public images."
    return f"{fitted} That takes many leaks; the regression that stands in for the rest takes pairs."


def _lost(inversion: Inversion) -> tuple[tuple[tuple[str, ...], str, str], ...]:
    """Operations without a row in the table that lose information, those alike together."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layer in reversed(inversion.architecture.layers):
        rule = inversion.rules[layer.name]
        if rule.loses and not (isinstance(rule, AffineRule) and rule.weight is not None):
            alike[layer.kind, rule.loses].append(layer.name)
    return tuple((tuple(names), kind, what) for (kind, what), names in alike.items())


def _saturated(inversion: Inversion, leaks: list[DrawnLeak]) -> dict[str, float]:
    """Activation → mean share of its units at their bounds, for errors of float32's size."""
    rounding = torch.tensor(torch.finfo(torch.float32).eps, dtype=torch.float64).square()
    shares = {}
    for name, rule in inversion.rules.items():
        if isinstance(rule, SigmoidRule | TanhRule):
            at_bounds = [rule.saturated(Estimate(leak.values[name], rounding)) for leak in leaks]
            shares[name] = float(torch.cat(at_bounds).mean())
    return shares
