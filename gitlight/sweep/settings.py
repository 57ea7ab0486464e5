"""The settings of a sweep's trials: whether their config accepts what is varied, and what all have in common."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gitlight.callbacks.run_settings import WHERE_AND_HOW_FAST
from gitlight.config import Config
from gitlight.config_loading import dotted, load_config
from gitlight.errors import ConfigError
from gitlight.sweep.metrics import check_metric
from gitlight.sweep.parameters import extreme_values

if TYPE_CHECKING:
    from gitlight.sweep.specification import Specification

ARGUMENTS = "${args_no_hyphens}"
COMMAND = "[${env}, ${interpreter}, ${program}, configs/lenet_hybrid.yaml, ${args_no_hyphens}]"
"""An example of one."""

_OF_THE_SWEEP = ("output_dir", "trainer.resume")

# Trials can be compared, wherever and however they are computed, read and logged.
_FREE = (
    *WHERE_AND_HOW_FAST,
    *_OF_THE_SWEEP,
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.checkpoint_every_n_steps",
    "trainer.keep_last",
)


def checked_settings(specification: "Specification") -> dict[str, str]:
    """What all trials have in common, by dotted names, in JSON.

    Raises:
        ConfigError: the command is none that trials could have; the config does not accept some parameter with all its
            bounds or choices; or the metric is not one of the task's.
    """
    if own := [name for name in specification.space if name in _OF_THE_SWEEP]:
        raise ConfigError(
            f"parameters.{own[0]} (in {specification.file}): the sweep gives each trial its own; leave it out."
        )
    items = specification.command[specification.command.index("${program}") + 1 :]
    if ARGUMENTS not in items:
        raise ConfigError(
            f"command: {ARGUMENTS} (in {specification.file}) stands before ${{program}}; expected "
            f"behind, as in {COMMAND}."
        )
    named = [item for item in items if item != ARGUMENTS and "=" not in item]
    if not named:
        raise ConfigError(f"command (in {specification.file}): expected a config file in it, as in {COMMAND}.")
    if own := [item for item in items if item.partition("=")[0] in _OF_THE_SWEEP and "=" in item]:
        raise ConfigError(
            f"command: {own[0]} (in {specification.file}): the sweep gives each trial its own; leave it out."
        )
    trains = Path(specification.program).name == "train.py"
    if trains:
        _check_call(items, specification)
    fixed = [item for item in items if "=" in item]
    after = [item for item in items[items.index(ARGUMENTS) :] if "=" in item]
    first = {name: extreme_values(distribution)[0] for name, distribution in specification.space.items()}
    trials = [first] + [
        {**first, name: value}
        for name, distribution in specification.space.items()
        for value in extreme_values(distribution)[1:]
    ]
    configs: list[Config] = []
    for trial in trials:
        try:
            varied = [f"{name}={value}" for name, value in trial.items()]
            config = load_config(named[0], [*fixed, *varied])
            overridden = load_config(named[0], [*fixed, *varied, *after]) != config
        except ConfigError as error:
            message = str(error).replace("on the command line", f"from {specification.file}")
            raise ConfigError(f"{specification.file}: {named[0]} does not accept its parameters: {message}") from error
        if overridden:
            raise ConfigError(
                f"command: {' '.join(after)} (in {specification.file}) stands after {ARGUMENTS} and sets what the "
                f"sweep varies, {' '.join(varied)}. Write it before, or leave it out."
            )
        if trains:  # a training within another program looks by itself
            check_metric(specification.metric, config, f"(in {specification.file})")
        configs.append(config)
    return {
        name: json.dumps(value)
        for name, value in dotted(configs[0]).items()
        if not name.startswith(_FREE) and name not in specification.space
    }


def trial_config(specification: "Specification", values: Mapping[str, Any]) -> Config:
    """The config that the command of a trial names, with its settings.

    Args:
        specification: the sweep, whose settings were checked.
        values: setting → value.
    """
    command = specification.expand_command(values)
    items = command[command.index(specification.program) + 1 :]
    return load_config(next(item for item in items if "=" not in item), [item for item in items if "=" in item])


def _check_call(items: Sequence[str], specification: "Specification") -> None:
    """Refuse what ``train.py`` would end at, in every trial.

    Args:
        items: of the command, after ``${program}``.
        specification: the sweep.
    """
    if helps := [item for item in items if item in ("-h", "--help")]:
        raise ConfigError(
            f"command: {helps[0]} (in {specification.file}): train.py would print its help, and train nothing; leave "
            "it out."
        )
    wrong = [item for at, item in enumerate(items) if item != ARGUMENTS and ("=" in item) == (at == 0)]
    if wrong or items[0] == ARGUMENTS:
        raise ConfigError(
            f"command: {[*wrong, ARGUMENTS][0]} (in {specification.file}): train.py takes one config file, right after "
            f"${{program}}, and then settings such as seed=1, as in {COMMAND}."
        )
