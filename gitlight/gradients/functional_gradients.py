"""Gradients per leak by `torch.func`, vectorised over leaks or vectorised and compiled; or by autograd, one by one."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from gitlight.data.pair import Gradients
from gitlight.errors import ArchitectureError, ConfigError, first_line
from gitlight.gradients.delta_in_order import delta_in_order
from gitlight.gradients.functional import functional, no_tensors_left_in
from gitlight.gradients.labels import cross_entropy

log = logging.getLogger(__name__)

_Loss = Callable[[Gradients, Gradients, Tensor, Tensor], Tensor]
"""Of one client batch: parameters that leak, other parameters and buffers, images ``(N, C, H, W)``, labels ``(N,)``."""

_OVERWRITTEN = "modified by an inplace operation"
"""In what autograd says of a network that cannot be trained either."""

_Gradient = Callable[[Gradients, Gradients, Tensor, Tensor], Gradients]


class FunctionalGradients:
    """The gradients of a network's loss, ``(B, *shape)`` for ``B`` leaks."""

    def __init__(self, network: nn.Module, method: str, falls_back: bool = False) -> None:
        """Set up; nothing is computed or compiled yet.

        Args:
            network: the leaked network.
            method: ``vmap``, ``compiled`` or ``loop``.
            falls_back: whether ``vmap`` gives way to ``loop`` where the model cannot be vectorised.
        """
        self._network = network
        self._method = method
        self._falls_back = falls_back
        self._compiled: _Gradient | None = None

    def __call__(
        self, leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor, own_weights: bool = False
    ) -> Gradients:
        """Gradients of ``B`` leaks.

        Args:
            leaked: the parameters that leak, by name.
            others: other parameters and buffers.
            images: ``(B, N, C, H, W)``.
            labels: ``(B, N)``.
            own_weights: whether each leak has its own: ``leaked`` is then ``(B, *shape)``.

        Raises:
            ConfigError: the model cannot be vectorised, or not compiled here.
        """
        if self._method == "loop":
            return self._one_by_one(leaked, others, images, labels, own_weights)
        # Copies, as a forward pass may overwrite them, also one that fails.
        if self._method == "compiled":
            return self._by_compiled(leaked, _copied(others), images.clone(), labels)
        try:
            over_leaks = _over_leaks(_loss_of(self._network), own_weights)
            return over_leaks(leaked, _copied(others), images.clone(), labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # What is wrong with the model itself is raised here as it is.
            first = {name: p[:1] for name, p in leaked.items()} if own_weights else leaked
            self._one_by_one(first, others, images[:1], labels[:1], own_weights)
            cause = first_line(error)
            if not self._falls_back:
                raise ConfigError(
                    f"gradients.method: vmap does not work for this leaked model: {cause} Give gradients.method=loop."
                ) from error
            log.info("Gradients are made one by one: this leaked model cannot be vectorised over leaks: %s", cause)
            self._method = "loop"
        return self._one_by_one(leaked, others, images, labels, own_weights)

    def _by_compiled(self, leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor) -> Gradients:
        if self._compiled is None:
            self._compiled = torch.compile(_over_leaks(_loss_of(self._network), own_weights=False), dynamic=False)
        n_leaks = len(images)
        # Each number of leaks is compiled for itself: powers of two are few.
        missing = (1 << (n_leaks - 1).bit_length()) - n_leaks
        if missing:
            images = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
            labels = torch.cat([labels, labels[:1].expand(missing, -1)])
        try:
            with no_tensors_left_in(self._network):
                made = self._compiled(leaked, others, images, labels)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = first_line(error)
            raise ConfigError(
                f"gradients.method: compiled does not work for this leaked model on this machine: {cause} "
                "It needs a C++ compiler. Give gradients.method=auto."
            ) from error
        return {name: gradient[:n_leaks] for name, gradient in made.items()}

    def _one_by_one(
        self, leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor, own_weights: bool
    ) -> Gradients:
        made = [
            gradient_by_autograd(
                self._network,
                {name: p[number] for name, p in leaked.items()} if own_weights else leaked,
                others,
                images[number],
                labels[number],
            )
            for number in range(len(images))
        ]
        return {name: torch.stack([one[name] for one in made]) for name in leaked}


def gradient_by_autograd(
    network: nn.Module, leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor
) -> Gradients:
    """The gradient of one client batch, as any client makes it: by one backward pass of autograd.

    Args:
        network: the leaked network.
        leaked: the parameters that leak, by name.
        others: other parameters and buffers; copied, as are images, so that they stay as they are.
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.

    Raises:
        ArchitectureError: the network overwrites what its own backward pass needs.
    """
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in leaked.items()}

    def backward(logits: Tensor) -> Gradients:
        loss = cross_entropy(logits, labels)
        if not loss.requires_grad:
            return {name: torch.zeros_like(parameter) for name, parameter in leaked.items()}
        # As a client calls it: a checkpoint with use_reentrant=True goes through no torch.autograd.grad.
        loss.backward()
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    try:
        with delta_in_order(images.device.type):
            result: Gradients = functional(network, backward)(leaves | _copied(others), images.clone())
    except RuntimeError as error:
        if _OVERWRITTEN not in str(error):
            raise
        raise ArchitectureError(
            f"{type(network).__name__} has no gradients: it overwrites what autograd needs again on the way back, as "
            f"`x += y` and inplace=True can: {first_line(error)} Write `x = x + y`, or leave inplace=True out."
        ) from error
    return result


def _loss_of(network: nn.Module) -> _Loss:
    forward = functional(network)

    def loss(leaked: Gradients, others: Gradients, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(forward(leaked | others, images), labels)

    return loss


def _over_leaks(loss: _Loss, own_weights: bool) -> _Gradient:
    # randomness="different": a model with active dropout draws a mask per client batch, as separate clients would.
    mapped: _Gradient = vmap(grad(loss), in_dims=(0 if own_weights else None, None, 0, 0), randomness="different")
    return mapped


def _copied(tensors: Gradients) -> Gradients:
    return {name: value.clone() for name, value in tensors.items()}
