"""The ``parameters:`` of a sweep file, in W&B's words, as Optuna's distributions."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from gitlight.errors import ConfigError
from gitlight.registry import did_you_mean

UNSUPPORTED = (
    "categorical_w_probabilities",
    "inv_log_uniform",
    "inv_log_uniform_values",
    "q_log_uniform",
    "normal",
    "q_normal",
    "log_normal",
    "q_log_normal",
    "beta",
    "q_beta",
)
"""What W&B's format has and Optuna's distributions cannot say."""

_KEYS = ("value", "values", "min", "max", "distribution", "q")
_OTHER_KEYS = ("probabilities", "mu", "sigma", "a", "b")
"""Keys of W&B's that only unsupported distributions use."""

_MOST = 2**53
"""Optuna keeps numbers as floats, which tell whole numbers apart up to here."""

Space = dict[str, BaseDistribution]


def parse_parameters(given: Any, file: str, prefix: str = "") -> Space:
    """What a sweep varies; what has a constant value is a choice of one.

    Args:
        given: the mapping under ``parameters:``; nested ones have their names joined by dots.
        file: the sweep file, for messages.
        prefix: the names around, each with its dot.

    Returns:
        Name → distribution, in the order of the file.

    Raises:
        ConfigError: what is given is no parameter, or one that Optuna cannot represent.
    """
    place = f"parameters.{prefix}".rstrip(".")
    if not isinstance(given, dict) or not given:
        raise ConfigError(
            f"{place}: {given!r} (in {file}): expected settings to vary, such as "
            "optimizer.learning_rate: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}."
        )
    space: Space = {}
    for key, entry in given.items():
        name = f"{prefix}{key}"
        if isinstance(entry, dict) and "parameters" in entry:
            if others := [other for other in entry if other != "parameters"]:
                raise ConfigError(
                    f"parameters.{name}: {', '.join(map(str, others))} beside parameters (in {file}): "
                    "a parameter with parameters below it has nothing else."
                )
            inner = parse_parameters(entry["parameters"], file, f"{name}.")
        else:
            inner = {name: _parse_one(name, entry, file)}
        if twice := [inner_name for inner_name in inner if inner_name in space]:
            raise ConfigError(f"parameters.{twice[0]} (in {file}) is given twice, once with dots and once nested.")
        space |= inner
    return space


def grid_values(distribution: BaseDistribution) -> Sequence[Any] | None:
    """All values of a distribution that has finitely many, in order, however many; None of one that has not.

    >>> list(grid_values(IntDistribution(2, 8, step=3)))
    [2, 5, 8]
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return _Steps(distribution.low, distribution.high, distribution.step)
    return None


class _Steps(Sequence[float]):
    """What `range` is of whole numbers; both bounds are in it, and rounding leads past neither."""

    def __init__(self, low: float, high: float, step: float) -> None:
        self._low, self._high, self._step = low, high, step

    def __len__(self) -> int:
        return round((self._high - self._low) / self._step) + 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return min(self._high, self._low + index * self._step)


def extreme_values(distribution: BaseDistribution) -> list[Any]:
    """Values that show whether a setting accepts the distribution: all choices, or both bounds."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return [distribution.low, distribution.high]


def _parse_one(name: str, entry: Any, file: str) -> BaseDistribution:
    where = f"(in {file})"
    if not isinstance(entry, dict):
        raise ConfigError(
            f"parameters.{name}: {entry!r} {where}: expected one of value, values, min and max, as in "
            f"{name}: {{value: {entry!r}}}."
        )
    kind = entry.get("distribution")
    if "probabilities" in entry:
        kind = "categorical_w_probabilities"
    if kind in UNSUPPORTED:
        word = "probabilities" if "probabilities" in entry else f"distribution: {kind}"
        raise ConfigError(
            f"parameters.{name}: {word} {where} is not supported: Optuna has no such distribution. "
            f"Supported: {', '.join(_DISTRIBUTIONS)}."
        )
    if unknown := [str(key) for key in entry if key not in _KEYS]:
        hint = " It belongs to a distribution that is not supported." if unknown[0] in _OTHER_KEYS else ""
        raise ConfigError(
            f"parameters.{name}.{unknown[0]} {where}: no such key.{did_you_mean(unknown[0], _KEYS)}{hint} "
            f"Keys of a parameter: {', '.join(_KEYS)}, parameters."
        )
    kind = _inferred(name, entry, where) if kind is None else kind
    if not isinstance(kind, str) or kind not in _DISTRIBUTIONS:
        raise ConfigError(
            f"parameters.{name}.distribution: {kind!r} {where} is not known.{did_you_mean(str(kind), _DISTRIBUTIONS)} "
            f"Supported: {', '.join(_DISTRIBUTIONS)}."
        )
    needed, may, make = _DISTRIBUTIONS[kind]
    missing = [key for key in needed if key not in entry]
    surplus = [key for key in entry if key not in (*needed, *may, "distribution")]
    if missing or surplus:
        wrong = f"lacks {', '.join(missing)}" if missing else f"does not use {', '.join(surplus)}"
        raise ConfigError(f"parameters.{name}: the distribution {kind} {wrong} {where}. It has {', '.join(needed)}.")
    return make(name, entry, where)


def _inferred(name: str, entry: Mapping[str, Any], where: str) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical"
    if "min" in entry and "max" in entry:
        return "int_uniform" if all(_is_whole(entry[key]) for key in ("min", "max")) else "uniform"
    raise ConfigError(f"parameters.{name}: {dict(entry)!r} {where}: expected value, values, or both min and max.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _choice(name: str, value: Any, where: str) -> Any:
    """A single value, as it can be handed over on a command line and kept by Optuna."""
    if value is None:
        raise ConfigError(
            f"parameters.{name}: null {where} is not supported: W&B hands it over as the text None. "
            "Leave the parameter out, or write the setting into the config."
        )
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(
            f"parameters.{name}: {value!r} {where} is not supported: values are numbers, text, true or false. "
            "Make a config for each and sweep those files apart."
        )
    return value


def _number(name: str, key: str, entry: Mapping[str, Any], where: str) -> float:
    value = entry[key]
    if _is_whole(value) and abs(value) > _MOST:
        raise ConfigError(f"parameters.{name}.{key}: {value:,} {where} is too large a whole number: at most {_MOST:,}.")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    text = ""
    if isinstance(value, str):
        try:
            text = f" YAML reads it as text: a number with an exponent needs a point and a sign, as {float(value):.1e}."
            text = text.replace("e-0", "e-").replace("e+0", "e+")
        except ValueError:
            pass
    raise ConfigError(f"parameters.{name}.{key}: {value!r} {where} is not a number.{text}")


def _bounds(name: str, entry: Mapping[str, Any], where: str) -> tuple[float, float]:
    low, high = (_number(name, key, entry, where) for key in ("min", "max"))
    if low >= high:
        raise ConfigError(f"parameters.{name}: min {low} {where} is not below max {high}.")
    return low, high


def _constant(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    return CategoricalDistribution([_choice(name, entry["value"], where)])


def _categorical(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    values = entry["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"parameters.{name}.values: {values!r} {where}: expected a list, such as [32, 64].")
    choices = [_choice(name, value, where) for value in values]
    # 1, 1.0 and true are equal, and no two parameters of a trial.
    if repeated := [choice for at, choice in enumerate(choices) if choice in choices[:at]]:
        raise ConfigError(f"parameters.{name}.values: {repeated[0]!r} {where} is there twice.")
    return CategoricalDistribution(choices)


def _int_uniform(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    low, high = _bounds(name, entry, where)
    if not (_is_whole(low) and _is_whole(high)):
        raise ConfigError(
            f"parameters.{name}: min {low} and max {high} {where} must be whole numbers for int_uniform; uniform takes "
            "any."
        )
    return IntDistribution(int(low), int(high))


def _uniform(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    return FloatDistribution(*_bounds(name, entry, where))


def _q_uniform(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    low, high = _bounds(name, entry, where)
    q = _number(name, "q", entry, where) if "q" in entry else 1
    if q <= 0:
        raise ConfigError(f"parameters.{name}.q: {q} {where} must be above 0.")
    if not max(abs(low), abs(high)) / q < _MOST:
        raise ConfigError(f"parameters.{name}.q: {q} {where} is too small to round numbers up to {high}; use uniform.")
    for key, bound in (("min", low), ("max", high)):
        if not math.isclose(bound / q, round(bound / q), rel_tol=1e-15, abs_tol=1e-9):
            raise ConfigError(
                f"parameters.{name}.{key}: {bound} {where} is not a multiple of q {q}; only such bounds are supported. "
                f"The nearest is {round(bound / q) * q:.10g}."
            )
    if all(_is_whole(number) for number in (low, high, q)):
        return IntDistribution(int(low), int(high), step=int(q))
    return FloatDistribution(low, high, step=q)


def _log_uniform(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    low, high = _bounds(name, entry, where)
    for bound in (low, high):
        if not math.log(sys.float_info.min) < bound < math.log(sys.float_info.max):
            raise ConfigError(
                f"parameters.{name}: bounds of log_uniform {where} are exponents of e, and e to the power {bound} is "
                "no number. log_uniform_values takes the values themselves."
            )
    return FloatDistribution(math.exp(low), math.exp(high), log=True)


def _log_uniform_values(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    return FloatDistribution(*_positive_bounds(name, entry, where), log=True)


def _q_log_uniform_values(name: str, entry: Mapping[str, Any], where: str) -> BaseDistribution:
    low, high = _positive_bounds(name, entry, where)
    q = _number(name, "q", entry, where) if "q" in entry else 1
    if not (q == 1 and _is_whole(low) and _is_whole(high)):
        raise ConfigError(
            f"parameters.{name}: q_log_uniform_values with min {low}, max {high}, q {q} {where} is not supported: "
            "Optuna has it for whole min and max and q: 1 only. Use log_uniform_values, or values."
        )
    return IntDistribution(int(low), int(high), log=True)


def _positive_bounds(name: str, entry: Mapping[str, Any], where: str) -> tuple[float, float]:
    low, high = _bounds(name, entry, where)
    if low <= 0:
        raise ConfigError(f"parameters.{name}.min: {low} {where} must be above 0 for a logarithmic distribution.")
    return low, high


_Make = Callable[[str, Mapping[str, Any], str], BaseDistribution]
_DISTRIBUTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], _Make]] = {
    "constant": (("value",), (), _constant),
    "categorical": (("values",), (), _categorical),
    "int_uniform": (("min", "max"), (), _int_uniform),
    "uniform": (("min", "max"), (), _uniform),
    "q_uniform": (("min", "max"), ("q",), _q_uniform),
    "log_uniform": (("min", "max"), (), _log_uniform),
    "log_uniform_values": (("min", "max"), (), _log_uniform_values),
    "q_log_uniform_values": (("min", "max"), ("q",), _q_log_uniform_values),
}
"""W&B's name → the keys it needs, those it may have, and what makes Optuna's distribution of them."""
