"""What can be found, in which order, given which weights are known: the same for the attack and for the report."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.factor import by_factor
from gitlight.generators.exact.forward import computable
from gitlight.generators.exact.joint import solved_jointly
from gitlight.generators.exact.rule import NOTHING, OUTPUT, InverseRule, rule_for
from gitlight.generators.exact.solvability import Do, Known, how_to_solve, how_well_jointly, produced_by_relu

_SOLVING = (Do.SOLVE, Do.STACK, Do.BOUND)


@dataclass(frozen=True)
class Action:
    """``do`` at ``layer``, for its input number ``position``."""

    do: Do
    layer: Layer
    position: int = 0


@dataclass(frozen=True)
class Plan:
    """What a walk from the output down does, and what it finds.

    Attributes:
        actions: in order.
        known: name of a layer, or `IMAGE` → how well its result is known.
        deltas: names of layers whose ``δ`` is known.
        obstacles: name of a layer with a weight whose input is not found → why, in words.
    """

    actions: tuple[Action, ...]
    known: Mapping[str, Known]
    deltas: frozenset[str]
    obstacles: Mapping[str, str]

    @property
    def solves(self) -> tuple[Action, ...]:
        """The actions that solve for a layer's input, from the output down."""
        return tuple(action for action in self.actions if action.do in _SOLVING)

    def first(self, depth: int | None) -> "Plan":
        """The plan that ends with the first ``depth`` inputs, and with what they are made of; None: all."""
        if depth is None or depth > len(self.solves) or not self.solves:
            return self
        places = [place for place, action in enumerate(self.actions) if action.do in _SOLVING] + [len(self.actions)]
        down, undo = self.actions[: places[depth - 1] + 1], self.actions[places[depth - 1] + 1 : places[depth]]
        return replace(self, actions=(*down, *(action for action in undo if action.do is Do.INVERT)))

    def up_to(self, values: Collection[str], deltas: Collection[str] = ()) -> "Plan":
        """The plan that ends once these results, and the ``δ`` of these, are found; of those that never are, no more.

        Args:
            values: names of layers, or `IMAGE`.
            deltas: names of layers.
        """
        last = 0
        for place, action in enumerate(self.actions, start=1):
            below = action.layer.inputs[action.position]
            found = {Do.REVEAL: action.layer.name in deltas, Do.CARRY: below in deltas}
            if found.get(action.do, below in values):
                last = place
        return replace(self, actions=self.actions[:last])


class NoRule(InverseRule):
    """Stands for an operation that has no rule, where the walk may end above it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.loses = "everything: there is no inverse rule for it"


def rules_of(architecture: Architecture, strict: bool) -> dict[str, InverseRule]:
    """Name of each layer → its rule.

    What is computed from parameters alone, such as a standardised kernel, holds nothing of an image: it needs no rule.

    Raises:
        ArchitectureError: a layer has none, and ``strict``.
    """
    rules: dict[str, InverseRule] = {}
    from_image = {IMAGE}
    for layer in architecture.layers:
        if from_image.isdisjoint(layer.inputs):
            rules[layer.name] = InverseRule(layer)
            continue
        from_image.add(layer.name)
        try:
            rules[layer.name] = rule_for(layer)
        except ArchitectureError:
            if strict:
                raise
            rules[layer.name] = NoRule(layer)
    return rules


def advice_for_few_pairs(plan: Plan) -> str:
    """What helps if there are too few for the last layer's weight, with which all that is below it is solved."""
    if len(plan.solves) < 2:
        return ""
    return "With so few, hybrid that ends at that layer may be better: generator.name=hybrid generator.exact_depth=1."


def plan_walk(
    architecture: Architecture,
    rules: Mapping[str, InverseRule],
    weights: Collection[str],
    n_images: int,
    stacked: bool = True,
    through_estimates: bool = False,
    separated: bool = False,
) -> Plan:
    """Plan the walk.

    Args:
        architecture: the leaked model's.
        rules: of all its layers.
        weights: names of the parameters that are known, or will be.
        n_images: images per leak. With more than one that are not ``separated``, nothing is carried down: an average of
            ``δ ⊗ a`` is not ``δ ⊗ a`` of averages.
        stacked: whether forward equations are used where weights are known. Fits do without: gradient equations alone
            are a hundred times cheaper, and exact where anything is fitted.
        through_estimates: whether ``δ`` is carried through activations of which there is only an estimate, as the
            paper's walk does.
        separated: whether the last layer's input and ``δ`` are known of each image: then each image's ``δ`` is carried
            down, and a gradient is a sum over all of them.
    """
    from_images = computable(architecture, weights) if separated else set()
    consumers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for layer in architecture.layers:
        for position, name in enumerate(layer.inputs):
            consumers[name].append((layer.name, position))
    uses = Counter(name for layer in architecture.layers for name in layer.parameters.values())
    known: dict[str, Known] = {}
    deltas: set[str] = set()
    carried: dict[str, int] = defaultdict(int)
    guessed: set[str] = set()  # whose δ rests on an estimate of which units were on
    obstacles: dict[str, str] = {}
    actions: list[Action] = []
    blame: dict[str, str] = {}  # layer whose δ is not known → why
    for layer in reversed(architecture.layers):
        rule = rules[layer.name]
        revealed = rule.reveals_delta()
        # A parameter that is repeated over entries, or used twice, has a sum of several δ for a gradient.
        if (
            revealed is not None
            and (layer.name == architecture.output or not separated)
            and uses[revealed] == 1
            and revealed not in architecture.sketched
            and architecture.parameter_shapes[revealed].numel() == prod(layer.output_shape)
        ):
            deltas.add(layer.name)
            guessed.discard(layer.name)
            actions.append(Action(Do.REVEAL, layer))
        elif by_factor(rule) and n_images == 1:
            deltas.add(layer.name)
            actions.append(Action(Do.REVEAL, layer))
            if rule.weight not in weights:
                guessed.add(layer.name)  # up to a factor
        elif carried[layer.name] and carried[layer.name] == len(consumers[layer.name]):
            deltas.add(layer.name)
        has_delta = layer.name in deltas
        if isinstance(rule, AffineRule) and rule.weight is not None:
            if uses[rule.weight] > 1:
                obstacles[layer.name] = f"{rule.weight} is used {uses[rule.weight]} times, and its gradient is a sum"
            elif rule.weight in architecture.sketched:
                obstacles[layer.name] = f"of the gradient of {rule.weight} there is only a sketch"
            elif has_delta and separated and (reason := solved_jointly(rule, n_images)) is not None:
                obstacles[layer.name] = reason
            elif has_delta:
                if separated:
                    above = None if layer.name == architecture.output else known.get(layer.name)
                    truth = rule.exact or layer.inputs[0] in from_images
                    do, how_well = Do.SOLVE, how_well_jointly(rule, layer, architecture, n_images, above, truth)
                elif stacked and n_images == 1:
                    after_relu = produced_by_relu(layer, architecture)
                    do, how_well = how_to_solve(rule, known.get(layer.name), after_relu, weights)
                else:
                    do, how_well = Do.SOLVE, Known.EXACT if rule.exact and n_images == 1 else Known.ESTIMATE
                actions.append(Action(do, layer))
                known[layer.inputs[0]] = Known.ESTIMATE if layer.name in guessed else how_well
            else:
                obstacles[layer.name] = blame.get(layer.name, "δ of its output is not known")
        elif rule.inverts != "no" and layer.name in known:
            for position, name in enumerate(layer.inputs):
                others = [known.get(other) for other in layer.inputs]
                if name not in known and _invertible(rule, layer, position, others, weights):
                    actions.append(Action(Do.INVERT, layer, position))
                    known[name] = (
                        Known.PARTLY if rule.inverts == "partly" and layer.kind != "add" else known[layer.name]
                    )
        for position, name in enumerate(layer.inputs):
            if name == IMAGE:
                continue  # nothing asks for the image's δ
            mixed = 1 if separated else n_images
            reason = _not_carried(rule, layer, position, has_delta, known, weights, mixed, stacked, through_estimates)
            if reason is None:
                actions.append(Action(Do.CARRY, layer, position))
                carried[name] += 1
                on_estimate = rule.carry_needs == OUTPUT and known[layer.name] is Known.ESTIMATE
                if on_estimate or not rule.carry_exact or (layer.name in guessed and rule.reveals_delta() is None):
                    guessed.add(name)
            elif name not in blame:
                blame[name] = blame.get(layer.name, reason) if not has_delta else reason
    return Plan(tuple(actions), known, frozenset(deltas), obstacles)


def _invertible(
    rule: InverseRule, layer: Layer, position: int, others: list[Known | None], weights: Collection[str]
) -> bool:
    if layer.kind == "add":
        parameter = next(iter(layer.parameters.values()), None)
        if parameter is not None:
            return parameter in weights
        return others[1 - position] is not None if len(others) == 2 else not layer.constants
    return all(name in weights for name in (*layer.parameters.values(), *layer.constants.values()))


def _not_carried(
    rule: InverseRule,
    layer: Layer,
    position: int,
    has_delta: bool,
    known: Mapping[str, Known],
    weights: Collection[str],
    n_images: int,
    stacked: bool,
    through_estimates: bool,
) -> str | None:
    """Why ``δ`` does not pass a layer; None if it does."""
    if not has_delta:
        return f"δ of {layer.place} is not known"
    if n_images > 1:
        return f"with {n_images} images per leak, δ is not known below {layer.place}"
    if isinstance(rule, NoRule):
        return f"there is no inverse rule for {layer.place}"
    needed = (*layer.parameters.values(), *layer.constants.values())
    if isinstance(rule, AffineRule):
        needed = (rule.weight,) if rule.weight is not None else needed
    if rule.carries_without_weights:
        needed = ()
    missing = [name for name in needed if name not in weights]
    if missing:
        return f"{', '.join(missing)} of {layer.place} is not known"
    if rule.carry_needs == NOTHING:
        return None
    name = layer.name if rule.carry_needs == OUTPUT else layer.inputs[position]
    # Which units of a ReLU are on can be guessed from an estimate, once inequalities have shaped it.
    if name in known and (known[name] is not Known.ESTIMATE or through_estimates or (stacked and layer.kind == "relu")):
        return None
    what = "output" if rule.carry_needs == OUTPUT else "input"
    if name in known:
        return f"the {what} of {layer.place}, which δ needs to pass it, is only an estimate"
    return f"the {what} of {layer.place}, which δ needs to pass it, is not known"
