"""`Specification`: what a sweep file says, checked; the file's format is W&B's."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import distribution_to_json

from gitlight.errors import ConfigError
from gitlight.registry import did_you_mean
from gitlight.sweep.early_termination import EarlyTermination
from gitlight.sweep.parameters import Space, grid_values, parse_parameters
from gitlight.sweep.settings import ARGUMENTS, COMMAND, checked_settings

METHODS = ("grid", "random", "bayes")

_MACROS = ("${env}", "${interpreter}", "${program}", ARGUMENTS)
_KEYS = ("program", "command", "method", "metric", "parameters", "early_terminate", "run_cap")
_MEANINGLESS_HERE = ("name", "description", "project", "entity")
"""Keys that only W&B's site has a use for."""


@dataclass(frozen=True)
class Specification:
    """A sweep.

    Attributes:
        file: where it was read from.
        method: ``grid``, ``random`` or ``bayes``.
        metric: a metric that runs log at each validation.
        goal: ``maximize`` or ``minimize``.
        space: setting → what it is drawn from.
        early_terminate: how bad trials are stopped; None: not at all.
        run_cap: trials at most; None: no limit.
        command: a trial's command, with W&B's macros.
        program: what ``${program}`` stands for.
        settings: what all trials have in common, by dotted names, in JSON: of the command and the config in it.
    """

    file: Path
    method: str
    metric: str
    goal: str
    space: Space
    early_terminate: EarlyTermination | None
    run_cap: int | None
    command: tuple[str, ...]
    program: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The sweep's name: its file's."""
        return self.file.stem

    def grid_size(self) -> int:
        """Number of combinations."""
        return math.prod(map(len, self._columns()))

    def grid_point(self, place: int) -> dict[str, Any]:
        """The combination with this place, in ``range(grid_size())``; the file's last parameter changes fastest."""
        point: dict[str, Any] = {}
        for name, values in reversed(list(zip(self.space, self._columns(), strict=True))):
            place, at = divmod(place, len(values))
            point[name] = values[at]
        return {name: point[name] for name in self.space}

    def _columns(self) -> list[Sequence[Any]]:
        return [grid_values(distribution) or () for distribution in self.space.values()]

    def expand_command(self, values: Mapping[str, Any]) -> list[str]:
        """The command of a trial, as ``wandb agent`` makes it, except that the interpreter is the one running.

        Args:
            values: setting → value.
        """
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            ARGUMENTS: [f"{name}={value}" for name, value in values.items()],
        }
        return [part for item in self.command for part in macros.get(item, [item])]

    def fixed(self) -> dict[str, str]:
        """What must stay as it is while a sweep lasts, by the file's keys: text that can be compared."""
        terminate = None if self.early_terminate is None else self.early_terminate.kept()
        return {
            "method": self.method,
            "metric": f"{self.goal} {self.metric}",
            **{f"parameters.{name}": distribution_to_json(kind) for name, kind in self.space.items()},
            "early_terminate": json.dumps(terminate),
            "command": json.dumps(self.command),
            "program": self.program,
        }


def load_specification(path: str | Path) -> Specification:
    """Read a sweep file and check everything in it, the settings that it varies included.

    Raises:
        ConfigError: the file is missing, no sweep, or asks for what is not supported; or its command's config does not
            accept a value that its parameters can have. The message names the key and the file.
    """
    file = Path(path)
    if not file.is_file():
        siblings = [str(other) for other in sorted(file.parent.glob("*.yaml"))]
        raise ConfigError(f"{file}: no such sweep file.{did_you_mean(str(file), siblings)}")
    try:
        # As W&B reads it.
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a sweep (method, metric, parameters, …), found {type(content).__name__}.")
    for key in content:
        if key not in (*_KEYS, *_MEANINGLESS_HERE):
            raise ConfigError(
                f"{key} (in {file}) is no key of a sweep that is supported.{did_you_mean(str(key), _KEYS)} "
                f"Supported: {', '.join((*_KEYS, *_MEANINGLESS_HERE))}."
            )
    metric, goal = _metric(content.get("metric"), file)
    program = content.get("program")
    if not isinstance(program, str) or not Path(program).is_file():
        raise ConfigError(
            f"program: {program!r} (in {file}): expected a script that is there, seen from here: train.py."
        )
    if Path(program).name == "evaluate.py":
        raise ConfigError(
            f"program: {program} (in {file}): an evaluation logs no metric that trials could be compared by. Give "
            "train.py, and evaluate the best trials' folders."
        )
    specification = Specification(
        file=file,
        method=_method(content.get("method"), file),
        metric=metric,
        goal=goal,
        space=parse_parameters(content.get("parameters"), str(file)),
        early_terminate=_early_terminate(content.get("early_terminate"), file),
        run_cap=_positive("run_cap", content.get("run_cap"), file),
        command=_command(content.get("command"), file),
        program=program,
    )
    _check_grid(specification)
    return replace(specification, settings=checked_settings(specification))


def _method(given: Any, file: Path) -> str:
    if given not in METHODS:
        raise ConfigError(
            f"method: {given!r} (in {file}) is not supported.{did_you_mean(str(given), METHODS)} "
            f"Supported: {', '.join(METHODS)}."
        )
    return str(given)


def _metric(given: Any, file: Path) -> tuple[str, str]:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ConfigError(
            f"metric: {given!r} (in {file}): expected what trials are compared by, such as "
            "{name: val/psnr, goal: maximize}."
        )
    if unknown := [key for key in given if key not in ("name", "goal")]:
        raise ConfigError(f"metric.{unknown[0]} (in {file}) is not supported. Supported: name, goal.")
    goal = given.get("goal", "minimize")  # W&B's default
    if goal not in ("maximize", "minimize"):
        raise ConfigError(f"metric.goal: {goal!r} (in {file}): expected maximize or minimize.")
    return given["name"], goal


def _command(given: Any, file: Path) -> tuple[str, ...]:
    if not isinstance(given, list) or not given:
        raise ConfigError(
            f"command: {given!r} (in {file}): expected a list. W&B's default passes --key=value, which train.py "
            f"does not read; give {COMMAND}."
        )
    for item in given:
        if not isinstance(item, str):
            raise ConfigError(f"command: {item!r} (in {file}): expected text, such as trainer.max_epochs=3; quote it.")
    command = tuple(given)
    for item in command:
        if "${" in item and item not in _MACROS:
            raise ConfigError(f"command: {item} (in {file}) is not supported. Supported: {', '.join(_MACROS)}.")
    for needed in ("${program}", ARGUMENTS):
        if command.count(needed) != 1:
            raise ConfigError(f"command: expected {needed} once (in {file}), as in {COMMAND}.")
    return command


def _early_terminate(given: Any, file: Path) -> EarlyTermination | None:
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else given
    if not isinstance(given, dict) or kind != "hyperband":
        raise ConfigError(
            f"early_terminate: {kind!r} (in {file}) is not supported. Supported: {{type: hyperband, min_iter: 3}}."
        )
    known = ("type", "min_iter", "max_iter", "s", "eta", "strict")
    if unknown := [str(key) for key in given if key not in known]:
        raise ConfigError(
            f"early_terminate.{unknown[0]} (in {file}): no such key.{did_you_mean(unknown[0], known)} "
            f"Keys of hyperband: {', '.join(known)}."
        )
    strict = given.get("strict", False)
    if not isinstance(strict, bool):
        raise ConfigError(f"early_terminate.strict: {strict!r} (in {file}): expected true or false.")
    min_iter, max_iter, s, eta = (
        _positive(f"early_terminate.{key}", given.get(key), file) for key in ("min_iter", "max_iter", "s", "eta")
    )
    eta = 3 if eta is None else eta  # W&B's default
    if eta < 2:
        raise ConfigError(f"early_terminate.eta: {eta} (in {file}): expected 2 or more.")
    if (min_iter is None) == (max_iter is None) or (max_iter is None) != (s is None):
        raise ConfigError(f"early_terminate (in {file}): expected min_iter, or max_iter with s.")
    if min_iter is not None:
        return EarlyTermination.upwards(min_iter, eta, strict)
    assert max_iter is not None
    assert s is not None
    termination = EarlyTermination.downwards(max_iter, s, eta, strict)
    if not termination.brackets:
        raise ConfigError(
            f"early_terminate.max_iter: {max_iter} (in {file}) is below eta {eta}, and no trial would be judged: they "
            "are after max_iter over eta, eta², … validations. Give a larger max_iter, or min_iter."
        )
    return termination


def _positive(key: str, given: Any, file: Path) -> int | None:
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return given
    raise ConfigError(f"{key}: {given!r} (in {file}): expected a whole number above 0.")


def _check_grid(specification: Specification) -> None:
    if specification.method != "grid":
        return
    for name, distribution in specification.space.items():
        if grid_values(distribution) is None:
            raise ConfigError(
                f"parameters.{name} (in {specification.file}) has no end of values, and method: grid tries all. "
                "Give values: […], or q_uniform; or use method: random."
            )
