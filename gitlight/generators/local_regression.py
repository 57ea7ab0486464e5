"""A linear start from feature maps that is the same at all of their positions."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE, Architecture, ImageShape
from gitlight.generators.ridge import RidgeRegression

_NEIGHBOURHOOD = 3
"""Positions along each side of a neighbourhood."""

_MOST_FEATURES, _MOST_OUTPUTS = 2304, 1024
"""Of a neighbourhood and of the window of pixels that is made of it."""

_MOST_POSITIONS = 256
"""That are taken of each pair for the fit: more of the same image tell little more."""

_BYTES_AT_ONCE = 1 << 26
"""Of neighbourhoods in double precision."""


def stride_of(architecture: Architecture, result: str) -> tuple[int, int] | None:
    """How many rows and columns of the image two neighbouring entries of a result are apart; None where none tells."""
    rows, columns = 1, 1
    while result != IMAGE:
        layer = architecture[result]
        if layer.kind in ("conv2d", "max_pool2d", "avg_pool2d"):
            # A pooling's stride is its kernel's size, unless one is given.
            steps = list(layer.arguments["stride"] or layer.arguments["kernel_size"])
            rows, columns = rows * int(steps[0]), columns * int(steps[-1])
        elif not layer.inputs or layer.output_shape[1:] != layer.input_shape[1:] or len(layer.output_shape) != 3:
            return None
        result = layer.inputs[0]
    return rows, columns


class LocalRegression(nn.Module):
    """Ridge regression from the neighbourhood of a position to the window of pixels around it.

    Where features are made by convolutions, so are the images that are made of them: one regression for all positions
    has some hundred coefficients for each output, of which each pair gives as many equations as there are positions.
    One regression from whole maps to the whole image has as many coefficients as there are entries, and as many
    equations as there are pairs.
    """

    def __init__(self, shape: Sequence[int], image_shape: ImageShape, stride: tuple[int, int]) -> None:
        """Args: shapes of maps ``(C, h, w)`` and images, and how far apart neighbours are in the image.

        `is_possible` must hold of them.
        """
        super().__init__()
        self._shape, self._image_shape, self._stride = shape, image_shape, stride
        self._window = _window(shape, image_shape, stride)
        self.ridge = RidgeRegression(shape[0] * _NEIGHBOURHOOD**2, image_shape[0] * prod(self._window))
        self.n_entries = prod(shape)

    @staticmethod
    def is_possible(shape: Sequence[int], image_shape: ImageShape, stride: tuple[int, int] | None) -> bool:
        """Whether windows that lie in the image cover it, and the regression is not too large."""
        if len(shape) != 3 or stride is None or min(shape[1:]) < _NEIGHBOURHOOD:
            return False
        window = _window(shape, image_shape, stride)
        covered = all(size >= step for size, step in zip(window, stride, strict=True))
        small = shape[0] * _NEIGHBOURHOOD**2 <= _MOST_FEATURES and image_shape[0] * prod(window) <= _MOST_OUTPUTS
        return covered and small

    @property
    def error(self) -> Tensor:
        """Root mean square over the windows of pairs held out."""
        return self.ridge.error

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, C · h · w)`` float64 to images ``(B, entries)``, float32."""
        axes = zip(self._image_shape[1:], self._shape[1:], self._stride, self._window, strict=True)
        (down, row), (right, column) = (_nearest(*axis, device=maps.device) for axis in axes)
        # The window that each pixel is taken of, and its place in that.
        position, place = down[:, None] * self._shape[2] + right, row[:, None] * self._window[1] + column
        images = []
        for part in maps.split(self._at_once):
            windows = self.ridge(self._neighbourhoods(part).flatten(0, 1))
            windows = windows.view(len(part), -1, self._image_shape[0], prod(self._window))
            images.append(windows.transpose(1, 2)[:, :, position, place].flatten(1))
        return torch.cat(images)

    def add(self, maps: Tensor, wanted: Tensor, numbers: Tensor) -> None:
        """Add pairs to the sums: maps and images ``(B, entries)``, and the pairs' numbers ``(B,)``."""
        n_positions = prod(self._shape[1:])
        some = min(n_positions, _MOST_POSITIONS)
        spread = torch.arange(some, device=maps.device) * n_positions // some
        for part, images, its in zip(*(one.split(self._at_once) for one in (maps, wanted, numbers)), strict=True):
            images = images.to(maps.dtype).view(len(part), *self._image_shape)
            windows = nn.functional.unfold(images, self._window, stride=self._stride).transpose(1, 2)
            positions = ((spread + its[:, None]) % n_positions).unsqueeze(2)
            features, outputs = (
                one.gather(1, positions.expand(-1, -1, one.shape[2])).flatten(0, 1)
                for one in (self._neighbourhoods(part), windows)
            )
            self.ridge.add(features, outputs, its.repeat_interleave(some))

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return self.ridge.sums()

    def solve(self) -> None:
        """From the sums, which are forgotten."""
        self.ridge.solve()

    @property
    def _at_once(self) -> int:
        return max(1, _BYTES_AT_ONCE // (8 * self.n_entries * _NEIGHBOURHOOD**2))

    def _neighbourhoods(self, maps: Tensor) -> Tensor:
        """``(B, entries)`` to ``(B, positions, C · neighbours)``; beyond the border, the border once more."""
        maps = maps.view(len(maps), *self._shape)
        padded = nn.functional.pad(maps, [_NEIGHBOURHOOD // 2] * 4, mode="replicate")
        return nn.functional.unfold(padded, _NEIGHBOURHOOD).transpose(1, 2)


class LocalOrWhole(nn.Module):
    """A regression from neighbourhoods, or one from all features at once, whichever errs less on pairs held out."""

    is_local: Tensor

    def __init__(self, ridge: RidgeRegression, local: LocalRegression) -> None:
        """Args: of the features that come after the maps' own entries; and of the maps."""
        super().__init__()
        self.ridge, self.local = ridge, local
        self.register_buffer("is_local", torch.zeros((), dtype=torch.bool))

    @property
    def error(self) -> Tensor:
        """Root mean square over pairs held out."""
        return torch.where(self.is_local, self.local.error, self.ridge.error)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, entries of the maps + n)`` float64 to images ``(B, entries)``, float32."""
        maps, others = self._divided(features)
        found: Tensor = self.local(maps) if bool(self.is_local) else self.ridge(others)
        return found

    def add(self, features: Tensor, wanted: Tensor, numbers: Tensor) -> None:
        """Add pairs to the sums of both."""
        maps, others = self._divided(features)
        self.local.add(maps, wanted, numbers)
        self.ridge.add(others, wanted, numbers)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [*self.local.sums(), *self.ridge.sums()]

    def solve(self) -> None:
        """Solve both, and choose."""
        self.local.solve()
        self.ridge.solve()
        self.is_local.copy_(self.local.error < self.ridge.error)

    def _divided(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, : self.local.n_entries], features[:, self.local.n_entries :]


def _window(shape: Sequence[int], image_shape: ImageShape, stride: tuple[int, int]) -> tuple[int, int]:
    """Height and width of windows so many steps apart that as many as there are positions span the image."""
    height, width = (size - step * (n - 1) for size, step, n in zip(image_shape[1:], stride, shape[1:], strict=True))
    return height, width


def _nearest(size: int, n: int, step: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of ``size`` pixels in a row the window whose middle is nearest, and its place in that."""
    pixels = torch.arange(size, device=device)
    positions = ((pixels - (window - step) // 2) // step).clamp(0, n - 1)
    return positions, pixels - positions * step
