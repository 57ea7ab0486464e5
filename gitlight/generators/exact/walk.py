"""`ExactWalk`: from the output down, every layer's input that the equations give, and the weights that carry δ on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gitlight.architecture import ELEMENTWISE, RESHAPES, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.errors import ArchitectureError
from gitlight.generators.base import PairFit, ParameterEstimate
from gitlight.generators.exact.activations import ActivationRule, activation_rule
from gitlight.generators.exact.conv2d import Conv2dRule
from gitlight.generators.exact.linear import LinearRule
from gitlight.generators.exact.weights import WeightFit, output_logits

Rule = LinearRule | Conv2dRule

LARGEST_SOLVE = 4096
"""Unknowns per channel; a normal matrix of more than 134 MB an example is not made."""


@dataclass(frozen=True)
class Feature:
    """An estimate that the walk gives for every leak.

    Attributes:
        name: which tensor of the leaked model it estimates, such as ``input of conv3``.
        shape: ``(C, H, W)``, or ``(units,)``.
        exact: whether the equations determine it.
    """

    name: str
    shape: tuple[int, ...]
    exact: bool


@dataclass(frozen=True)
class _Between:
    """What lies between a layer's input and the layer with parameters below it: reshapes and at most one activation.

    ``shape`` is that of the output below; ``passable`` whether there is nothing else and ``δ`` can be carried through.
    """

    activation: ActivationRule | None
    shape: tuple[int, ...]
    passable: bool

    def invert(self, inputs: Tensor) -> Tensor | None:
        """The output below, if it follows from the layer's input."""
        if not self.passable:
            return None
        if self.activation is None:
            return inputs
        return None if self.activation.inverse is None else self.activation.inverse(inputs)

    @property
    def invertible(self) -> bool:
        return self.passable and (self.activation is None or self.activation.inverse is not None)


@dataclass(frozen=True)
class _Step:
    """One layer with parameters that the walk inverts.

    ``carries``: whether ``δ`` is carried from it to the layer below, for which its weight is fitted from pairs.
    """

    layer: Layer
    rule: Rule
    between: _Between
    carries: bool


class ExactWalk(nn.Module):
    """Inverts back-propagation in closed form, as far down as it is exact, without any leaked weight.

    At the last layer the bias gradient is ``δ``, so its input is exact. The weights that carry ``δ`` to the layer below
    are found from pairs by linear least squares (`WeightFit`): outputs follow from the layers above, inputs from the
    solve. The walk ends with the first layer whose input is not determined (its least-norm estimate is still a
    feature), whose weight cannot be fitted, or for which there is no rule.

    With more than one image per leak none of this is exact; the walk then ends with the last layer, whose solve gives
    a ``δ``-weighted average of the inputs.
    """

    def __init__(self, architecture: Architecture, damping: float, depth: int | None, client_batch_size: int) -> None:
        """Args: damping of each solve, the most layers to invert (None: all), and images per leak.

        Raises:
            ArchitectureError: the model does not end in a linear layer with a bias, so there is no ``δ`` to start from.
        """
        super().__init__()
        self._first = next(layer.name for layer in architecture.chain() if layer.parameters)
        self._steps, self.end = _plan(architecture, damping, depth, client_batch_size)
        for index, step in enumerate(self._steps):
            shape = architecture.parameter_shapes[step.layer.parameters[0]]
            if step.carries:
                self.register_buffer(f"weight{index}", torch.zeros(shape, dtype=torch.float64))
        self.features = tuple(
            Feature(f"input of {step.layer.name}", step.between.shape, client_batch_size == 1 and step.rule.exact)
            for step in self._steps
        )

    @property
    def reaches_the_image(self) -> bool:
        """Whether the walk gives the model's input itself, exactly."""
        return self.features[-1].exact and self._steps[-1].layer.name == self._first

    def forward(self, gradients: Gradients) -> list[Tensor]:
        """One tensor ``(B, *feature.shape)`` per feature, float64: what the layer below put out, before its activation.

        Where the activation cannot be inverted, or the estimate is not exact, it is the layer's input itself.
        Entries that are not finite become zero.
        """
        found = []
        for step, feature, inputs, _ in self._descend(gradients, len(self._steps)):
            below = step.between.invert(inputs) if feature.exact else None
            value = inputs if below is None else below
            found.append(torch.nan_to_num(value.reshape(-1, *feature.shape), posinf=0.0, neginf=0.0))
        return found

    def fits(self) -> Sequence[PairFit]:
        """One pass over the pairs per weight that carries ``δ``, from the last layer down."""
        return [_WalkFit(self, index) for index, step in enumerate(self._steps) if step.carries]

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The fitted weights; the last layer's up to a row common to all classes."""
        return {
            step.layer.parameters[0]: ParameterEstimate(self.weight(index), up_to_common_row=index == 0)
            for index, step in enumerate(self._steps)
            if step.carries
        }

    def weight(self, index: int) -> Tensor:
        """The fitted weight of step ``index``."""
        weight = getattr(self, f"weight{index}")
        assert isinstance(weight, Tensor)
        return weight

    def _descend(self, gradients: Gradients, n_steps: int) -> list[tuple[_Step, Feature, Tensor, Tensor]]:
        """Step, feature, the layer's input and its ``δ``, for the first ``n_steps`` layers."""
        found: list[tuple[_Step, Feature, Tensor, Tensor]] = []
        for index, step in enumerate(self._steps[:n_steps]):
            if _has_own_delta(step.layer):
                delta = gradients[step.layer.parameters[1]].double()
            else:
                above, _, inputs, delta_above = found[-1]
                delta = above.rule.carry(delta_above, self.weight(index - 1))
                if above.between.activation is not None:
                    delta = delta * above.between.activation.derivative(inputs)
                delta = delta.reshape(-1, *above.between.shape)
            inputs = step.rule.solve_input(delta, gradients[step.layer.parameters[0]].double())
            found.append((step, self.features[index], inputs.reshape(-1, *step.layer.input_shape), delta))
        return found


class _WalkFit:
    """The `PairFit` of one layer's weight, the layers above being known."""

    def __init__(self, walk: ExactWalk, index: int) -> None:
        self._walk = walk
        self._index = index
        self._fit = WeightFit()

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        descent = self._walk._descend(gradients, self._index + 1)
        step, _, inputs, delta = descent[-1]
        if self._index == 0:
            dtype = gradients[step.layer.parameters[1]].dtype
            outputs, weights = output_logits(delta, dtype)
        else:
            above, _, above_inputs, _ = descent[-2]
            below = above.between.invert(above_inputs)
            assert below is not None, "the plan carries δ only through what it can invert"
            outputs = below.reshape(-1, *step.layer.output_shape)
            weights = torch.ones(len(outputs), dtype=outputs.dtype, device=outputs.device)
        usable = torch.isfinite(inputs.flatten(1)).all(dim=1) & torch.isfinite(outputs.flatten(1)).all(dim=1)
        self._fit.add(step.rule.patches(inputs[usable]), step.rule.outputs(outputs[usable]), weights[usable])

    def sums(self) -> Sequence[Tensor]:
        return self._fit.sums()

    def finish(self) -> None:
        weight, _ = self._fit.solve()
        buffer = self._walk.weight(self._index)
        buffer.copy_(weight.view_as(buffer))


def _has_own_delta(layer: Layer) -> bool:
    """Whether a layer's bias gradient is its ``δ``: a bias that is added once is not summed away."""
    return layer.is_one_of((nn.Linear,)) and len(layer.parameters) == 2 and len(layer.input_shape) == 1


def _rule(layer: Layer, damping: float) -> Rule | None:
    if layer.is_one_of((nn.Linear,)) and len(layer.input_shape) == 1:
        return LinearRule()
    if layer.is_one_of((nn.Conv2d,)) and Conv2dRule.applies_to(layer):
        return Conv2dRule(layer, damping)
    return None


def _between(steps: Sequence[Layer], layer: Layer) -> _Between:
    """``steps``: what lies below ``layer``, nearest first, down to the next layer with parameters."""
    shape = layer.input_shape
    rule: ActivationRule | None = None
    for position, step in enumerate(steps):
        if step.is_one_of(RESHAPES) or isinstance(step.operation, nn.Dropout):
            shape = step.input_shape
        elif step.is_one_of(ELEMENTWISE) and rule is None and (rule := activation_rule(step)) is not None:
            continue
        else:
            # What comes below (pooling, GELU, a second activation) has no rule: only the layer's own input is known.
            return _Between(None, shape if position else layer.input_shape, passable=False)
    return _Between(rule, shape, passable=True)


def _plan(
    architecture: Architecture, damping: float, depth: int | None, client_batch_size: int
) -> tuple[tuple[_Step, ...], str]:
    """The steps of the walk, and in words why it ends."""
    chain = architecture.chain()
    positions = [position for position, layer in enumerate(chain) if layer.parameters]
    if not positions or not _has_own_delta(chain[positions[-1]]) or len(chain) - 1 != positions[-1]:
        last = chain[-1]
        raise ArchitectureError(
            f"hybrid starts from the bias gradient of a last linear layer, but the leaked model ends in {last.kind} "
            f"({last.name!r}, parameters: {', '.join(last.parameters) or 'none'}). "
            "coarse and mlp need no such layer: generator.name=coarse."
        )
    steps: list[_Step] = []
    outputs_known = True  # of the layer at hand: the logits are
    bounds = [-1, *positions]
    for number in range(len(positions), 0, -1):
        layer = chain[bounds[number]]
        rule = _rule(layer, damping)
        if rule is None:
            return tuple(steps), f"there is no rule for {layer.kind}, module {layer.name!r}"
        if rule.n_unknowns > LARGEST_SOLVE:
            return tuple(
                steps
            ), f"{rule.n_unknowns} unknowns per channel at {layer.name!r} are too many for a dense solve"
        between = _between(chain[bounds[number - 1] + 1 : bounds[number]][::-1], layer)
        if number == 1:
            steps.append(_Step(layer, rule, between, carries=False))
            return tuple(steps), "the image is reached"
        below = chain[bounds[number - 1]]
        if depth is not None and len(steps) + 1 >= depth:
            obstacle = f"generator.exact_depth is {depth}"
        elif _has_own_delta(below):
            obstacle = ""
        elif client_batch_size > 1:
            obstacle = f"with {client_batch_size} images per leak, δ is not known below the last layer"
        elif not rule.exact:
            obstacle = f"the input of {layer.name!r} is not determined: {rule.reason}"
        elif not between.passable:
            obstacle = f"nothing carries δ from {layer.name!r} to {below.name!r}"
        elif not outputs_known or not rule.fits_weight:
            obstacle = f"the weight of {layer.name!r} cannot be fitted in closed form"
        else:
            obstacle = ""
        steps.append(_Step(layer, rule, between, carries=not obstacle and not _has_own_delta(below)))
        if obstacle:
            return tuple(steps), obstacle
        outputs_known = client_batch_size == 1 and rule.exact and between.invertible
    raise AssertionError("the loop returns at the first layer")
