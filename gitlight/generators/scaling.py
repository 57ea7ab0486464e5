"""Input scaling: what makes gradients, which vary over orders of magnitude, learnable."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients, as_rows
from gitlight.generators.exact.labels import output_bias

_TINY = 1e-30


class StandardisedFeatures(nn.Module, ABC):
    """Features of gradients, standardised entry by entry; mean and standard deviation come from pairs (a `PairFit`).

    Before `finish` they are the features as they are.
    """

    def __init__(self, n_entries: int, groups: Sequence[int] | None = None) -> None:
        """``groups``: numbers of neighbouring entries that are of one kind; None: all are."""
        super().__init__()
        self.n_entries = n_entries
        self._groups = [n_entries] if groups is None else list(groups)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(n_entries))
        self.register_buffer("std", torch.ones(n_entries))
        self._sums: list[Tensor] = []

    @abstractmethod
    def features(self, gradients: Gradients) -> Tensor:
        """``(B, …)`` per parameter to ``(B, n_entries)``, float32."""

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, …)`` per parameter to ``(B, n_entries)`` of mean 0 and standard deviation 1, float32."""
        return self.standardise(self.features(gradients))

    def standardise(self, features: Tensor) -> Tensor:
        """Features to mean 0 and standard deviation 1."""
        return (features - self.mean) / self.std

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch to the sums (a `PairFit`)."""
        self.add(self.features(gradients))

    def add(self, features: Tensor) -> None:
        """Add the features of a batch to the sums."""
        features = features.double()
        if not self._sums:
            zeros = torch.zeros(self.n_entries, dtype=torch.float64, device=features.device)
            self._sums = [zeros, zeros.clone(), torch.zeros((), dtype=torch.float64, device=features.device)]
        total, squares, count = self._sums
        total += features.sum(dim=0)
        squares += features.square().sum(dim=0)
        count += len(features)

    def sums(self) -> list[Tensor]:
        """Sum, sum of squares, count."""
        return self._sums

    def finish(self) -> None:
        """Mean and standard deviation from the sums."""
        total, squares, count = self._sums
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        std = variance.sqrt()
        # An entry that never varies (a dead unit) carries nothing; dividing by its tiny deviation would blow up
        # rounding errors and, at attack time, any deviation from the pairs.
        parts = [part for part in std.split(self._groups) if part.numel()]
        floors = [torch.full_like(part, 1e-6 * float(part.max().clamp_min(_TINY))) for part in parts]
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > torch.cat(floors), std, float("inf")) if floors else std)
        self._sums = []


class GradientScaling(StandardisedFeatures):
    """Divides each leak's gradient by the size of its output error, then standardises every entry.

    The size is ``‖∂L/∂b_L‖``, the norm of the last layer's bias gradient, which for cross-entropy is
    ``softmax(z) − y``: how wrong the leaked model was. For a model that does not end in a linear layer with a bias, it
    is the norm of the gradient of its last parameter of one dimension, or else of its last parameter.

    Before `finish` it only divides.
    """

    def __init__(self, architecture: Architecture, names: tuple[str, ...] | None = None) -> None:
        """``names``: the parameters whose gradients are wanted; None: all."""
        shapes = architecture.gradient_shapes
        names = tuple(shapes) if names is None else names
        n_entries = [shapes[name].numel() for name in names]
        super().__init__(sum(n_entries))
        self._names, self._n_entries = names, n_entries
        biases = [name for name, shape in architecture.parameter_shapes.items() if len(shape) == 1]
        self._size_name = output_bias(architecture) or [*shapes, *biases][-1]

    def split(self, scaled: Tensor) -> dict[str, Tensor]:
        """The result of `forward` by parameter: name → ``(B, entries)``."""
        return dict(zip(self._names, scaled.split(self._n_entries, dim=1), strict=True))

    def features(self, gradients: Gradients) -> Tensor:
        """Gradients relative to the output error's size."""
        flat = torch.cat([as_rows(gradients[name]) for name in self._names], dim=1)
        size = as_rows(gradients[self._size_name]).norm(dim=1, keepdim=True)
        return (flat / size.clamp_min(_TINY)).float()
