"""Which leaked weights can be fitted from pairs, in which order, and the fits themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.conservation import conserved, layer_above, share_of, summed_by_channel
from gitlight.generators.exact.forward import forward_values
from gitlight.generators.exact.noise import rounding_level
from gitlight.generators.exact.plan import Known, plan_walk
from gitlight.generators.exact.rule import InverseRule
from gitlight.generators.exact.weights import AffineFit, LeastSquares, LogitFit

if TYPE_CHECKING:
    from gitlight.generators.exact.inversion import Inversion


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
    architecture: Architecture, rules: Mapping[str, InverseRule], n_images: int
) -> tuple[tuple[FitStep, ...], tuple[str, ...]]:
    """The fits to make, in order; and the names of layers whose weights the walk needs and nothing reaches.

    None where the image is found without any weight.
    """
    if n_images > 1 or plan_walk(architecture, rules, (), 1).known.get(IMAGE) is Known.EXACT:
        return (), ()
    steps: list[FitStep] = []
    fitted: set[str] = set()

    def take(way: Way, layer: Layer) -> None:
        steps.append(FitStep(way, layer))
        fitted.update(layer.parameters.values())

    head = architecture[architecture.output]
    rule = rules[head.name]
    if isinstance(rule, AffineRule) and rule.reveals_delta() in architecture.parameter_shapes:
        take(Way.LOGITS, head)
    if not steps or architecture.chain_break is not None:
        return tuple(steps), ()
    affine = [layer for layer in architecture.layers if isinstance(rules[layer.name], AffineRule)]
    remaining = [layer for layer in affine if layer.name != head.name and layer.parameters]
    if conserved(architecture, rules):
        for layer in reversed(remaining):
            take(Way.CONSERVED, layer)
        return tuple(steps), ()
    while remaining:
        known = plan_walk(architecture, rules, fitted, 1, stacked=False).known
        step = _next_step(remaining, rules, known)
        if step is None:
            break
        take(step.way, step.layer)
        remaining.remove(step.layer)
    return tuple(steps), tuple(layer.name for layer in remaining)


def _next_step(
    remaining: Sequence[Layer], rules: Mapping[str, InverseRule], known: Mapping[str, Known]
) -> FitStep | None:
    """``remaining``: layers without a fitted weight, from the image up."""
    lowest = remaining[0]
    for layer in (lowest, *reversed(remaining)):
        rule = rules[layer.name]
        assert isinstance(rule, AffineRule)
        if layer.name not in known or known[layer.name] is Known.PARTLY or rule.groups != 1:
            continue
        if layer is lowest:
            # All below it is fitted, so its input follows from the public images.
            return FitStep(Way.FROM_BELOW, layer)
        if known[layer.name] is Known.EXACT and known.get(layer.inputs[0]) is Known.EXACT:
            return FitStep(Way.FROM_ABOVE, layer)
    return None


class HeadFit:
    """The `PairFit` of the last layer."""

    def __init__(self, inversion: "Inversion", layer: Layer) -> None:
        self._inversion, self._layer = inversion, layer
        self._fit = LogitFit(layer.output_shape[-1])

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        leaks = self._inversion.usable(gradients)
        found = self._inversion.find(leaks)
        # Rounding is relative to each entry of δ, however small; only noise beyond it drowns small probabilities.
        beyond = leaks.noise > 30 * rounding_level(leaks.gradients, leaks.dtype)
        noise = torch.where(beyond, leaks.noise, 0.0)
        inputs, delta = found.values[self._layer.inputs[0]].value, found.deltas[self._layer.name]
        self._fit.add(inputs, delta, noise, torch.finfo(leaks.dtype).eps)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self._fit.sums()

    def finish(self) -> None:
        """Keep the weight."""
        weight, bias, determined = self._fit.solve()
        values = {"weight": weight, "bias": bias}
        seen = {"weight": determined.expand_as(weight), "bias": torch.ones_like(bias, dtype=torch.bool)}
        self._inversion.keep(self._layer, values, seen)


class OutputFit:
    """The `PairFit` of a layer whose input and output are known: from below or from above."""

    def __init__(self, inversion: "Inversion", step: FitStep) -> None:
        self._inversion, self._step = inversion, step
        self._fit = AffineFit()

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        inversion, layer = self._inversion, self._step.layer
        leaks = inversion.usable(gradients)
        found = inversion.find(leaks)
        output = found.values[layer.name]
        if self._step.way is Way.FROM_BELOW:
            below = forward_values(inversion.architecture, images[leaks.which, 0], inversion.weights())
            inputs = below[layer.inputs[0]]
        else:
            inputs = found.values[layer.inputs[0]].value
        rule = inversion.rules[layer.name]
        assert isinstance(rule, AffineRule)
        # An equation counts by the mean error of the outputs at its position; where one is unknown, all are.
        variance = rule.outputs(output.variance.expand_as(output.value)).mean(dim=2)
        weights = torch.where(torch.isfinite(variance), 1 / variance.clamp_min(1e-300), 0.0)
        value = torch.nan_to_num(rule.outputs(output.value), posinf=0.0, neginf=0.0)
        self._fit.add(rule.patches(inputs), value, weights)

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
        target = share_of(inversion.architecture, inversion.rules, layer, leaks.gradients, inversion.weights())
        weight = leaks.gradients[layer.parameters["weight"]].flatten(2)
        # The last layer's weight is known up to a common row; its share is what δ, rounded, fails to add up to zero by.
        imbalance = inversion.imbalance(leaks.gradients)
        rows = weight
        if "bias" in layer.parameters:
            rows = torch.cat([weight, leaks.gradients[layer.parameters["bias"]].unsqueeze(2)], dim=2)
        above = layer_above(inversion.architecture, inversion.rules, layer)
        acts = inversion.unseen_acts(above, leaks.gradients).double()
        seen = summed_by_channel(inversion.architecture, inversion.rules, layer, acts) == 0
        for output, squares in enumerate(self._squares):
            # Rounding is relative to a leak's own entries, noise is not.
            size = rows[:, output].norm(dim=1)
            error = leaks.noise + (torch.finfo(leaks.dtype).eps + imbalance) * size
            weights = torch.where((size > 0) & seen[:, output], error.clamp_min(1e-150).square().reciprocal(), 0.0)
            squares.add(rows[:, output], target[:, output : output + 1], weights)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [total for squares in self._squares for total in squares.sums()]

    def finish(self) -> None:
        """Keep weight and bias."""
        solved = [squares.solve(f"the weight of {self._layer.place}") for squares in self._squares]
        rows = torch.stack([solution.squeeze(1) for solution, _ in solved])
        determined = torch.stack([its for _, its in solved])
        n_weights = rows.shape[1] - ("bias" in self._layer.parameters)
        values = {"weight": rows[:, :n_weights], "bias": rows[:, -1]}
        seen = {"weight": determined[:, :n_weights], "bias": determined[:, -1]}
        self._inversion.keep(self._layer, values, seen)


class PriorFit:
    """The `PairFit` of what public images say of each solved layer's input: mean and covariance.

    The inputs are computed from the images with the fitted weights; no gradient is used.
    """

    def __init__(self, inversion: "Inversion", names: Sequence[str]) -> None:
        self._inversion, self._names = inversion, names
        self._sums: dict[str, list[Tensor]] = {}

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of images."""
        inversion = self._inversion
        values = forward_values(inversion.architecture, images.flatten(0, 1), inversion.weights())
        for name in self._names:
            flat = values[name].flatten(1)
            if name not in self._sums:
                size = flat.shape[1]
                self._sums[name] = [flat.new_zeros(size), flat.new_zeros(size, size), flat.new_zeros(())]
            total, products, count = self._sums[name]
            total += flat.sum(dim=0)
            products.addmm_(flat.T, flat)
            count += len(flat)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [total for name in self._names for total in self._sums[name]]

    def finish(self) -> None:
        """Keep means and precisions."""
        for name in self._names:
            total, products, count = self._sums.pop(name)
            mean = total / count
            covariance = products / count - torch.outer(mean, mean)
            # Fewer images than dimensions leave directions without any variance, in which a new image still may vary.
            covariance.diagonal().add_(0.01 * covariance.diagonal().mean() + 1e-300)
            self._inversion.keep_prior(name, mean, torch.linalg.inv(covariance))
