"""The gradient that candidate images would give, differentiable in the images."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import log_softmax

from gitlight.architecture import Architecture
from gitlight.attacks.kinks import spread_kinks
from gitlight.data.pair import Gradients


class BatchNormInput(NamedTuple):
    """Mean and variance of what a batch norm layer takes, over a client batch, and what they are compared with.

    All are ``(channels,)``.
    """

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


class LeakedFunction:
    """A leaked model's loss and gradient as functions of images, from its architecture and values of its parameters."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """Args: the architecture, and a value for each of its parameters and constants."""
        self.architecture = architecture
        names = architecture.parameter_shapes
        self._parameters = {name: weights[name] for name in names}
        self._constants = {name: weights[name] for layer in architecture.layers for name in layer.constants.values()}

    def to(self, device: torch.device, dtype: torch.dtype) -> "LeakedFunction":
        """A copy there, in that precision."""
        values = {**self._parameters, **self._constants}
        moved = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in values.items()}
        return LeakedFunction(self.architecture, moved)

    def with_kinks_spread(self, width: float) -> "LeakedFunction":
        """The same function, with other second derivatives of ReLUs; see `spread_kinks`."""
        return LeakedFunction(spread_kinks(self.architecture, width), {**self._parameters, **self._constants})

    def gradient(self, images: Tensor, targets: Tensor) -> Gradients:
        """Of one client batch's mean cross-entropy.

        Args:
            images: ``(N, C, H, W)``.
            targets: ``(N, classes)``, probabilities.
        """

        def loss(parameters: Mapping[str, Tensor]) -> Tensor:
            return -(targets * log_softmax(self._logits(parameters, images), dim=1)).sum(dim=1).mean()

        found: Gradients = torch.func.grad(loss)(self._parameters)
        return found

    def logits(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, classes)``."""
        return self._logits(self._parameters, images)

    def batch_norm_inputs(self, images: Tensor) -> list[BatchNormInput]:
        """Statistics of each batch norm layer that has running ones."""
        layers = [layer for layer in self.architecture.layers if layer.kind == "batch_norm" and layer.constants]
        found = []
        seen = self._values(self._parameters, images, [layer.inputs[0] for layer in layers])
        for layer, values in zip(layers, seen, strict=True):
            entries = values.transpose(0, 1).flatten(1) if values.dim() > 2 else values.T
            running = (self._constants[layer.constants[f"running_{kind}"]] for kind in ("mean", "var"))
            found.append(BatchNormInput(entries.mean(dim=1), entries.var(dim=1, unbiased=False), *running))
        return found

    def _logits(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        return self._values(parameters, images, [self.architecture.output])[0]

    def _values(self, parameters: Mapping[str, Tensor], images: Tensor, names: list[str]) -> list[Tensor]:
        """Results of layers, ``(N, *shape)`` each."""
        weights = {**parameters, **self._constants}

        def of_one(image: Tensor) -> list[Tensor]:
            results = self.architecture.results(image, weights)
            return [results[name] for name in names]

        if len(images) == 1:
            return of_one(images[0])
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel of CPUs
            return [value.squeeze(1) for value in torch.func.vmap(of_one)(images)]
