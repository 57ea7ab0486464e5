"""LTI, Learning To Invert (Wu et al. 2023): one multilayer perceptron from the flattened gradient to the images."""

import itertools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.config import MLPGeneratorConfig
from gitlight.data.pair import Gradients, as_rows
from gitlight.generators.base import Generator, PairFit
from gitlight.generators.noise_level import NoiseLevel, check_noise_range
from gitlight.generators.scaling import GradientScaling
from gitlight.generators.width import width_for_budget


class MLPGenerator(Generator):
    """Hidden layers of equal size with ReLU, sigmoid output; any leaked model, any client batch size.

    With ``scale_inputs`` off it is LTI as published: raw gradients in. For a range of noise it sees
    how noisy a leak is.
    """

    accepts_sketches = True

    def __init__(self, architecture: Architecture, settings: MLPGeneratorConfig, client_batch_size: int = 1) -> None:
        super().__init__(architecture, client_batch_size)
        check_noise_range(settings.noise_range, architecture, client_batch_size)
        self._noise = NoiseLevel(architecture, settings.noise_range)
        self.scaling = GradientScaling(architecture) if settings.scale_inputs else None
        n_inputs = sum(shape.numel() for shape in architecture.gradient_shapes.values()) + self._noise.n_entries
        n_outputs = prod(self.image_shape)

        def build(width: int) -> nn.Sequential:
            sizes = [n_inputs, *[width] * settings.hidden_layers]
            hidden = [
                layer
                for size, next_size in itertools.pairwise(sizes)
                for layer in (nn.Linear(size, next_size), nn.ReLU())
            ]
            return nn.Sequential(*hidden, nn.Linear(width, n_outputs), nn.Sigmoid())

        width = settings.hidden_size
        if settings.parameters is not None:
            width = width_for_budget(build, settings.parameters)
        self.network = build(width)

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, N, C, H, W)`` in [0, 1]."""
        if self.scaling is None:
            flat = torch.cat([as_rows(gradient) for gradient in gradients.values()], dim=1).float()
        else:
            flat = self.scaling(gradients)
        images: Tensor = self.network(torch.cat([flat, self._noise.seen(gradients)], dim=1))
        return images.view(-1, *self.image_shape).float()

    def describe(self, leak: str = "gradient") -> str:
        """Whether it sees a leak's noise, where it was to."""
        return self._noise.describe()

    def fits(self) -> Sequence[PairFit]:
        """The scaling's statistics."""
        return () if self.scaling is None else (self.scaling,)
