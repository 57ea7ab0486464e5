"""Gradients per leak by `torch.func`: vectorised over leaks, vectorised and compiled, or one leak after the other."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError
from gitlight.gradients.functional import functional

_Gradient = Callable[[Gradients, Gradients, Tensor, Tensor], Gradients]
"""Of one client batch: parameters that leak, other parameters and buffers, images ``(N, C, H, W)``, labels ``(N,)``."""


class FunctionalGradients:
    """The gradients of a network's loss, ``(B, *shape)`` for ``B`` leaks."""

    def __init__(self, network: nn.Module, method: str) -> None:
        """Set up; nothing is computed or compiled yet.

        Args:
            network: the leaked network.
            method: ``vmap``, ``compiled`` or ``loop``.
        """
        forward = functional(network)

        def loss(leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(forward(leaked | others, images), labels)

        self._compiled = method == "compiled"
        self._of_one: _Gradient = grad(loss)
        # randomness="different": a model with active dropout draws a mask per client batch, as separate clients would.
        over_leaks = vmap(self._of_one, in_dims=(None, None, 0, 0), randomness="different")
        if method == "loop":
            self._of_many: _Gradient = self._loop
        else:
            self._of_many = torch.compile(over_leaks, dynamic=False) if self._compiled else over_leaks

    def __call__(self, leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor) -> Gradients:
        """Gradients of ``B`` leaks.

        Args:
            leaked: the parameters that leak, by name.
            others: other parameters and buffers.
            images: ``(B, N, C, H, W)``.
            labels: ``(B, N)``.

        Raises:
            ConfigError: the model cannot be compiled here.
        """
        if not self._compiled:
            return self._of_many(leaked, others, images, labels)
        n_leaks = len(images)
        # Each number of leaks is compiled for itself: powers of two are few.
        missing = (1 << (n_leaks - 1).bit_length()) - n_leaks
        if missing:
            images = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
            labels = torch.cat([labels, labels[:1].expand(missing, -1)])
        try:
            made = self._of_many(leaked, others, images, labels)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"gradients.method: compiled does not work for this leaked model on this machine: {cause} "
                "It needs a C++ compiler. Give gradients.method=auto."
            ) from error
        return {name: gradient[:n_leaks] for name, gradient in made.items()}

    def _loop(self, leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor) -> Gradients:
        made = [self._of_one(leaked, others, *client) for client in zip(images, labels, strict=True)]
        return {name: torch.stack([one[name] for one in made]) for name in leaked}
