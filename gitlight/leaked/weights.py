"""Weights of leaked models, from files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gitlight.errors import CheckpointError, misfit

_PREFIX = "network."
"""What `LeakedModel` puts in front of its network's names."""

_GIVE = (
    "Give what torch.save(model.state_dict(), path) writes, a checkpoint, or the folder of a run of "
    "`python train.py CONFIG task=leaked`."
)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict, a Lightning checkpoint of a `LeakedModel`, or the last checkpoint of a run folder.

    Raises:
        CheckpointError: it is missing, unreadable, no state dict, of another architecture, or holds what is not finite.
    """
    state = _without_prefix(_read(path), network)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"leaked.weights: {path} is of another architecture: {misfit(error)}") from error
    _check_finite(network, path)


def _read(path: Path) -> dict[str, Any]:
    """The state dict in a file or a run folder."""
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise CheckpointError(f"leaked.weights: {path} does not exist. {_GIVE}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"leaked.weights: {path} cannot be read as weights ({type(error).__name__}): it is damaged, or holds more "
            f"than tensors, as a whole model that was pickled, whose code would run. {_GIVE}"
        ) from error
    if inside := isinstance(state, Mapping) and "state_dict" in state:
        state = state["state_dict"]
    wrong = type(state).__name__ if not isinstance(state, Mapping) else _first_that_is_no_weight(state)
    if wrong is not None:
        raise CheckpointError(
            f"leaked.weights: {path} holds {wrong}{' as its state_dict' if inside else ''}, where a tensor is expected "
            f"for the name of each parameter. {_GIVE}"
        )
    return dict(state)


def _first_that_is_no_weight(state: Mapping[Any, Any]) -> str | None:
    """What a mapping holds that a state dict does not, in words; None if it is one."""
    for name, value in state.items():
        # A module's own get_extra_state may return anything.
        if not isinstance(name, str) or not (isinstance(value, Tensor) or name.endswith("_extra_state")):
            return f"{type(value).__name__} under {name!r}"
    return None


def _without_prefix(state: Mapping[str, Any], network: nn.Module) -> Mapping[str, Any]:
    """A state dict under the network's own names, whether or not it was saved as a `LeakedModel`'s."""
    if not all(name.startswith(_PREFIX) for name in state):
        return state
    bare = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    # A model of the user's own may have a child of that name: its names fit as they are.
    known = network.state_dict().keys()
    return state if len(known & state.keys()) > len(known & bare.keys()) else bare


def _check_finite(network: nn.Module, path: Path) -> None:
    """Raises: CheckpointError, if a parameter holds NaN or infinity, or a buffer NaN."""
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(_not_finite(path, "NaN or infinity", name))
    for name, buffer in network.named_buffers():
        if buffer.isnan().any():  # a mask of attention holds infinities
            raise CheckpointError(_not_finite(path, "NaN", name))


def _not_finite(path: Path, what: str, name: str) -> str:
    return (
        f"leaked.weights: {path} holds {what} in {name!r}, and every gradient would be NaN. Training diverged: give "
        "weights of an earlier checkpoint, or train again with a lower learning rate."
    )
