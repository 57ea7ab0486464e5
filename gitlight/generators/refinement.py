"""The learned stage of Hybrid-GIT: a convolutional network that sees features as maps."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from gitlight.architecture import ImageShape

_STRIDE = 2  # the refinement works at half the image's resolution: four times less work, no visible loss


class FeatureMaps(nn.Module):
    """Brings features of any shape, and flat gradients, to maps of the refinement's resolution.

    Maps are resized. Vectors, tokens and gradients become ``gradient_channels`` maps each, by a linear layer, or two
    with a hidden layer between where that takes fewer parameters. Levels, single numbers, become constant maps.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        shapes: Sequence[tuple[int, ...]],
        n_gradient_entries: int,
        gradient_channels: int,
        hidden_size: int,
        n_levels: int = 0,
    ) -> None:
        super().__init__()
        self.size = (-(-image_shape[1] // _STRIDE), -(-image_shape[2] // _STRIDE))
        self._vector_channels = gradient_channels
        n_drawn = gradient_channels * self.size[0] * self.size[1]
        self.n_channels = n_levels
        self.from_vectors = nn.ModuleDict()
        for index, shape in enumerate(shapes):
            if len(shape) == 3:
                self.n_channels += shape[0]
            elif gradient_channels > 0:
                self.from_vectors[str(index)] = _narrowed(prod(shape), n_drawn, hidden_size)
                self.n_channels += gradient_channels
        self.from_gradients: nn.Module | None = None
        if n_gradient_entries > 0 and gradient_channels > 0:
            self.from_gradients = _narrowed(n_gradient_entries, n_drawn, hidden_size)
            self.n_channels += gradient_channels

    def forward(self, features: Sequence[Tensor], gradients: Tensor | None, levels: Tensor) -> Tensor:
        """Standardised features, gradients ``(B, entries)`` and levels ``(B, n)`` to ``(B, n_channels, h, w)``."""
        maps = [levels[:, :, None, None].expand(-1, -1, *self.size)]
        for index, feature in enumerate(features):
            if feature.dim() == 4:
                maps.append(nn.functional.interpolate(feature, size=self.size, mode="nearest"))
            elif str(index) in self.from_vectors:
                maps.append(self._as_map(self.from_vectors[str(index)](feature.flatten(1))))
        if self.from_gradients is not None and gradients is not None:
            maps.append(self._as_map(self.from_gradients(gradients)))
        return torch.cat(maps, dim=1)

    def _as_map(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self._vector_channels, *self.size)


def _narrowed(n_inputs: int, n_outputs: int, hidden_size: int) -> nn.Module:
    if n_inputs * n_outputs <= hidden_size * (n_inputs + n_outputs):
        return nn.Linear(n_inputs, n_outputs)
    return nn.Sequential(nn.Linear(n_inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, n_outputs))


class Refinement(nn.Module):
    """Residual 3×3 convolutions at half resolution; what comes out is added to the start.

    For one image per leak the last layer starts at zero, so training starts from the linear start's quality. For more
    it does not: ``N`` equal outputs could not be told apart.
    """

    def __init__(
        self, image_shape: ImageShape, client_batch_size: int, maps: FeatureMaps, channels: int, blocks: int
    ) -> None:
        super().__init__()
        self._image_shape = image_shape
        self._client_batch_size = client_batch_size
        self.maps = maps
        folded = image_shape[0] * _STRIDE**2
        self.enter = nn.Conv2d(folded + maps.n_channels, channels, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(_ResidualBlock(channels) for _ in range(blocks))
        self.leave = nn.Conv2d(channels, client_batch_size * folded, kernel_size=3, padding=1)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]
        if client_batch_size == 1:
            nn.init.zeros_(self.leave.weight)

    def forward(self, start: Tensor, features: Sequence[Tensor], gradients: Tensor | None, levels: Tensor) -> Tensor:
        """Start ``(B, C, H, W)``, and what `FeatureMaps` takes, to what is to be added: ``(B, N, C, H, W)``."""
        height, width = self._image_shape[1:]
        padded = nn.functional.pad(start, (0, -width % _STRIDE, 0, -height % _STRIDE))
        folded = nn.functional.pixel_unshuffle(padded, _STRIDE) - 0.5
        hidden = self.enter(torch.cat([folded, self.maps(features, gradients, levels)], dim=1))
        for block in self.blocks:
            hidden = block(hidden)
        residual = nn.functional.pixel_shuffle(self.leave(torch.relu(hidden)), _STRIDE)
        residual = residual[..., :height, :width]
        return residual.reshape(-1, self._client_batch_size, *self._image_shape)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.second = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = hidden + self.second(torch.relu(self.first(torch.relu(hidden))))
        return result
