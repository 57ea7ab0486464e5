"""Hybrid-GIT: exact where the equations are exact, learned where they are not."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.config import HybridGeneratorConfig
from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError
from gitlight.generators.averages import WeightedAverages
from gitlight.generators.base import (
    FitOn,
    PairFit,
    ParameterEstimate,
    Reconstruction,
    clamp_passing_gradients,
)
from gitlight.generators.exact.features import LEVELS, ClosedFormFeatures, FeatureValues
from gitlight.generators.exact.separated import SeparatedFeatures, can_separate
from gitlight.generators.hybrid_features import deepest_for_local_start, deepest_that_fit, smallest_parameters
from gitlight.generators.hybrid_fits import (
    AsItIs,
    AsItIsOrRegression,
    FeatureFit,
    FeatureStandardisation,
    MatchedFit,
    Regression,
    Start,
    take_weights,
)
from gitlight.generators.local_regression import LocalOrWhole, LocalRegression, stride_of
from gitlight.generators.noise_bands import BandedRegression, TrainsByBands, bands_for, error_of, started
from gitlight.generators.refinement import FeatureMaps, Refinement
from gitlight.generators.ridge import MOST_COEFFICIENTS, RidgeRegression
from gitlight.generators.scaling import GradientScaling
from gitlight.generators.width import width_for_budget
from gitlight.gradients.precision import full_float32


class HybridGenerator(TrainsByBands):
    """Three stages, each built on what the one before leaves open.

    1. `ClosedFormFeatures`: inputs of the leaked layers, by their gradient equations, as far down as these carry; and
       `WeightedAverages` of the inputs of all layers further down.
    2. A linear start: ridge regression from both to the image, fitted on the pairs in closed form, or from
       neighbourhoods in exact maps (`LocalRegression`), whichever errs less; or the image itself, where the walk
       reaches it, unless leaks are such that the regression is nearer. Training changes none of it.
    3. A convolutional `Refinement`, trained: it sees the start, the features as maps, how sure each of them is, how
       noisy the leak, and maps made from the gradients of the layers that the walk does not reach; it adds what the
       start misses.

    With ``N > 1`` images per leak the last layer's equations tell them apart where they can, and those of the layers
    below are solved for all images at once (`SeparatedFeatures`): all three stages are of one image each, but for what
    no equation divides among the images. Elsewhere the features are ``δ``-weighted averages, the start is the mean
    image, and the refinement learns to tell the ``N`` images apart. Of sketched gradients the walk makes nothing, and
    the refinement what it can; the last layer's must be whole.
    """

    accepts_sketches = True

    def __init__(self, architecture: Architecture, settings: HybridGeneratorConfig, client_batch_size: int = 1) -> None:
        """Raises: ArchitectureError, where nothing of the leaked model's activations follows from its gradients."""
        super().__init__(architecture, client_batch_size)
        if settings.forward_equations and client_batch_size > 1:
            raise ConfigError(
                "generator.forward_equations: with data.client_batch_size above 1 a leak is an average, which forward "
                "equations say nothing of. Give generator.forward_equations=false."
            )
        if settings.weights_from is not None and not settings.forward_equations:
            raise ConfigError(
                "generator.weights_from: gradient equations alone fit the few weights that they need from any pairs. "
                "Give generator.forward_equations=true with it."
            )
        if settings.noise_range and settings.noise is not None:
            raise ConfigError(
                "generator.noise_range: with generator.noise all leaks are of one level. Leave one of the two out."
            )
        self._bands = bands_for(settings.noise_range, architecture, client_batch_size)
        self._weights_from = settings.weights_from
        possible = can_separate(architecture, client_batch_size)
        if settings.separate and not possible:
            raise ConfigError(
                f"generator.separate: the equations of the last layer do not tell {client_batch_size} images apart. "
                "That takes several images, fewer than classes and not many; a last linear layer with a bias, both "
                "unsketched; and no batch norm by batch statistics. Give generator.separate=null."
            )
        self.walk: ClosedFormFeatures | SeparatedFeatures
        if possible if settings.separate is None else settings.separate:
            self.walk = SeparatedFeatures(architecture, settings.noise, client_batch_size, settings.exact_depth)
        else:
            self.walk = ClosedFormFeatures(
                architecture, settings.noise, settings.exact_depth, client_batch_size, settings.forward_equations
            )
        n_image = prod(architecture.image_shape)
        shapes = [feature.shape for feature in self.walk.features]
        # What gradient equations alone give exactly needs no more; what rests on forward equations, noise may reach.
        # A client batch is told apart most of the time only.
        by_gradients = self.walk.reaches_the_image and not settings.forward_equations and client_batch_size == 1
        self._solved = by_gradients and settings.closed_form_alone is not False
        # With one image per leak even a least-norm estimate holds all that its layer's equations say; with more, an
        # average of the inputs holds a fraction of it.
        explained = {feature.layer for feature in self.walk.features if feature.exact or client_batch_size == 1}
        unexplained = [
            name for layer in architecture.layers if layer.name not in explained for name in layer.parameters.values()
        ]
        small = smallest_parameters(unexplained, architecture, settings.gradient_entries)
        self.scaling = GradientScaling(architecture, small) if small and settings.gradient_channels else None
        reached = self.walk.features[-1].result == IMAGE and settings.forward_equations
        reached = reached or (self.walk.reaches_the_image and not by_gradients)
        most = min(settings.linear_start_features, MOST_COEFFICIENTS // n_image)
        if reached:
            self._in_start = {len(shapes) - 1: shapes[-1]}
        else:
            self._in_start = deepest_that_fit(shapes, most)
        n_start = sum(map(prod, self._in_start.values()))
        left = most - n_start
        averaged = unexplained
        if settings.averages_of_inverted_layers:
            averaged = [name for layer in architecture.layers for name in layer.parameters.values()]
        self.averages = WeightedAverages(
            architecture, client_batch_size, averaged if settings.averages and not reached else (), left
        )
        n_start += self.averages.n_entries
        self._mirrored = settings.mirrored_start
        # Where a channel spoils what the closed form makes of all equations, averages of some may be worth more.
        both = settings.averages_of_inverted_layers and self.averages.n_entries > 0
        n_weighed = n_start - self.averages.n_entries if both else 0
        self.ridge: Start | BandedRegression | None = None
        self._sees_image = by_gradients and not self._solved
        single = client_batch_size == 1 and not (reached or by_gradients)
        exact = self.walk.features if settings.local_start and single else ()
        self._local = deepest_for_local_start(architecture, exact)

        def regression() -> Regression:
            ridge = RidgeRegression(n_start, n_image, n_weighed)
            if self._sees_image:
                return AsItIsOrRegression(ridge)
            if self._local is None:
                return ridge
            result = self.walk.features[self._local].result
            stride = stride_of(architecture, result)
            assert stride is not None  # or there would be none
            return LocalOrWhole(ridge, LocalRegression(shapes[self._local], architecture.image_shape, stride))

        if reached:
            self.ridge = AsItIs()
        elif self._bands and not self._solved:
            self.ridge = BandedRegression([regression() for _ in self._bands], self._bands)
        elif not self._solved:
            self.ridge = regression()
        self.standardisation = FeatureStandardisation(shapes)
        n_gradient_entries = self.averages.n_entries + (self.scaling.n_entries if self.scaling else 0)

        hidden_per_channel = max(1, settings.gradient_hidden_size // settings.channels)

        def build(size: int) -> nn.Module:
            # The hidden layer grows with the convolutions, so that a budget is shared out alike; beside a single
            # channel it is as small as need be.
            width = max(1, size + 1 - hidden_per_channel)
            hidden_size = max(1, settings.gradient_hidden_size * width // settings.channels)
            hidden_size = min(size, hidden_size) if width == 1 else hidden_size
            maps = FeatureMaps(
                architecture.image_shape,
                shapes,
                n_gradient_entries,
                settings.gradient_channels,
                hidden_size,
                n_levels=1 + len(shapes),
            )
            per_row = client_batch_size // self.walk.n_slots
            return Refinement(architecture.image_shape, per_row, maps, width, settings.blocks)

        size = settings.channels + hidden_per_channel - 1
        if settings.parameters is not None:
            size = width_for_budget(build, settings.parameters)
        self.refinement = None if self._solved else build(size)

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, N, C, H, W)`` in [0, 1]."""
        return self._refined(gradients)[0]

    def refined(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the start's error."""
        return self._refined(gradients)[:2]

    def _refined(self, gradients: Gradients) -> tuple[Tensor, Tensor, FeatureValues]:
        """What `forward` gives; the start's error, as `_error` gives it; and the walk's features."""
        features, averages, start = self.closed_form(gradients)
        if self.refinement is None:
            return start.clamp(0, 1).view(-1, *self.image_shape), start.new_zeros(()), features
        seen = [self.averages.standardise(averages)]
        if self.scaling is not None:
            seen.append(self._of_each_slot(self.scaling(gradients)))
        levels = (features.levels.float() - LEVELS[0]) / (LEVELS[1] - LEVELS[0])
        residual = self.refinement(start, self.standardisation(features.values), torch.cat(seen, dim=1), levels)
        # In units of the start's own error: Adam's first steps would otherwise be many times what is to be learned, and
        # the fastest way to undo them is to switch all units off.
        error = self._error(features)
        images = clamp_passing_gradients(start.unsqueeze(1) + residual.float() * error)
        return images.view(-1, *self.image_shape), error, features

    def reconstruct(self, gradients: Gradients) -> Reconstruction:
        """`forward`, and the labels, where the walk tells images apart by them."""
        images, _, features = self._refined(gradients)
        return Reconstruction(images, ("",) * len(images), features.labels)

    def start(self, gradients: Gradients) -> Tensor:
        """What stages 1 and 2 alone give: ``(B, N, C, H, W)`` in [0, 1]; not told apart, the same image ``N`` times."""
        _, _, start = self.closed_form(gradients)
        start = start.clamp(0, 1).view(-1, self.walk.n_slots, *self.architecture.image_shape)
        return start.expand(-1, *self.image_shape)

    def fits(self) -> Iterator[PairFit]:
        """The leaked weights that the walk needs, then everything that stands on its features."""
        if self._weights_from is not None:
            assert isinstance(self.walk, ClosedFormFeatures)  # weights_from goes with one image per leak
            take_weights(self.walk.inversion, Path(self._weights_from))
        else:
            for fit in self.walk.fits():
                yield FitOn(fit, noise=self._bands[0]) if self._bands else fit
        if isinstance(self.ridge, BandedRegression):
            yield from self.ridge.fits(self._start_fits)
        elif self.ridge is not None:
            yield from self._start_fits(self.ridge, common=True)

    def _start_fits(self, ridge: Start, common: bool) -> Iterator[FitOn]:
        """Of one regression, and of what is common to all."""
        yield FitOn(FeatureFit(self, ridge, common), mirrored=self._mirrored)
        if isinstance(ridge, RidgeRegression) and self.walk.n_slots > 1:
            yield FitOn(MatchedFit(self, ridge), mirrored=self._mirrored)

    def describe(self, leak: str = "gradient") -> str:
        """What the closed form reaches, and what stops it."""
        one = leak == "gradient"  # of an update of several steps the equations do not hold
        reached = ", ".join(f"{f.name} ({'exact' if f.exact and one else 'estimate'})" for f in self.walk.features)
        averages = (
            f", and uses averages of the inputs of {self.averages.n_layers} layers" if self.averages.n_layers else ""
        )
        if self.walk.n_slots > 1:
            reached += f", of each of {self.walk.n_slots} images"
        how = "" if one else f", as if {leak} were one gradient"
        if self._solved:
            averages = ". Nothing is left to train"
        return f"hybrid inverts in closed form{how}: {reached}; it ends there because {self.walk.end}{averages}"

    def estimated_parameters(self) -> dict[str, ParameterEstimate]:
        """The leaked weights that the walk has fitted."""
        return self.walk.estimated_parameters()

    def _error(self, features: FeatureValues) -> Tensor:
        """The start's error, of all leaks, ``()``, or of each, ``(B · slots, 1, 1, 1, 1)``."""
        assert self.ridge is not None
        if isinstance(self.ridge, AsItIs) and self.walk.n_slots > 1:
            # Of images that are told apart and of those that are not, as stated: what is exact stays so.
            return (10 ** features.levels[:, -1]).clamp(1e-6, 1.0).float().view(-1, 1, 1, 1, 1)
        return error_of(self.ridge, features.levels[:, 0])

    def closed_form(self, gradients: Gradients) -> tuple[FeatureValues, Tensor, Tensor]:
        """Features, averages, and the start ``(B · slots, C, H, W)``.

        In full precision, whatever that of the trained layers.
        """
        first = next(iter(gradients.values()))
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False), full_float32():
            features, averages = self.walked(gradients), self._of_each_slot(self.averages.features(gradients))
            flat = features.values[-1]
            if self.ridge is not None:
                flat = started(self.ridge, self.start_features(features.values, averages), features.levels[:, 0])
            return features, averages, flat.reshape(-1, *self.architecture.image_shape).float()

    def walked(self, gradients: Gradients) -> FeatureValues:
        """The walk's features; an image that noise may have thrown out of [0, 1] is put back."""
        found = self.walk(gradients)
        return found._replace(values=[*found.values[:-1], found.values[-1].clamp(0, 1)]) if self._sees_image else found

    def _of_each_slot(self, of_leaks: Tensor) -> Tensor:
        """``(B, n)`` to ``(B · slots, n)``: what no equation divides among a leak's images, for each of them."""
        return of_leaks.repeat_interleave(self.walk.n_slots, dim=0) if self.walk.n_slots > 1 else of_leaks

    def start_features(self, features: list[Tensor], averages: Tensor) -> Tensor:
        """What the linear start uses, flattened: ``(B, n)`` float64."""
        chosen = [features[-1].flatten(1)] if self._sees_image else []
        if self._local is not None:
            chosen.append(features[self._local].flatten(1))
        for index, shape in self._in_start.items():
            feature = features[index]
            if feature.shape[1:] != shape:
                feature = nn.functional.adaptive_avg_pool2d(feature, (shape[1], shape[2]))
            chosen.append(feature.flatten(1))
        return torch.cat([*chosen, averages.double()], dim=1)
