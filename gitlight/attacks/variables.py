"""What an iterative attack moves: pixels, a point in an image prior's latent space, or that prior's weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gitlight.attacks.image_prior import ImagePrior


class Variables(ABC):
    """A row of numbers for each of ``B`` searches, and how images are made of them.

    Attributes:
        start: ``(B, n)``, where the searches begin.
        constants: ``(B, k)``, what stays as it is.
    """

    def __init__(self, start: Tensor, constants: Tensor | None = None) -> None:
        self.start = start
        self.constants = start[:, :0] if constants is None else constants

    @abstractmethod
    def images(self, row: Tensor, constants: Tensor) -> Tensor:
        """``(n,)`` and ``(k,)`` of one search to its images ``(N, C, H, W)``; `torch.func.vmap` makes it many."""

    def penalty(self, row: Tensor) -> Tensor:
        """What is added to one search's objective; a number."""
        return row.new_zeros(())

    def constrain(self, rows: Tensor) -> Tensor:
        """``(b, n)`` after a step, back to where they are allowed."""
        return rows


class Pixels(Variables):
    """The images themselves."""

    def __init__(self, images: Tensor, box: bool) -> None:
        """Args: ``(B, N, C, H, W)`` to begin with, and whether to keep them in [0, 1]."""
        super().__init__(images.flatten(1))
        self._shape, self._box = images.shape[1:], box

    def images(self, row: Tensor, constants: Tensor) -> Tensor:
        """The row in its shape."""
        return row.view(self._shape)

    def constrain(self, rows: Tensor) -> Tensor:
        """Pixels into [0, 1]."""
        return rows.clamp(0, 1) if self._box else rows


class Latents(Variables):
    """A latent for each image (the first search of GIAS)."""

    def __init__(self, prior: ImagePrior, latents: Tensor, weight: float) -> None:
        """Args: the prior; ``(B, N, latent size)`` to begin with; the weight of the mean squared latent."""
        super().__init__(latents.flatten(1))
        self._decoder, self._shape, self._weight = _Decoder(prior, latents), latents.shape[1:], weight

    def images(self, row: Tensor, constants: Tensor) -> Tensor:
        """What the prior makes of them."""
        return self._decoder(row.view(self._shape), self._decoder.parameters)

    def penalty(self, row: Tensor) -> Tensor:
        """Latents of images are standard normal."""
        return self._weight * row.square().mean()


class DecoderWeights(Variables):
    """The prior's own weights, a copy for each search; latents stay (the second search of GIAS)."""

    def __init__(self, prior: ImagePrior, latents: Tensor) -> None:
        """Args: the prior; ``(B, N, latent size)``."""
        self._decoder, self._shape = _Decoder(prior, latents), latents.shape[1:]
        weights = torch.cat([value.flatten() for value in self._decoder.parameters.values()])
        super().__init__(weights.expand(len(latents), -1).contiguous(), latents.flatten(1))

    def images(self, row: Tensor, constants: Tensor) -> Tensor:
        """What the prior makes of the latents with these weights."""
        shapes = {name: value.shape for name, value in self._decoder.parameters.items()}
        parts = row.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return self._decoder(constants.view(self._shape), weights)


class _Decoder:
    """A prior's decoder as a function of its weights."""

    def __init__(self, prior: ImagePrior, like: Tensor) -> None:
        self._module = prior.decoder
        self.parameters = {name: value.detach().to(like) for name, value in self._module.named_parameters()}

    def __call__(self, latents: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        images: Tensor = torch.func.functional_call(self._module, dict(weights), (latents,))
        return images


def n_weights(module: nn.Module) -> int:
    """Numbers that a module has for parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
