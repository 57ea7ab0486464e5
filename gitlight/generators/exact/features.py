"""What a learned generator gets of the closed form: activations, by gradient equations alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.data.pair import Gradients
from gitlight.errors import ArchitectureError
from gitlight.generators.base import PairFit, ParameterEstimate
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.exact.moves import MoveRule
from gitlight.generators.exact.plan import Plan
from gitlight.generators.exact.rule import Estimate, InverseRule
from gitlight.generators.exact.solvability import Do, Known


@dataclass(frozen=True)
class Feature:
    """An estimate for every leak.

    Attributes:
        layer: the layer whose input it is.
        result: name of the layer whose result is given: that input itself, or what it is made of by operations that can
            be undone, such as the activation's own input.
        shape: ``(C, H, W)``, or ``(units,)``.
        exact: whether the equations determine it.
    """

    layer: str
    result: str
    shape: tuple[int, ...]
    exact: bool

    @property
    def name(self) -> str:
        """For messages."""
        return f"input of {self.layer}"


class FeatureValues(NamedTuple):
    """The features of ``B`` leaks.

    Attributes:
        values: one tensor ``(B, *feature.shape)`` per feature, float64; zero for leaks that are zero or not finite.
        levels: ``(B, 1 + features)`` float64: the decimal logarithms of the leak's relative noise and of each feature's
            standard deviation, as the equations state it; between `LEVELS`.
        labels: of client batches whose images are told apart, ``N`` of the ``B`` for each leak: ``(leaks, N)`` int64,
            ascending.
    """

    values: list[Tensor]
    levels: Tensor
    labels: Tensor | None = None


LEVELS = (-16.0, 2.0)
"""Smallest and largest level: rounding of float64, and errors beyond which a feature says nothing."""


class ClosedFormFeatures(nn.Module):
    """Layer inputs from the output down.

    By gradient equations alone, in thousands of leaks a second; or with forward equations and priors, which reach
    further, at a second a leak. The walk ends with the first layer whose input is not determined (its estimate is still
    a feature), or below which ``δ`` cannot be carried. With more than one image per leak it ends with the last layer,
    whose solve gives a ``δ``-weighted average of the inputs.

    Attributes:
        n_slots: features of each leak: one of each, whatever it is an average of.
    """

    n_slots = 1

    def __init__(
        self,
        architecture: Architecture,
        noise: float | None,
        depth: int | None,
        client_batch_size: int,
        forward_equations: bool = False,
    ) -> None:
        """Plan the walk.

        Args:
            architecture: the leaked model's.
            noise: relative noise of the gradients; None: estimated leak by leak.
            depth: the most features; None: all.
            client_batch_size: images per leak.
            forward_equations: whether to use them, and priors.

        Raises:
            ArchitectureError: nothing is found, for want of a ``δ`` to start from.
        """
        super().__init__()
        self.inversion = Inversion(
            architecture, noise, client_batch_size, strict=False, stacked=forward_equations, depth=depth,
            factor=client_batch_size == 1,
        )  # fmt: skip
        features = features_of(self.inversion.plan, self.inversion.rules, architecture)
        if not features:
            last = architecture[architecture.output]
            if sketched := [name for name in last.parameters.values() if name in architecture.sketched]:
                raise ArchitectureError(
                    f"hybrid starts from the whole gradient of the last layer, and of {', '.join(sketched)} there is "
                    "only a sketch. Keep it whole (gradients.sketch.keep_exact), or give generator.name=mlp."
                )
            raise ArchitectureError(
                f"hybrid starts from the bias gradient of a last linear layer, but the leaked model ends in "
                f"{last.place} (parameters: {', '.join(last.parameters.values()) or 'none'}). "
                "Without a bias it takes single images (data.client_batch_size=1) of more than two classes. "
                "coarse and mlp need no such layer: generator.name=coarse, or mlp."
            )
        self.features = features
        self.end = (
            f"generator.exact_depth is {depth}"
            if self.inversion.is_cut
            else end_of(self.inversion.plan, self.inversion.rules, architecture)
        )

    @property
    def reaches_the_image(self) -> bool:
        """Whether the walk gives the model's input itself, exactly."""
        return self.features[-1].result == IMAGE and self.features[-1].exact

    def forward(self, gradients: Gradients) -> FeatureValues:
        """What the equations give of each leak."""
        n_leaks = len(next(iter(gradients.values())))
        leaks = self.inversion.usable(gradients)
        found = self.inversion.find(leaks)
        features, levels = [], [leaks.relative_noise]
        for feature in self.features:
            whole = leaks.noise.new_zeros(n_leaks, *feature.shape)
            level = torch.full_like(leaks.noise, torch.inf)
            if feature.result in found.values:  # not before the weights above it are fitted
                estimate = found.values[feature.result]
                value = torch.nan_to_num(estimate.value, posinf=0.0, neginf=0.0)
                whole = whole.index_copy(0, leaks.which, value.reshape(-1, *feature.shape))
                level = deviation_of(estimate)
            features.append(whole)
            levels.append(level)
        logarithms = torch.stack(levels, dim=1).clamp_min(1e-300).log10().clamp(*LEVELS)
        whole = logarithms.new_full((n_leaks, logarithms.shape[1]), LEVELS[1])
        return FeatureValues(features, whole.index_copy(0, leaks.which, torch.nan_to_num(logarithms, nan=LEVELS[1])))

    def fits(self) -> Iterable[PairFit]:
        """One pass over the pairs per weight that carries ``δ``, from the last layer down."""
        return self.inversion.fits()

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The fitted weights; the last layer's up to a row common to all classes."""
        return self.inversion.estimated_parameters()


def deviation_of(estimate: Estimate) -> Tensor:
    """``(B,)``: the median of the entries' standard deviations; one that is not known says nothing of the others."""
    entries = estimate.variance.expand_as(estimate.value).flatten(1)
    return entries.contiguous().median(dim=1).values.sqrt()  # PyTorch's is wrong for expanded tensors


def features_of(plan: Plan, rules: Mapping[str, InverseRule], architecture: Architecture) -> tuple[Feature, ...]:
    """What a walk gives of each layer that it solves for: its input, or what that is made of."""
    undone = {action.layer.name: action.layer.inputs[0] for action in plan.actions if action.do is Do.INVERT}
    found = []
    for action in plan.solves:
        name = action.layer.inputs[0]
        how_well = plan.known[name]
        while name in undone and _carries_over(rules[name], how_well):
            name = undone[name]
        shape = architecture.image_shape if name == IMAGE else architecture[name].output_shape
        found.append(Feature(action.layer.name, name, tuple(shape), how_well is Known.EXACT))
    return tuple(found)


def _carries_over(rule: InverseRule, how_well: Known) -> bool:
    """Whether an operation's input says as much as its output.

    Not where entries are dropped, as all but the class token's are in a transformer; and an estimate that leaves the
    range of an activation cannot be sent back through it.
    """
    return rule.complete if isinstance(rule, MoveRule) else how_well is not Known.ESTIMATE


def end_of(plan: Plan, rules: Mapping[str, InverseRule], architecture: Architecture) -> str:
    """In words, why there are no more features."""
    if plan.known.get(IMAGE) is Known.EXACT:
        return "the image is reached"
    for layer in reversed(architecture.layers):
        if layer.name in plan.obstacles:
            return plan.obstacles[layer.name]
        rule = rules[layer.name]
        if layer.inputs and plan.known.get(layer.inputs[0]) is Known.ESTIMATE and rule.loses and layer.parameters:
            return f"the input of {layer.name!r} is not determined: {rule.loses}"
    return "the first layer is reached"
