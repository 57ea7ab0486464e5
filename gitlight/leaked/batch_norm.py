"""Batch norm over the client's own batch: what a client in training mode computes, without any state that changes."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gitlight.architecture import Architecture
from gitlight.errors import ConfigError


class ClientBatchNorm(nn.Module):
    """Batch norm by the mean and variance of the batch that it is given, whatever its mode.

    It has no running statistics, so that nothing can change between leaks. Under ``torch.func.vmap`` over client
    batches each is normalised by itself. Weight and bias are those of the layer that it replaces.
    """

    def __init__(self, replaced: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = replaced.weight, replaced.bias
        self.eps = replaced.eps

    def forward(self, activations: Tensor) -> Tensor:
        """``(N, C, …)`` to the same shape.

        Raises:
            ConfigError: there is one value per channel, whose variance is zero.
        """
        # On the meta device an architecture is traced, with one image whatever N is; only shapes matter there.
        if activations.device.type != "meta" and activations.numel() == activations.shape[1]:
            raise ConfigError(_one_value_per_channel("a batch norm layer"))
        # Not nn.functional.batch_norm, which checks the number of values, while tracing as well.
        return torch.batch_norm(
            activations, self.weight, self.bias, None, None, True, 0.0, self.eps, torch.backends.cudnn.enabled
        )


# A client computes alone, and has no other processes to synchronise its statistics with.
_REPLACEABLE = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def use_batch_statistics(network: nn.Module) -> None:
    """Replace batch norm layers by `ClientBatchNorm`, in place; parameters keep their names and order.

    Layers with a ``forward`` of their own stay: what they do is not known. `check_replaced` finds those that matter.
    """
    replacements: dict[_BatchNorm, ClientBatchNorm] = {}
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and type(child).forward in _REPLACEABLE:
                # A layer that is used at several places stays one layer.
                parent._modules[name] = replacements.setdefault(child, ClientBatchNorm(child))


def check_replaced(architecture: Architecture) -> None:
    """Check that a model normalises by the client's batch, after `use_batch_statistics`.

    Raises:
        ConfigError: it has no batch norm, or one that goes on using running statistics; the message names it.
    """
    norms = [layer for layer in architecture.layers if layer.kind == "batch_norm"]
    if not norms:
        raise ConfigError(
            "leaked.batch_norm: batch: the leaked model has no batch norm whose statistics could be those of the "
            "client's batch. Give leaked.batch_norm=running."
        )
    for layer in norms:
        if not layer.arguments["training"]:
            raise ConfigError(
                f"leaked.batch_norm: batch: {layer.place} of the leaked model goes on using running statistics: it is "
                "computed by a forward of the model's own, which cannot be replaced. Write it as torch.nn.BatchNorm2d "
                "(or 1d, 3d) and a module of its own for the rest, or give leaked.batch_norm=running."
            )


def check_batch_statistics(architecture: Architecture, smallest_batch: int) -> None:
    """Check that every batch norm over the client's own batch has more than one value per channel.

    Args:
        architecture: the leaked model's.
        smallest_batch: the smallest number of images that a client makes a gradient of.

    Raises:
        ConfigError: a layer has only one; the message names it.
    """
    if smallest_batch > 1:
        return
    for layer in architecture.layers:
        if (
            layer.kind == "batch_norm"
            and layer.arguments["training"]
            and not any(n > 1 for n in layer.output_shape[1:])
        ):
            raise ConfigError(_one_value_per_channel(layer.place))


def _one_value_per_channel(place: str) -> str:
    return (
        f"leaked.batch_norm: batch: {place} of the leaked model sees one value per channel, a single image of 1×1 "
        "pixels, whose variance is zero: the training step of the client would fail. Give larger images "
        "(data.image_size), several images per local step (data.client_batch_size, gradients.updates.batch_size), or "
        "leaked.batch_norm=running."
    )
