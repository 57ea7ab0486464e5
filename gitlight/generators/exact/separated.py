"""What a learned generator gets of each image of a client batch: its own input of the last layer."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.errors import DataError
from gitlight.generators.base import FitOn, PairFit, ParameterEstimate
from gitlight.generators.exact.features import LEVELS, Feature, FeatureValues
from gitlight.generators.exact.labels import labels_of_batch, output_bias
from gitlight.generators.exact.noise import SUMMED, entry_size
from gitlight.generators.exact.plan import rules_of
from gitlight.generators.exact.rule import Estimate, InverseRule
from gitlight.generators.exact.separation import Typical, n_equations_and_unknowns, separable, separate
from gitlight.generators.exact.status import Status, screen
from gitlight.generators.exact.weights import LogitFit

_MOST_SUMS = 1 << 25
"""Entries of the sums that the last layer's weights are fitted from; there are features² for each class."""

_MOST_IN_JACOBIAN = 1 << 19
"""Entries of one leak's Jacobian, 4 MiB: beyond, a leak takes seconds."""


def can_separate(architecture: Architecture, client_batch_size: int) -> bool:
    """Whether the images of a client batch can be told apart by the last layer's equations.

    That takes a last linear layer with a bias, both gradients whole; more classes than images; a gradient that is the
    mean of single images' gradients, which batch norm by batch statistics does not leave; and equations that are not
    too many to be solved for each leak.
    """
    head = architecture[architecture.output]
    bias = output_bias(architecture)
    weight = head.parameters.get("weight")
    if bias is None or weight is None or {bias, weight} & set(architecture.sketched):
        return False
    if any(layer.kind == "batch_norm" and layer.arguments["training"] for layer in architecture.layers):
        return False
    n_classes, n_features = head.weight_shape
    equations, unknowns = n_equations_and_unknowns(client_batch_size, n_classes)
    fits = n_classes * (n_features + 1) ** 2 <= _MOST_SUMS and equations * unknowns <= _MOST_IN_JACOBIAN
    return fits and separable(client_batch_size, n_classes, n_features)


class SeparatedFeatures(nn.Module):
    """The last layer's input, taken back through what can be undone, for each of ``N`` images of a leak.

    The last layer's weights come from gradients of single images: who makes pairs can make a client batch of one image,
    repeated. The images are in the order of their labels, which `separate` reads off the leak.

    Attributes:
        features: the one feature, of every image.
        end: in words, why there are no more.
        reaches_the_image: False; the walk ends with the last layer.
        n_slots: ``N``.
    """

    reaches_the_image = False

    def __init__(self, architecture: Architecture, noise: float | None, client_batch_size: int) -> None:
        """Plan it; `can_separate` must hold.

        Args:
            architecture: the leaked model's.
            noise: relative noise of the gradients; None: estimated leak by leak.
            client_batch_size: images per leak.
        """
        super().__init__()
        self.n_slots = client_batch_size
        self._noise = noise
        self._head = architecture[architecture.output]
        self._undone = _undone(architecture, self._head)
        name = self._undone[-1][0].inputs[0] if self._undone else self._head.inputs[0]
        shape = architecture.image_shape if name == IMAGE else architecture[name].output_shape
        self.features = (Feature(self._head.name, name, tuple(shape), exact=True),)
        self.end = f"below {self._head.name!r} a leak is a sum over its {client_batch_size} images"
        n_classes, n_features = self._head.weight_shape
        for buffer, size in (
            ("weight", (n_classes, n_features)),
            ("bias", (n_classes,)),
            ("typical_input", (n_features,)),
            ("spread", ()),
            ("probabilities", (n_classes,)),
        ):
            self.register_buffer(buffer, torch.zeros(size, dtype=torch.float64))
        self.weight: Tensor
        self.bias: Tensor
        self.typical_input: Tensor
        self.spread: Tensor
        self.probabilities: Tensor

    def forward(self, gradients: Gradients) -> FeatureValues:
        """Of ``B`` leaks the feature ``(B · N, *shape)``, image by image, and levels ``(B · N, 2)``."""
        n = self.n_slots
        leaks = screen(gradients)
        which = (leaks == Status.EXACT).nonzero().squeeze(1)
        weight, bias = (gradients[self._head.parameters[role]][which] for role in ("weight", "bias"))
        size = entry_size(gradients)[which].clamp_min(1e-300)
        noise = self.noise_of(weight.double(), size, torch.finfo(weight.dtype).eps)
        typical = Typical(self.typical_input, self.spread, self.probabilities)
        found = separate(weight.double(), bias.double(), noise, self.weight, self.bias, typical, n)
        inputs, variance = found.inputs.flatten(0, 1), found.inputs_variance.flatten()
        # Where the search has failed, what is typical is the better estimate.
        trust = 1 / (1 + variance / self.spread.square().clamp_min(1e-300))
        trust = torch.where(torch.isfinite(inputs).all(dim=1), trust, 0.0).unsqueeze(1)
        inputs = torch.where(trust > 0, typical.inputs + trust * (inputs - typical.inputs), typical.inputs)
        estimate = Estimate(inputs, inputs.new_zeros(()))
        for layer, rule in self._undone:
            estimate = rule.invert(estimate.reshaped(layer.output_shape), 0, [None], {})
        (feature,) = self.features
        value = torch.nan_to_num(estimate.value, posinf=0.0, neginf=0.0).reshape(-1, n, *feature.shape)
        levels = torch.stack([(noise / size).unsqueeze(1).expand(-1, n), variance.view(-1, n).sqrt()], dim=2)
        levels = torch.nan_to_num(levels.clamp_min(1e-300).log10(), nan=LEVELS[1]).clamp(*LEVELS)
        whole = value.new_zeros(len(leaks), n, *feature.shape).index_copy(0, which, value)
        all_levels = levels.new_full((len(leaks), n, 2), LEVELS[1]).index_copy(0, which, levels)
        return FeatureValues([whole.flatten(0, 1)], all_levels.flatten(0, 1))

    def labels(self, gradients: Gradients) -> Tensor:
        """Those of each leak's images, ``(B, N)`` int64, ascending."""
        delta = torch.nan_to_num(gradients[self._head.parameters["bias"]].double())
        return labels_of_batch(delta, self.probabilities, self.n_slots)

    def fits(self) -> Iterable[PairFit]:
        """One pass over single images: the last layer's weights, and what is typical of its input."""
        yield FitOn(_HeadFit(self, self._head), single_images=True)

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The last layer's weights, up to a row common to all classes."""
        return {name: ParameterEstimate(getattr(self, role), True) for role, name in self._head.parameters.items()}

    def noise_of(self, weight_gradient: Tensor, entry_size: Tensor, rounding: float) -> Tensor:
        """``(B,)``: as given, or what the sums over all classes show, which are zero but for noise."""
        least = SUMMED * rounding * entry_size
        if self._noise is not None:
            return torch.maximum(least, self._noise * entry_size)
        n_classes, n_features = weight_gradient.shape[1:]
        return torch.maximum(least, weight_gradient.sum(dim=1).norm(dim=1) / (n_classes * n_features) ** 0.5)


class _HeadFit:
    """The `PairFit` of a last layer's weights, of its mean input and its spread, and of mean probabilities."""

    def __init__(self, features: SeparatedFeatures, head: Layer) -> None:
        self._features, self._head = features, head
        self._fit = LogitFit(head.weight_shape[0])
        self._sums: list[Tensor] = []

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        which = (screen(gradients) == Status.EXACT).nonzero().squeeze(1)
        weight, delta = (gradients[self._head.parameters[role]][which] for role in ("weight", "bias"))
        rounding = torch.finfo(weight.dtype).eps
        weight, delta = weight.double(), delta.double()
        noise = self._features.noise_of(weight, entry_size(gradients)[which], rounding)
        # δ ⊗ a, by least squares; where δ is zero or vanishes when squared, there is no a.
        inputs = (delta.unsqueeze(1) @ weight).squeeze(1) / delta.square().sum(dim=1, keepdim=True)
        usable = torch.isfinite(inputs).all(dim=1)
        which, inputs, delta, noise = which[usable], inputs[usable], delta[usable], noise[usable]
        beyond = noise > 30 * rounding * entry_size(gradients)[which]
        self._fit.add(inputs, delta, torch.where(beyond, noise, 0.0), rounding)
        probabilities = delta + nn.functional.one_hot(delta.argmin(dim=1), delta.shape[1])
        sums = [inputs.sum(dim=0), inputs.square().sum(dim=0), probabilities.sum(dim=0)]
        sums.append(sums[0].new_tensor(len(which)))
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def sums(self) -> Sequence[Tensor]:
        return [*self._fit.sums(), *self._sums]

    def finish(self) -> None:
        inputs, squares, probabilities, count = self._sums
        if not count:
            raise DataError(
                "The last layer's weights, which tell the images of a client batch apart, cannot be fitted: of no "
                "single public image does its bias have a gradient. Give generator.separate=false, or another channel."
            )
        weight, bias, _ = self._fit.solve()
        mean = inputs / count
        for name, value in (
            ("weight", weight),
            ("bias", bias),
            ("typical_input", mean),
            ("spread", (squares / count - mean.square()).clamp_min(0).mean().sqrt()),
            ("probabilities", probabilities / count),
        ):
            getattr(self._features, name).copy_(value)


def _undone(architecture: Architecture, head: Layer) -> tuple[tuple[Layer, InverseRule], ...]:
    """The operations below the last layer whose inputs follow from their outputs, and their rules."""
    rules = rules_of(architecture, strict=False)
    undone = []
    name = head.inputs[0]
    while name != IMAGE:
        layer, rule = architecture[name], rules[name]
        if len(layer.inputs) != 1 or layer.parameters or rule.inverts != "yes" or rule.loses:
            break
        undone.append((layer, rule))
        name = layer.inputs[0]
    return tuple(undone)
