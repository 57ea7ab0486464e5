"""Weights that no closed form reaches: gradient matching on pairs, all solved layers fixed."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gitlight.data.pair import Gradients, as_rows
from gitlight.generators.base import FitOn
from gitlight.generators.exact.forward import model_gradients
from gitlight.generators.exact.labels import labels_from_bias_gradient

if TYPE_CHECKING:
    from gitlight.generators.exact.inversion import Inversion

log = logging.getLogger(__name__)

_LEARNING_RATE = 1e-2


class MatchingFit:
    """One pass of Adam over the pairs on ``‖∇L(W̃; x, y) − g‖² / ‖g‖²``, in the weights of the given layers.

    The image is public and the label read off the leak, so that only weights are unknown. Descent finds a local
    minimum: unlike the closed-form fits it is not sure to end at the leaked weights.
    """

    def __init__(self, inversion: "Inversion", trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Args: the inversion, the weights to train by name (leaves), and their optimiser."""
        self._inversion, self._trained, self._optimizer = inversion, trained, optimizer
        self._loss, self._count = 0.0, 0

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """One step."""
        inversion = self._inversion
        leaks = inversion.usable(gradients)
        bias = inversion.architecture[inversion.architecture.output].parameters["bias"]
        if not leaks.n:
            return
        labels = labels_from_bias_gradient(leaks.gradients[bias])
        with torch.enable_grad():
            weights = inversion.weights() | self._trained
            made = model_gradients(inversion.architecture, images[leaks.which, 0].double(), labels, weights)
            losses = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
            for name, gradient in leaks.gradients.items():
                size = as_rows(gradient).square().sum(dim=1).clamp_min(1e-300)
                losses = losses + as_rows(made[name] - gradient).square().sum(dim=1) / size
            loss = losses.mean()
            self._optimizer.zero_grad()
            loss.backward()
        self._optimizer.step()
        self._loss += float(loss.detach()) * len(labels)
        self._count += len(labels)

    def sums(self) -> Sequence[Tensor]:
        """Nothing: every device takes the same steps, over all pairs."""
        return []

    def finish(self) -> None:
        """Keep the weights."""
        log.info("gradient matching: mean relative squared distance %.3g", self._loss / max(1, self._count))
        self._inversion.keep_matched({name: value.detach() for name, value in self._trained.items()})


def matching_fits(
    inversion: "Inversion", names: Sequence[str], epochs: int, seed: int, start: Mapping[str, Tensor]
) -> Iterator[FitOn]:
    """Passes of gradient matching over the pairs.

    Args:
        inversion: holds the architecture and the solved weights.
        names: of the layers whose weights are trained.
        epochs: number of passes.
        seed: of the random start.
        start: parameter name → value to start from instead.
    """
    log.warning(
        "No closed form reaches the weights of %s from above or below: they are fitted by gradient matching, %d passes "
        "over the pairs with all other layers fixed, which may end at other weights than the leaked ones.",
        ", ".join(names),
        epochs,
    )
    generator, device = torch.Generator().manual_seed(seed), next(inversion.buffers()).device
    trained = {}
    for layer in (inversion.architecture[name] for name in names):
        for parameter in layer.parameters.values():
            shape = inversion.architecture.parameter_shapes[parameter]
            spread = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.01
            drawn = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * spread
            value = start.get(parameter, drawn).clone()
            trained[parameter] = value.to(device).requires_grad_()
    optimizer = torch.optim.Adam(trained.values(), lr=_LEARNING_RATE)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - epoch / epochs)
        yield FitOn(MatchingFit(inversion, trained, optimizer), everywhere=True)
