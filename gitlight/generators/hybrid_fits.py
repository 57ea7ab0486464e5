"""The closed-form parts of Hybrid-GIT that pairs are needed for, and their fits."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gitlight.data.pair import Gradients
from gitlight.errors import CheckpointError, misfit
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.local_regression import LocalOrWhole
from gitlight.generators.ridge import RidgeRegression
from gitlight.metrics import match
from gitlight.runs import checkpoint_path, load_checkpoint

if TYPE_CHECKING:
    from gitlight.generators.hybrid import HybridGenerator


class FeatureStandardisation(nn.Module):
    """Subtracts each feature's mean over pairs, entry by entry, and divides by one deviation per feature map."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes
        for index, shape in enumerate(shapes):
            self.register_buffer(f"mean{index}", torch.zeros(shape, dtype=torch.float64))
            self.register_buffer(f"deviation{index}", torch.ones((), dtype=torch.float64))
        self._sums: list[Tensor] = []

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Standardised, float32, cut off beyond ten deviations."""
        return [
            ((feature - getattr(self, f"mean{index}")) / getattr(self, f"deviation{index}")).float().clamp(-10, 10)
            for index, feature in enumerate(features)
        ]

    def add(self, features: list[Tensor]) -> None:
        """Add the features of a batch to the sums."""
        if not self._sums:
            self._sums = [torch.zeros_like(feature[0]) for feature in features for _ in range(2)]
            self._sums.append(torch.zeros((), dtype=torch.float64, device=features[0].device))
        for index, feature in enumerate(features):
            self._sums[2 * index] += feature.sum(dim=0)
            self._sums[2 * index + 1] += feature.square().sum(dim=0)
        self._sums[-1] += len(features[0])

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self._sums

    def solve(self) -> None:
        """From the sums, which are forgotten."""
        count = self._sums[-1]
        for index in range(len(self._shapes)):
            mean = self._sums[2 * index] / count
            variance = (self._sums[2 * index + 1] / count - mean.square()).clamp_min(0).mean()
            getattr(self, f"mean{index}").copy_(mean)
            getattr(self, f"deviation{index}").copy_(variance.sqrt().clamp_min(1e-12))
        self._sums = []


class AsItIs(nn.Module):
    """In the place of a regression, where the walk gives an image: that image, and how large its error is.

    Attributes:
        error: root mean square over the pairs.
    """

    error: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("error", torch.ones((), dtype=torch.float64))
        self._sums: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Clamped to [0, 1], float32."""
        return images.float().clamp(0, 1)

    def add(self, images: Tensor, wanted: Tensor, numbers: Tensor) -> None:
        """Add pairs ``(B, entries)`` of found and true images to the sums."""
        if not self._sums:
            self._sums = [images.new_zeros(2)]
        missing = (images.clamp(0, 1) - wanted).square()
        self._sums[0] += torch.stack([missing.sum(), missing.new_tensor(missing.numel())])

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self._sums

    def solve(self) -> None:
        """From the sums, which are forgotten."""
        # Below one thousandth of a grey level there is nothing to learn, and a step of zero would never end.
        self.error.copy_((self._sums[0][0] / self._sums[0][1]).sqrt().clamp_min(1e-6))
        self._sums = []


class AsItIsOrRegression(nn.Module):
    """Where the walk gives an image that noise may have spoilt: that image, or a regression, whichever errs less.

    Args:
        ridge: of the features that come after the image's own entries.
    """

    is_regression: Tensor

    def __init__(self, ridge: RidgeRegression) -> None:
        super().__init__()
        self.ridge, self.as_it_is = ridge, AsItIs()
        self.register_buffer("is_regression", torch.ones((), dtype=torch.bool))

    @property
    def error(self) -> Tensor:
        """Root mean square over the pairs; of the regression, over those held out."""
        return torch.where(self.is_regression, self.ridge.error, self.as_it_is.error)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, entries + n)``, an image's entries first, to images ``(B, entries)``, float32."""
        image, others = self._divided(features)
        return torch.where(self.is_regression, self.ridge(others), self.as_it_is(image))

    def add(self, features: Tensor, wanted: Tensor, numbers: Tensor) -> None:
        """Add pairs to the sums of both."""
        image, others = self._divided(features)
        self.as_it_is.add(image, wanted, numbers)
        self.ridge.add(others, wanted, numbers)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [*self.as_it_is.sums(), *self.ridge.sums()]

    def solve(self) -> None:
        """Solve both, and choose."""
        self.as_it_is.solve()
        self.ridge.solve()
        self.is_regression.copy_(self.ridge.error < self.as_it_is.error)

    def _divided(self, features: Tensor) -> tuple[Tensor, Tensor]:
        n_image = self.ridge.offset.numel()
        return features[:, :n_image], features[:, n_image:]


Regression = RidgeRegression | AsItIsOrRegression | LocalOrWhole
"""What is fitted on features."""

Start = Regression | AsItIs
"""What makes the linear start."""


class FeatureFit:
    """The `PairFit` of all that stands on the walk's features: computed once, they cost more than the sums.

    Args:
        generator: whose features they are.
        ridge: the regression to fit.
        common: whether to fit what is not a regression's, too: means and deviations.
    """

    def __init__(self, generator: "HybridGenerator", ridge: Start, common: bool) -> None:
        self._generator = generator
        self._ridge = ridge
        self._common = common

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        generator = self._generator
        features, averages = generator.walked(gradients).values, generator.averages.features(gradients)
        # A linear map of each image's features is the same map of their means: no image need be assigned to them.
        means = [feature.unflatten(0, (len(images), -1)).mean(dim=1) for feature in features]
        self._ridge.add(generator.start_features(means, averages), images.mean(dim=1).flatten(1), numbers)
        if not self._common:
            return
        generator.standardisation.add(features)
        generator.averages.add(averages)
        if generator.scaling is not None:
            generator.scaling.update(gradients, images, numbers)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        generator = self._generator
        if not self._common:
            return self._ridge.sums()
        scaling = [] if generator.scaling is None else generator.scaling.sums()
        return [*self._ridge.sums(), *generator.standardisation.sums(), *generator.averages.sums(), *scaling]

    def finish(self) -> None:
        """Solve everything."""
        self._ridge.solve()
        if not self._common:
            return
        self._generator.standardisation.solve()
        self._generator.averages.finish()
        if self._generator.scaling is not None:
            self._generator.scaling.finish()


class MatchedFit:
    """The `PairFit` of the regression once more, on single images, assigned to what the first one makes of them."""

    def __init__(self, generator: "HybridGenerator", ridge: RidgeRegression) -> None:
        self._generator = generator
        self._ridge = ridge

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        generator = self._generator
        features, averages, start = generator.closed_form(gradients)
        n_slots = generator.walk.n_slots
        assigned = match(images, start.view(images.shape)).flatten(0, 1).flatten(1)
        self._ridge.add(
            generator.start_features(features.values, averages), assigned, numbers.repeat_interleave(n_slots)
        )

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self._ridge.sums()

    def finish(self) -> None:
        """Solve everything."""
        self._ridge.solve()


def take_weights(inversion: Inversion, path: Path) -> None:
    """Load the fitted weights and priors of a run of `exact`, whose walk is the same.

    Args:
        inversion: to load them into.
        path: the run's folder, or a checkpoint.

    Raises:
        CheckpointError: there is no such file, or it does not fit.
    """
    file = checkpoint_path(path, "last") if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"generator.weights_from: {file} does not exist; give a run's folder or a checkpoint.")
    prefix = "generator.inversion."
    state = {
        name.removeprefix(prefix): value
        for name, value in load_checkpoint(file)["state_dict"].items()
        if name.startswith(prefix)
    }
    if not state:
        raise CheckpointError(f"generator.weights_from: {file} holds no weights that generator.name=exact fitted.")
    if inversion.is_cut:  # exact fits what is below generator.exact_depth, too, after all else
        state = {name: value for name, value in state.items() if name in inversion.state_dict()}
    try:
        inversion.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"generator.weights_from: {file} is of another leaked model, or of other settings of generator.name="
            f"exact: {misfit(error)}"
        ) from error
