"""Keeps a run's settings in its checkpoints, so that nothing else is continued by mistake."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from gitlight.config import Config, TrainerConfig
from gitlight.config_loading import dotted
from gitlight.errors import CheckpointError, ConfigError, differences
from gitlight.runs import FORMAT, VERSION

STATE_KEY = "RunSettings"
_PARTS = {"global_step": int, "loops": dict, "optimizer_states": list, "lr_schedulers": list}
"""What a checkpoint of a run holds beside weights and callbacks' states, and another's may not."""

WHERE_AND_HOW_FAST = (
    "output_dir",
    "evaluation.",
    "logging.",
    "data.root",
    "data.download",
    "data.num_workers",
    "data.memory_limit_gb",
    "gradients.memory_limit_gb",
    "gradients.method",
)
"""Beginnings of settings that say where a run computes, reads and logs, and how fast, not what."""

# How long a run trains may change, too, when it goes on. The weights that `leaked.weights` names are compared
# themselves.
_FREE = (*WHERE_AND_HOW_FAST, "trainer.", "leaked.weights")
# That a run is the same for every number of processes holds of all its parts, or not of the run.
_KEPT = "trainer.virtual_ranks"


class RunSettings(Callback):
    """Writes into every checkpoint the settings that decide what a run trains, on which images and how.

    Lightning restores optimiser, schedule and counters from a checkpoint, whatever the settings say by then: another
    learning rate would be ignored without a word, another seed would train on images that chose the best checkpoint.
    """

    state_key = STATE_KEY

    def __init__(self, config: Config) -> None:
        self._settings = _deciding(config)

    def state_dict(self) -> dict[str, Any]:
        """The settings, as dotted keys and plain values."""
        return dict(self._settings)


def check_resumable(path: Path, checkpoint: dict[str, Any], config: Config) -> None:
    """Refuse to continue a checkpoint's run with settings that are not its own.

    Args:
        path: the checkpoint's file, for the message.
        checkpoint: its contents.
        config: the settings given now.

    Raises:
        CheckpointError: they differ in more than where, how long and how fast to compute; or it holds none; or another
            version of gitlight wrote it.
    """
    states = checkpoint.get("callbacks")
    saved = states.get(STATE_KEY) if isinstance(states, dict) else None
    if not isinstance(saved, dict) or any(not isinstance(checkpoint.get(key), kind) for key, kind in _PARTS.items()):
        raise CheckpointError(f"{path} holds weights, but not a run that could be continued.")
    if (version := checkpoint.get(FORMAT)) != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint in format {version}, of another version of gitlight; this one continues format "
            f"{VERSION}. Continue the run with the version that began it, or start a new run, without trainer.resume."
        )
    now = _deciding(config)
    if _KEPT not in saved:  # of a run that did not keep it, and may have had any
        del now[_KEPT]
    # A setting that came after the run began had its default's effect there.
    if changed := differences({**_defaults(config, now), **saved}, now, "there"):
        raise CheckpointError(
            f"{path} is a checkpoint of a run with other settings ({changed}). A run goes on with its own: "
            "give its folder as the config and leave these out. For others start a new run, without trainer.resume."
        )


def check_remaining(path: Path, checkpoint: dict[str, Any], settings: TrainerConfig) -> None:
    """Refuse to continue a run to an end before the checkpoint, where nothing would be trained.

    Args:
        path: the checkpoint's file, for the message.
        checkpoint: its contents, which `check_resumable` has looked at.
        settings: how far to train.

    Raises:
        ConfigError: more epochs or steps are begun than there are to be.
    """
    done = {
        "max_epochs": checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["started"],
        "max_steps": checkpoint["global_step"],
    }
    for key, number in done.items():
        if 0 <= (limit := getattr(settings, key)) < number:
            what = key.removeprefix("max_")
            raise ConfigError(
                f"trainer.{key}: {limit}, and {path} is of {number} {what}: nothing would be trained. Give {number} or "
                "more, or an earlier checkpoint."
            )


def _deciding(config: Config) -> dict[str, Any]:
    return {key: value for key, value in dotted(config).items() if key == _KEPT or not key.startswith(_FREE)}


def _defaults(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    """Of these settings, those of the config's sections, which are of the same classes."""
    sections = {
        field.name: type(getattr(config, field.name))()
        for field in fields(config)
        if is_dataclass(getattr(config, field.name))
    }
    found = dotted(replace(config, **sections))
    return {key: found[key] for key in keys if key in found}
