"""Input scaling: what makes gradients, which vary over orders of magnitude, learnable."""

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients

_TINY = 1e-30


class GradientScaling(nn.Module):
    """Divides each leak's gradient by the size of its output error, then standardises every entry.

    The size is ``‖∂L/∂b_L‖``, the norm of the last layer's bias gradient, which for cross-entropy is
    ``softmax(z) − y``: how wrong the leaked model was. Mean and standard deviation of every entry come from pairs.

    Before `GradientScaling.finish` it only divides.
    """

    def __init__(self, architecture: Architecture, names: tuple[str, ...] | None = None) -> None:
        """``names``: the parameters whose gradients are wanted; None: all."""
        super().__init__()
        shapes = architecture.gradient_shapes
        self._names = tuple(shapes) if names is None else names
        biases = [name for name, shape in architecture.parameter_shapes.items() if len(shape) == 1]
        self._size_name = biases[-1] if biases else list(shapes)[-1]
        self._n_entries = [shapes[name].numel() for name in self._names]
        self.n_entries = sum(self._n_entries)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(self.n_entries))
        self.register_buffer("std", torch.ones(self.n_entries))
        self._sums: list[Tensor] = []

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, …)`` per parameter to ``(B, n_entries)`` of mean 0 and standard deviation 1, float32."""
        return (self._relative(gradients) - self.mean) / self.std

    def split(self, scaled: Tensor) -> dict[str, Tensor]:
        """The result of `forward` by parameter: name → ``(B, entries)``."""
        return dict(zip(self._names, scaled.split(self._n_entries, dim=1), strict=True))

    def _relative(self, gradients: Gradients) -> Tensor:
        flat = torch.cat([gradients[name].flatten(1) for name in self._names], dim=1)
        size = gradients[self._size_name].flatten(1).norm(dim=1, keepdim=True)
        return (flat / size.clamp_min(_TINY)).float()

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch to the sums (a `PairFit`)."""
        relative = self._relative(gradients).double()
        if not self._sums:
            zeros = torch.zeros(self.n_entries, dtype=torch.float64, device=relative.device)
            self._sums = [zeros, zeros.clone(), torch.zeros((), dtype=torch.float64, device=relative.device)]
        total, squares, count = self._sums
        total += relative.sum(dim=0)
        squares += relative.square().sum(dim=0)
        count += len(relative)

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
        floor = 1e-6 * std.max().clamp_min(_TINY)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > floor, std, torch.full_like(std, float("inf"))))
        self._sums = []
