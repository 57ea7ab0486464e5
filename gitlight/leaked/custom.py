"""A user's own model: by its dotted path in the settings, or passed in Python."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from gitlight.architecture import ImageShape
from gitlight.config import Config, CustomConfig, GivenConfig, LeakedConfig
from gitlight.errors import ConfigError
from gitlight.exported import check_traceable, copied
from gitlight.leaked.activations import replace_activations
from gitlight.registry import did_you_mean


def custom(settings: CustomConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """The model that ``leaked.target(**leaked.arguments)`` returns.

    It must map images ``(B, C, H, W)`` in [0, 1] to logits ``(B, n_classes)``, each row from its own image alone.
    Neither image shape nor number of classes is passed: the arguments say all there is to say. The current folder can
    be imported from, as with ``python -m``.

    Args:
        settings: target, arguments and activation.
        image_shape: ``(C, H, W)``; checked when the model is traced.
        n_classes: number of outputs; checked when the model is traced.

    Raises:
        ConfigError: the target cannot be imported or called, does not return a module, or has no activation module to
            replace.
    """
    build = _import(settings.target)
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.arguments.items())
    call = f"{settings.target}({arguments})"
    # Importing may have drawn random numbers, and does so only once a process.
    torch.manual_seed(settings.seed)
    try:
        network = build(**settings.arguments)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"leaked.target: {call} fails with {type(error).__name__}: {error}. Arguments are set with "
            "leaked.arguments={name: value}."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"leaked.target: {call} returns {type(network).__name__}, not a torch.nn.Module.")
    return with_activation(network.cpu().float(), settings)


def with_network(config: Config, network: nn.Module | None) -> Config:
    """The config of a run whose leaked model is passed in Python: ``leaked`` then says so; None changes nothing.

    Of the settings of another leaked model only ``batch_norm`` is kept: the others say how to make that one.
    """
    if network is None:
        return config
    former = config.leaked
    leaked = former if isinstance(former, GivenConfig) else GivenConfig(batch_norm=former.batch_norm)
    return replace(config, leaked=replace(leaked, type=f"{type(network).__module__}.{type(network).__qualname__}"))


def given(settings: LeakedConfig, network: nn.Module) -> nn.Module:
    """A copy, on the CPU and in float32, of a model passed in Python; the user's own is never changed.

    Raises:
        ArchitectureError: it cannot be traced, or not be copied.
        ConfigError: it has no activation module to replace.
    """
    check_traceable(network)
    return with_activation(copied(network).cpu().float(), settings)


def not_given(settings: GivenConfig, image_shape: ImageShape, n_classes: int) -> NoReturn:
    """What a config stands for that names no model, because one was passed in Python.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"leaked.name: 'given' stands for a model that was passed in Python ({settings.type or 'no class recorded'}), "
        "and no settings can make it. Pass it again: train(config, network=…) or evaluate(config, network=…). To "
        "attack it from the command line, name where it is made: leaked.name=custom leaked.target=package.module:Class."
    )


def with_activation(network: nn.Module, settings: LeakedConfig) -> nn.Module:
    """The network with the activation of ``leaked.activation``, in place, unless that is ``own``.

    Raises:
        ConfigError: it has no activation module.
    """
    if settings.activation != "own" and replace_activations(network, settings.activation) == 0:
        raise ConfigError(
            f"leaked.activation: {type(network).__name__} has no activation module that {settings.activation} could "
            "replace (functions called in its forward stay as they are). Give leaked.activation=own."
        )
    return network


def _import(target: str | None) -> Callable[..., Any]:
    module_name, _, name = (target or "").replace(":", ".").rpartition(".")
    if not module_name or not name:
        raise ConfigError(
            f"leaked.target: {target!r}: leaked.name=custom takes what makes the model as package.module:Class or "
            "package.module.function."
        )
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code may raise anything
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"leaked.target: {target}: there is no module {missing!r}, neither installed nor in the current "
                f"folder, {folder}."
            ) from error
        raise ConfigError(
            f"leaked.target: {target}: importing {module_name} fails with {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(f"leaked.target: {target}: {module_name} has no {name!r}.{did_you_mean(name, public)}")
    found = getattr(module, name)
    if isinstance(found, nn.Module) or not callable(found):
        raise ConfigError(
            f"leaked.target: {target} is {type(found).__name__}, not a class or a function that returns a model."
        )
    build: Callable[..., Any] = found
    return build
