"""Coarse-GIT (Chen and Liu 2025): one learned inverse step per module of the leaked model, from the output down."""

from collections.abc import Iterator, Sequence
from math import isqrt, prod

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.config import CoarseGeneratorConfig
from gitlight.data.pair import Gradients
from gitlight.generators.averages import WeightedAverages
from gitlight.generators.base import FitOn, PairFit, clamp_passing_gradients
from gitlight.generators.hybrid_fits import Start
from gitlight.generators.modules import divide
from gitlight.generators.noise_bands import BandedRegression, TrainsByBands, bands_for, error_of, started
from gitlight.generators.noise_level import NoiseLevel
from gitlight.generators.ridge import MOST_COEFFICIENTS, RidgeRegression
from gitlight.generators.scaling import GradientScaling
from gitlight.generators.width import width_for_budget
from gitlight.gradients.precision import full_float32

_MOST_ENTRIES = 4096
"""Entries that a fully connected layer makes or takes of maps; larger ones are made by convolutions, and pooled."""

_LEAST_POSITIONS = 64
"""Positions of maps from which convolutions make them."""


class CoarseGenerator(TrainsByBands):
    """``â_{m-1} = Step_m(â_m, g_m)`` from the last module to the first; ``g_m`` are the module's own gradients.

    Modules are the parts that the leaked model's data passes one after the other (`gitlight.generators.modules`): a
    layer of a chain, a residual block with both of its branches, an attention block. ``â_{m-1}`` has the shape of the
    module's input. The last module starts from its gradients alone. The estimates of inner activations are not compared
    with anything: the whole is trained on the images.

    A step is a multilayer perceptron with a linear path past its hidden layer. Maps of more than 4,096 entries are made
    of a few smaller ones, by convolutions that see the estimate above at the same resolution. Beside the scaled
    gradients a step sees the `WeightedAverages` of its module's layers, unless ``generator.averages`` is off.

    With averages, the last step does not draw the image but what a ridge regression of the averages to the (mean)
    image leaves: that is fitted in closed form before training, and training does not change it. For a range of noise
    there is one for each band of it, and every step sees how noisy a leak is.
    """

    accepts_sketches = True

    def __init__(self, architecture: Architecture, settings: CoarseGeneratorConfig, client_batch_size: int = 1) -> None:
        """Raises: ConfigError, if ``generator.modules`` fits no layer."""
        super().__init__(architecture, client_batch_size)
        bands = bands_for(settings.noise_range, architecture, client_batch_size)
        self._noise = NoiseLevel(architecture, settings.noise_range)
        self.scaling = GradientScaling(architecture)
        self.averages = WeightedAverages(architecture, client_batch_size, None if settings.averages else ())
        self._modules_down = divide(architecture, settings.modules)[::-1]
        averages = self.averages.split(torch.zeros(1, self.averages.n_entries))
        most = min(settings.linear_start_features, MOST_COEFFICIENTS // prod(architecture.image_shape))
        self._in_start = self.averages.smallest(most)
        n_start = sum(averages[name].shape[1] for name in self._in_start)
        n_image = prod(architecture.image_shape)
        self.ridge: RidgeRegression | BandedRegression | None = None
        if n_start and bands:
            self.ridge = BandedRegression([RidgeRegression(n_start, n_image) for _ in bands], bands)
        elif n_start:
            self.ridge = RidgeRegression(n_start, n_image)
        self._mirrored = settings.mirrored_start and n_start > 0
        self._parts = [
            (module.parameters, tuple(name for name in module.parameters if name in averages))
            for module in self._modules_down
        ]

        def build(width: int) -> nn.ModuleList:
            steps = nn.ModuleList()
            known: tuple[int, int, int] | None = None
            for module, (parameters, weights) in zip(self._modules_down, self._parts, strict=True):
                n_gradient = sum(architecture.gradient_shapes[name].numel() for name in parameters)
                n_gradient += self._noise.n_entries
                n_averages = sum(averages[name].shape[1] for name in weights)
                channels, height, columns = _as_maps(module.input_shape)
                wanted = (client_batch_size * channels, height, columns)
                steps.append(_Step(n_gradient, n_averages, known, wanted, width, settings.channels))
                known = wanted
            return steps

        width = settings.hidden_size
        if settings.parameters is not None:
            width = width_for_budget(build, settings.parameters)
        self.steps = build(width)
        if self.ridge is not None and client_batch_size == 1:
            # Training starts from the regression. Equal outputs for several images could not be told apart.
            last = self.steps[-1]
            assert isinstance(last, _Step)
            last.begin_with_zeros()

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, N, C, H, W)`` in [0, 1]."""
        return self.refined(gradients)[0]

    def refined(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the start's error; ones where there is no start."""
        features = self.averages.features(gradients)
        own = self.scaling.split(self.scaling(gradients))
        averages = self.averages.split(self.averages.standardise(features))
        first, noise = next(iter(gradients.values())), self._noise.seen(gradients)
        estimate: Tensor | None = None
        for (parameters, weights), step in zip(self._parts, self.steps, strict=True):
            none = self.scaling.mean[:0].expand(len(first), 0)  # a module may have neither
            gradient = torch.cat([none, *(own[name] for name in parameters), noise], dim=1)
            its_averages = torch.cat([none, *(averages[name] for name in weights)], dim=1)
            estimate = step(gradient, its_averages, estimate)
        assert estimate is not None
        estimate = estimate.float().view(-1, *self.image_shape)
        if self.ridge is None:
            return torch.sigmoid(estimate), estimate.new_ones(())
        levels = self._noise.logarithms(gradients) if isinstance(self.ridge, BandedRegression) else None
        with torch.autocast(first.device.type, enabled=False), full_float32():
            start = started(self.ridge, self.start_features(features), levels)
        start = start.view(-1, 1, *self.architecture.image_shape)
        # In units of the start's own error, for Adam's first steps not to be many times what is to be learned.
        error = error_of(self.ridge, levels)
        return clamp_passing_gradients(start + estimate * error), error

    def start_features(self, averages: Tensor) -> Tensor:
        """What the linear start uses of the averages, ``(B, n)`` float64."""
        by_layer = self.averages.split(averages)
        return torch.cat([by_layer[name] for name in self._in_start], dim=1).double()

    def fits(self) -> Iterator[PairFit]:
        """The statistics of gradients and averages, and the linear start."""
        if isinstance(self.ridge, BandedRegression):
            yield from self.ridge.fits(self._fits_of_start)
        else:
            yield from self._fits_of_start(self.ridge, common=True)

    def _fits_of_start(self, ridge: Start | None, common: bool) -> Iterator[FitOn]:
        yield FitOn(_Fit(self, ridge, common), mirrored=self._mirrored)

    def describe(self, leak: str = "gradient") -> str:
        """The modules that the leaked model falls into."""
        start = f" from a regression on averages of {len(self._in_start)} layers" if self.ridge is not None else ""
        return (
            f"coarse inverts {len(self._modules_down)} modules, from {self._modules_down[0].name} down{start}. "
            f"{self._noise.describe()}"
        ).rstrip()


class _Fit:
    """The `PairFit` of a regression and of what is common to all, in one pass: averages are computed once."""

    def __init__(self, generator: CoarseGenerator, ridge: Start | None, common: bool) -> None:
        self._generator = generator
        self._common = (generator.averages, generator.scaling) if common else ()
        self._ridge = () if ridge is None else (ridge,)

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        generator = self._generator
        averages = generator.averages.features(gradients)
        if self._common:
            generator.averages.add(averages)
            generator.scaling.update(gradients, images, numbers)
        for ridge in self._ridge:
            ridge.add(generator.start_features(averages), images.mean(dim=1).flatten(1), numbers)

    def sums(self) -> Sequence[Tensor]:
        return [each for part in (*self._common, *self._ridge) for each in part.sums()]

    def finish(self) -> None:
        for part in self._common:
            part.finish()
        for ridge in self._ridge:
            ridge.solve()


class _Step(nn.Module):
    """One inverse step: one hidden layer, and a linear path past it; convolutions where the estimate is large.

    Shapes are those of maps ``(channels, height, width)``; of the input there is none for the last module.
    """

    def __init__(
        self,
        n_gradient: int,
        n_averages: int,
        known: tuple[int, int, int] | None,
        wanted: tuple[int, int, int],
        width: int,
        maps: int,
    ) -> None:
        super().__init__()
        self._wanted = wanted
        self._pooled = None if known is None else _pooled(known)
        n_known = n_averages
        if known is not None and self._pooled is not None:
            n_known += known[0] * prod(self._pooled)
        self.hidden = nn.Linear(n_gradient + n_known, width)
        self._drawn = wanted  # what the hidden layer's units draw
        self.convolutions: nn.Sequential | None = None
        if prod(wanted) > _MOST_ENTRIES and min(wanted[1:]) > 1 and wanted[1] * wanted[2] >= _LEAST_POSITIONS:
            self._drawn = (maps, -(-wanted[1] // 4), -(-wanted[2] // 4))
            n_seen = maps + (0 if known is None else known[0])
            self.convolutions = nn.Sequential(
                nn.Conv2d(n_seen, maps, 3, padding=1), nn.ReLU(), nn.Conv2d(maps, wanted[0], 3, padding=1)
            )
        self.output = nn.Linear(width, prod(self._drawn))
        # What is known of a module's output tells most of its input linearly, and would drown among few units that bend
        # it. Convolutions see it anyway.
        straight = n_known > 0 and self.convolutions is None
        self.past = linear_of_rank(width, n_known, prod(self._drawn)) if straight else None

    def begin_with_zeros(self) -> None:
        """Make the estimate zero, until it is trained."""
        drawing = self.output if self.convolutions is None else self.convolutions[-1]
        past = self.past[-1] if isinstance(self.past, nn.Sequential) else self.past
        for layer in (drawing, past):
            for parameter in () if layer is None else layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, gradient: Tensor, averages: Tensor, estimate: Tensor | None) -> Tensor:
        """``(B, n_gradient)``, ``(B, n_averages)`` and ``(B, *known)`` to ``(B, *wanted)``."""
        known = averages
        if estimate is not None:
            assert self._pooled is not None
            if estimate.shape[2:] != self._pooled:
                pooled = nn.functional.adaptive_avg_pool2d(estimate, self._pooled)
            else:
                pooled = estimate
            known = torch.cat([averages, pooled.flatten(1)], dim=1)
        drawn: Tensor = self.output(torch.relu(self.hidden(torch.cat([gradient, known], dim=1))))
        if self.past is not None:
            drawn = drawn + self.past(known)
        drawn = drawn.unflatten(1, self._drawn)
        if self.convolutions is None:
            return drawn
        size = self._wanted[1:]
        seen = [nn.functional.interpolate(part, size=size) for part in (drawn, estimate) if part is not None]
        result: Tensor = self.convolutions(torch.cat(seen, dim=1))
        return result


def linear_of_rank(rank: int, n_inputs: int, n_outputs: int) -> nn.Module:
    """A linear map without offset, of at most this rank if that takes fewer parameters than any map does.

    >>> linear_of_rank(3, 10, 20), linear_of_rank(8, 10, 20)
    (Sequential(
      (0): Linear(in_features=10, out_features=3, bias=False)
      (1): Linear(in_features=3, out_features=20, bias=False)
    ), Linear(in_features=10, out_features=20, bias=False))
    """
    if n_inputs * n_outputs <= rank * (n_inputs + n_outputs):
        return nn.Linear(n_inputs, n_outputs, bias=False)
    return nn.Sequential(nn.Linear(n_inputs, rank, bias=False), nn.Linear(rank, n_outputs, bias=False))


def _as_maps(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A result's shape as that of maps: tokens ``(tokens, features)`` lie in a column, a vector is one point.

    >>> _as_maps((65, 192)), _as_maps((512,)), _as_maps((3, 32, 32))
    ((192, 65, 1), (512, 1, 1), (3, 32, 32))
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (shape[-1], prod(shape[:-1]), 1)


def _pooled(shape: tuple[int, int, int]) -> tuple[int, int]:
    """The size to which maps are pooled so that at most 4,096 entries are left, if one point each is not more."""
    channels, height, width = shape
    points = max(1, _MOST_ENTRIES // channels)
    if width == 1:
        return min(height, points), 1
    side = max(1, isqrt(points))
    return min(height, side), min(width, side)
