"""Weights of leaked models, from files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gitlight.errors import CheckpointError, misfit

_PREFIX = "network."
"""What `LeakedModel` puts in front of its network's names."""


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict, a Lightning checkpoint of a `LeakedModel`, or the last checkpoint of a run folder.

    Raises:
        CheckpointError: it is missing, unreadable, or of another architecture.
    """
    state = _without_prefix(_read(path), network)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"leaked.weights: {path} is of another architecture: {misfit(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    """The state dict in a file or a run folder."""
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise CheckpointError(
            f"leaked.weights: {path} does not exist. Give a state dict saved by torch.save, a checkpoint, "
            "or the folder of a run of `python train.py CONFIG task=leaked`."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"leaked.weights: {path} cannot be read as weights: {error}") from error
    if "state_dict" in state:
        state = state["state_dict"]
    return dict(state)


def _without_prefix(state: Mapping[str, Any], network: nn.Module) -> Mapping[str, Any]:
    """A state dict under the network's own names, whether or not it was saved as a `LeakedModel`'s."""
    if not all(name.startswith(_PREFIX) for name in state):
        return state
    bare = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    # A model of the user's own may have a child of that name: its names fit as they are.
    known = network.state_dict().keys()
    return state if len(known & state.keys()) > len(known & bare.keys()) else bare
