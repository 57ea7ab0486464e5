"""Ways to train the same layers faster, which change results by rounding only."""

from collections.abc import Iterator

import torch
from torch import nn

from gitlight.config import TrainerConfig
from gitlight.errors import ConfigError


def speed_up(module: nn.Module, settings: TrainerConfig) -> None:
    """Lay the trained layers' weights out channels last, and have them compiled, where ``trainer.*`` asks for it.

    Layers are changed in place; names of parameters, and so checkpoints, stay as they are. Compilation itself takes
    place at the first steps. Closed forms are neither: they compute in float64, by code that depends on what it finds.

    Args:
        module: a generator, a leaked model or an image prior.
        settings: of the run.

    Raises:
        ConfigError: no layer of it is trained in single precision.
    """
    if not (settings.compile or settings.channels_last):
        return
    layers = list(trained_layers(module))
    if not layers:
        key = "compile" if settings.compile else "channels_last"
        raise ConfigError(
            f"trainer.{key}: {type(module).__name__} has no layers that are trained in single precision. "
            f"Leave trainer.{key} out."
        )
    for layer in layers:
        if settings.channels_last:
            layer.to(memory_format=torch.channels_last)
        if settings.compile:
            layer.compile()


def trained_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The children that are called as layers and have something to train; lists of layers are opened."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from trained_layers(child)
        elif any(p.requires_grad and p.dtype != torch.float64 for p in child.parameters()):
            yield child
