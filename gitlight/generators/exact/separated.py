"""What a learned generator gets of each image of a client batch: its own layer inputs, from the last layer down."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.errors import DataError
from gitlight.generators.base import FitOn, PairFit, ParameterEstimate
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.client_batches import ClientBatchWalker
from gitlight.generators.exact.features import LEVELS, FeatureValues, deviation_of, end_of, features_of
from gitlight.generators.exact.fits import known_of_single_images
from gitlight.generators.exact.input_prior_fits import RegressionFit, SpreadFit
from gitlight.generators.exact.input_priors import InputPrior
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.exact.labels import labels_of_batch, output_bias
from gitlight.generators.exact.leaks import invertible
from gitlight.generators.exact.noise import SUMMED
from gitlight.generators.exact.plan import advice_for_few_pairs
from gitlight.generators.exact.rule import Estimate
from gitlight.generators.exact.separation import Typical, n_equations_and_unknowns, separable, separate
from gitlight.generators.exact.solvability import Known
from gitlight.generators.exact.weights import LogitFit

_MOST_SUMS = 1 << 25
"""Entries of the sums that the last layer's weights are fitted from; there are features² for each class."""

_MOST_IN_JACOBIAN = 1 << 19
"""Entries of one leak's Jacobian, 4 MiB: beyond, a leak takes seconds."""

_LEAKS_AT_ONCE = {"cpu": 16}
"""That are carried down together: on a processor, so many that samples of their errors stay in its cache."""

_BYTES_AT_ONCE = {"cpu": 1 << 24}
"""Of gradients in float64 that are carried down together, beyond one leak's: larger pieces of memory are new ones each
time, and asking for them takes a processor longer than what is computed in them."""


def can_separate(architecture: Architecture, client_batch_size: int) -> bool:
    """Whether the images of a client batch can be told apart by the last layer's equations.

    That takes a last linear layer with a bias, both gradients whole and its own; more classes than images; a gradient
    that is the mean of single images' gradients, which batch norm by batch statistics does not leave; and equations
    that are not too many to be solved for each leak.
    """
    head = architecture[architecture.output]
    bias = output_bias(architecture)
    weight = head.parameters.get("weight")
    if bias is None or weight is None or {bias, weight} & set(architecture.sketched):
        return False
    used = [name for layer in architecture.layers for name in layer.parameters.values()]
    if used.count(weight) > 1 or used.count(bias) > 1:
        return False
    if any(layer.kind == "batch_norm" and layer.arguments["training"] for layer in architecture.layers):
        return False
    n_classes, n_features = head.weight_shape
    equations, unknowns = n_equations_and_unknowns(client_batch_size, n_classes)
    fits = n_classes * (n_features + 1) ** 2 <= _MOST_SUMS and equations * unknowns <= _MOST_IN_JACOBIAN
    return fits and separable(client_batch_size, n_classes, n_features)


class SeparatedFeatures(nn.Module):
    """Layer inputs of each of ``N`` images of a leak, from the last layer down.

    `separate` gives each image's own input of the last layer, and with it its own ``δ``, which is carried down as that
    of a single image; a layer's gradient is then one linear system in the inputs of all ``N`` images
    (`gitlight.generators.exact.joint`). Weights come from gradients of single images, and so does what is known of
    inputs beforehand: who makes pairs can make a client batch of one image, repeated. The images are in the order of
    their labels, which `separate` reads off the leak.

    Attributes:
        features: of every image.
        end: in words, why there are no more.
        n_slots: ``N``.
    """

    def __init__(
        self, architecture: Architecture, noise: float | None, client_batch_size: int, depth: int | None = None
    ) -> None:
        """Plan it; `can_separate` must hold.

        Args:
            architecture: the leaked model's.
            noise: relative noise of the gradients; None: estimated leak by leak.
            client_batch_size: images per leak.
            depth: the most features; None: all.
        """
        super().__init__()
        self.n_slots = client_batch_size
        self._noise = noise
        self._architecture = architecture
        self._head = architecture[architecture.output]
        self.inversion = Inversion(
            architecture, noise, 1, strict=False, stacked=False, depth=depth, separated=client_batch_size
        )
        rules, plan = self.inversion.rules, self.inversion.separated_plan
        assert plan is not None
        self._plan = plan
        self.features = features_of(plan, rules, architecture)
        self.end = end_of(plan, rules, architecture)
        last = plan.solves[-1].layer
        if self.inversion.is_cut:
            self.end = f"generator.exact_depth is {depth}"
        elif plan.known[last.inputs[0]] is Known.ESTIMATE:
            self.end = f"the equations of {last.name!r} do not determine the inputs of {client_batch_size} images"
        self.priors = nn.ModuleDict()
        self._prior_keys: dict[str, str] = {}
        from_single = known_of_single_images(architecture, rules, self.inversion.parameters_to_fit)
        for action in self._plan.solves:
            layer, rule = action.layer, rules[action.layer.name]
            if layer.name != architecture.output and layer.inputs[0] in from_single:
                assert isinstance(rule, AffineRule)
                self._prior_keys[layer.name] = f"prior{len(self._prior_keys)}"
                self.priors[self._prior_keys[layer.name]] = InputPrior(rule, layer.name in plan.known)
        n_classes, n_features = self._head.weight_shape
        for buffer, size in (("typical_input", (n_features,)), ("spread", ()), ("probabilities", (n_classes,))):
            self.register_buffer(buffer, torch.zeros(size, dtype=torch.float64))
        self.typical_input: Tensor
        self.spread: Tensor
        self.probabilities: Tensor

    @property
    def reaches_the_image(self) -> bool:
        """Whether the walk gives the model's input itself, exactly."""
        return self.features[-1].result == IMAGE and self.features[-1].exact

    def forward(self, gradients: Gradients) -> FeatureValues:
        """Of ``B`` leaks the features ``(B · N, *shape)``, image by image, levels ``(B · N, 1 + features)``, labels."""
        n = self.n_slots
        which, size = invertible(gradients)
        used = {name for action in self._plan.solves for name in action.layer.parameters.values()}
        head = set(self._head.parameters.values())
        of_head = {name: gradients[name][which].double() for name in head}
        first = next(iter(gradients.values()))
        n_leaks, dtype = len(first), first.dtype
        size = size.clamp_min(1e-300)
        noise = self.noise_of(of_head[self._head.parameters["weight"]], size, torch.finfo(dtype).eps)
        labels = self._labels_read_off(gradients)
        found, labels[which] = self._walk(
            of_head, {name: gradients[name] for name in used - head}, which, noise, labels[which]
        )
        values, levels = [], [(noise / size).repeat_interleave(n)]
        rows = (n * which.unsqueeze(1) + torch.arange(n, device=which.device)).flatten()
        for feature in self.features:
            if feature.result not in found:  # as before all weights are fitted
                values.append(noise.new_zeros(n * n_leaks, *feature.shape))
                levels.append(torch.full_like(levels[0], torch.inf))
                continue
            estimate = found[feature.result]
            value = torch.nan_to_num(estimate.value, posinf=0.0, neginf=0.0).reshape(-1, *feature.shape)
            values.append(value.new_zeros(n * n_leaks, *feature.shape).index_copy(0, rows, value))
            levels.append(deviation_of(estimate))
        logarithms = torch.stack(levels, dim=1).clamp_min(1e-300).log10()
        logarithms = torch.nan_to_num(logarithms, nan=LEVELS[1]).clamp(*LEVELS)
        whole = logarithms.new_full((n * n_leaks, logarithms.shape[1]), LEVELS[1])
        return FeatureValues(values, whole.index_copy(0, rows, logarithms), labels)

    def _walk(
        self, of_head: Gradients, others: Gradients, which: Tensor, noise: Tensor, labels: Tensor
    ) -> tuple[dict[str, Estimate], Tensor]:
        """Name of each feature's result → its estimate ``(B · N, *shape)``, and labels; nothing before all fits.

        Args:
            of_head: the last layer's gradients, of ``B`` leaks in float64.
            others: those of other layers, of more leaks in any precision.
            which: ``(B,)``, positions among these.
            noise: ``(B,)``.
            labels: ``(B, N)``, as read off.
        """
        weights, names = self.inversion.weights(), self._head.parameters
        if len(weights) < len(self.inversion.parameters_to_fit) or not len(noise):
            return {}, labels
        typical = Typical(self.typical_input, self.spread, self.probabilities)
        apart = separate(
            of_head[names["weight"]], of_head[names["bias"]], noise,
            weights[names["weight"]], weights[names["bias"]], typical, self.n_slots,
        )  # fmt: skip
        # Where the search has failed, what is typical is the better estimate.
        spread = self.spread.square().clamp_min(1e-300)
        trust = 1 / (1 + apart.inputs_variance / spread)
        trust = torch.where(torch.isfinite(apart.inputs).all(dim=2), trust, 0.0).unsqueeze(2)
        inputs = torch.where(trust > 0, typical.inputs + trust * (apart.inputs - typical.inputs), typical.inputs)
        left = torch.where(trust > 0, trust * apart.inputs_variance.unsqueeze(2), spread)
        priors = {name: self.priors[key] for name, key in self._prior_keys.items()}
        device = noise.device.type
        bytes_each = 8 * sum(self._architecture.parameter_shapes[name].numel() for name in others)
        at_once = _BYTES_AT_ONCE.get(device, 1 << 30) // max(1, bytes_each)
        parts, chunk = [], max(1, min(_LEAKS_AT_ONCE.get(device, 256), at_once))
        for start in range(0, len(noise), chunk):
            part = slice(start, start + chunk)
            its = {name: gradient[which[part]].double() for name, gradient in others.items()}
            its |= {name: gradient[part] for name, gradient in of_head.items()}
            walker = ClientBatchWalker(
                self._architecture, self.inversion.rules, its, noise[part], weights, priors,  # type: ignore[arg-type]
                Estimate(inputs[part], left[part]), apart.labels[part],
            )  # fmt: skip
            parts.append(walker.follow(self._plan, until=walker.is_beyond).values)
        found = [feature.result for feature in self.features if feature.result in parts[0]]
        return {name: _joined([part[name] for part in parts]) for name in found}, apart.labels

    def _labels_read_off(self, gradients: Gradients) -> Tensor:
        delta = torch.nan_to_num(gradients[self._head.parameters["bias"]].double())
        return labels_of_batch(delta, self.probabilities, self.n_slots)

    def fits(self) -> Iterable[PairFit]:
        """Passes over single images: the weights from the last layer down, and what is typical of inputs."""
        yield FitOn(_HeadFit(self, self._head), single_images=True)
        for step in self.inversion.steps[1:]:
            yield FitOn(self.inversion.fit_of(step), single_images=True)
        if priors := {name: self.priors[key] for name, key in self._prior_keys.items()}:
            yield FitOn(RegressionFit(self.inversion, priors), single_images=True)  # type: ignore[arg-type]
            yield FitOn(SpreadFit(self.inversion, priors), single_images=True)  # type: ignore[arg-type]

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The fitted weights; the last layer's up to a row common to all classes."""
        return self.inversion.estimated_parameters()

    def noise_of(self, weight_gradient: Tensor, entry_size: Tensor, rounding: float) -> Tensor:
        """``(B,)``: as given, or what the sums over all classes show, which are zero but for noise."""
        least = SUMMED * rounding * entry_size
        if self._noise is not None:
            return torch.maximum(least, self._noise * entry_size)
        n_classes, n_features = weight_gradient.shape[1:]
        return torch.maximum(least, weight_gradient.sum(dim=1).norm(dim=1) / (n_classes * n_features) ** 0.5)


def _joined(parts: Sequence[Estimate]) -> Estimate:
    values = torch.cat([part.value for part in parts])
    return Estimate(values, torch.cat([part.variance.expand_as(part.value) for part in parts]))


class _HeadFit:
    """The `PairFit` of a last layer's weights, of its mean input and its spread, and of mean probabilities."""

    def __init__(self, features: SeparatedFeatures, head: Layer) -> None:
        self._features, self._head = features, head
        self._fit = LogitFit(head.weight_shape[0])
        self._sums: list[Tensor] = []

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        which, size = invertible(gradients)
        weight, delta = (gradients[self._head.parameters[role]][which] for role in ("weight", "bias"))
        rounding = torch.finfo(weight.dtype).eps
        weight, delta = weight.double(), delta.double()
        noise = self._features.noise_of(weight, size, rounding)
        # δ ⊗ a, by least squares; where δ is zero or vanishes when squared, there is no a.
        inputs = (delta.unsqueeze(1) @ weight).squeeze(1) / delta.square().sum(dim=1, keepdim=True)
        usable = torch.isfinite(inputs).all(dim=1)
        inputs, delta, noise, size = inputs[usable], delta[usable], noise[usable], size[usable]
        beyond = noise > 30 * rounding * size
        self._fit.add(inputs, delta, torch.where(beyond, noise, 0.0), rounding)
        probabilities = delta + nn.functional.one_hot(delta.argmin(dim=1), delta.shape[1])
        sums = [inputs.sum(dim=0), inputs.square().sum(dim=0), probabilities.sum(dim=0)]
        sums.append(sums[0].new_tensor(len(inputs)))
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
        weight, bias, seen = self._fit.solve(advice_for_few_pairs(self._features._plan))
        self._features.inversion.keep(
            self._head,
            {"weight": weight, "bias": bias},
            {"weight": seen.expand_as(weight), "bias": torch.ones_like(bias, dtype=torch.bool)},
        )
        mean = inputs / count
        for name, value in (
            ("typical_input", mean),
            ("spread", (squares / count - mean.square()).clamp_min(0).mean().sqrt()),
            ("probabilities", probabilities / count),
        ):
            getattr(self._features, name).copy_(value)
