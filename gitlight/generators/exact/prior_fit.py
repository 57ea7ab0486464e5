"""`PriorFit`: what public images say of the inputs that forward equations are used for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gitlight.data.pair import Gradients
from gitlight.generators.exact.forward import forward_values

if TYPE_CHECKING:
    from gitlight.generators.exact.inversion import Inversion


class PriorFit:
    """The `PairFit` of what public images say of each solved layer's input: mean and covariance.

    The inputs are computed from the images with the fitted weights; no gradient is used.
    """

    def __init__(self, inversion: "Inversion", names: Sequence[str]) -> None:
        self._inversion, self._names = inversion, names
        self._sums: dict[str, list[Tensor]] = {}

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of images."""
        inversion = self._inversion
        values = forward_values(inversion.architecture, images.flatten(0, 1), inversion.weights())
        for name in self._names:
            flat = values[name].flatten(1)
            if name not in self._sums:
                size = flat.shape[1]
                self._sums[name] = [flat.new_zeros(size), flat.new_zeros(size, size), flat.new_zeros(())]
            total, products, count = self._sums[name]
            total += flat.sum(dim=0)
            products.addmm_(flat.T, flat)
            count += len(flat)

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [total for name in self._names for total in self._sums[name]]

    def finish(self) -> None:
        """Keep means and precisions."""
        for name in self._names:
            total, products, count = self._sums.pop(name)
            mean = total / count
            covariance = products / count - torch.outer(mean, mean)
            if not covariance.diagonal().mean() > 1e-12 * products.diagonal().mean() / count:
                continue  # weights that no pair determined make a constant of it, of which rounding alone would be left
            # Fewer images than dimensions leave directions without any variance, in which a new image still may vary.
            covariance.diagonal().add_(0.01 * covariance.diagonal().mean() + 1e-300)
            self._inversion.keep_prior(name, mean, torch.linalg.inv(covariance))
