"""Nested settings, from wherever they were set, as a checked `Config`; what is wrong with them in the user's words."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gitlight.attacks import ATTACKS
from gitlight.config import Config
from gitlight.data import SOURCES
from gitlight.errors import ConfigError
from gitlight.generators import GENERATORS
from gitlight.gradients import CHANNELS
from gitlight.leaked import LEAKED_MODELS
from gitlight.registry import Registry, did_you_mean

COMPONENTS: dict[str, Registry] = {"data": SOURCES, "leaked": LEAKED_MODELS, "generator": GENERATORS, "attack": ATTACKS}
"""Sections of `Config` whose settings depend on their ``name``."""

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}

Values = dict[str, Any]


def checked_config(values: Values, sources: Mapping[str, str]) -> Config:
    """Values as a `Config`, every default filled in.

    Args:
        values: sections and settings as YAML gives them; it is left alone.
        sources: dotted key → where it was set, in words such as "on the command line", for messages.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type or not allowed.
    """
    schema = OmegaConf.structured(Config)
    for section, registry in COMPONENTS.items():
        given = values.get(section)
        name = given.get("name") if isinstance(given, dict) else None
        schema[section] = OmegaConf.structured(registry[name if name is not None else schema[section].name].settings)
    values = {**values, "channel": _channel_stages(values.get("channel", []), sources)}
    _check_keys(values, OmegaConf.to_object(schema), "", sources)
    # One key at a time, so that an error can say which; whole sections are known to be mappings by now.
    for key, value in flattened(values).items():
        _set(schema, key, value, "", sources)
    config = _settings_of(schema, "", sources)
    assert isinstance(config, Config)
    return config


def _channel_stages(given: Any, sources: Mapping[str, str]) -> list[Any]:
    """Each stage with its own defaults, checked like a section of its own."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise ConfigError(
            f"channel: {given!r} ({_source('channel', sources)}): expected a list of stages, such as "
            f"[{{name: gaussian_noise, relative_std: 0.01}}]. Valid names: {', '.join(CHANNELS.names())}."
        )
    stages = []
    for number, stage in enumerate(given):
        if not isinstance(stage, dict) or "name" not in stage:
            raise ConfigError(
                f"channel[{number}]: {stage!r} ({_source('channel', sources)}): expected a stage with its name, "
                f"such as {{name: gaussian_noise, relative_std: 0.01}}. Valid names: {', '.join(CHANNELS.names())}."
            )
        stages.append(component_settings(CHANNELS, stage, f"channel[{number}]", sources))
    return stages


def component_settings(registry: Registry, given: Values, place: str, sources: Mapping[str, str]) -> Any:
    """The settings of the component that ``given`` names, with their defaults, checked.

    Args:
        registry: the component's.
        given: ``name`` and settings.
        place: the key that holds them, for messages.
        sources: key → where it was set, in words.

    Raises:
        ConfigError: the name or a key is unknown, or a value is of the wrong type or not allowed.
    """
    schema = OmegaConf.structured(registry[given["name"]].settings)
    _check_keys(given, OmegaConf.to_object(schema), f"{place}.", sources)
    for key, value in given.items():
        _set(schema, key, value, f"{place}.", sources)
    return _settings_of(schema, f"{place}.", sources)


def _set(schema: Any, key: str, value: Any, prefix: str, sources: Mapping[str, str]) -> None:
    field = _field_of(schema, key)
    if value is False and field is not None and "off" in field.metadata.get("choices", ()):
        value = "off"  # YAML 1.1, which PyYAML reads, takes the bare word for a boolean
    try:
        OmegaConf.update(schema, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise ConfigError(_wrong_type(prefix + key, value, field, sources)) from error


def _settings_of(schema: Any, prefix: str, sources: Mapping[str, str]) -> Any:
    """A filled-in schema as its dataclass, limits checked."""
    try:
        settings = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{str(error).splitlines()[0]} (an interpolation in the config)") from error
    _check_all_limits(settings, prefix, sources)
    return settings


def _check_keys(values: Values, schema: Any, prefix: str, sources: Mapping[str, str]) -> None:
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in values.items():
        place = prefix + str(key)
        if key not in fields:
            nearest = did_you_mean(str(key), fields) or did_you_mean(place, flattened(dataclasses.asdict(schema)))
            owner = f"{prefix}{nearest.removeprefix(' Did you mean ')}" if nearest and prefix else ""
            suggestion = f" Did you mean {owner}" if owner else nearest
            named = getattr(schema, "name", None)
            whose = f" of {prefix.rstrip('.')} ({named})" if named else f" of {prefix.rstrip('.') or 'a config'}"
            raise ConfigError(
                f"{place}: no such setting ({_source(place, sources)}).{suggestion} "
                f"Settings{whose}: {', '.join(fields)}."
            )
        inner = getattr(schema, str(key))
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{place}: {value!r} ({_source(place, sources)}): expected settings below it, such as "
                    f"{place}.{dataclasses.fields(inner)[0].name}."
                )
            _check_keys(value, inner, f"{place}.", sources)
        elif isinstance(value, dict) and not isinstance(inner, dict) and fields[str(key)].type is not Any:
            raise ConfigError(_wrong_type(place, value, fields[str(key)], sources))


def _wrong_type(key: str, value: Any, field: dataclasses.Field[Any] | None, sources: Mapping[str, str]) -> str:
    annotation = "" if field is None else getattr(field.type, "__name__", str(field.type))
    kind = next((words for name, words in _KINDS.items() if annotation.startswith(name)), annotation)
    if "None" in annotation:
        kind += " or null"
    meaning = f" It is: {field.metadata['help']}." if field is not None and "help" in field.metadata else ""
    return f"{key}: {value!r} ({_source(key, sources)}) is not {kind}.{meaning}"


def _check_all_limits(settings: Any, prefix: str, sources: Mapping[str, str]) -> None:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            _check_all_limits(value, f"{prefix}{field.name}.", sources)
        elif field.name != "channel":  # its stages are checked already
            _check_limits(f"{prefix}{field.name}", value, field, sources)


def _check_limits(key: str, value: Any, field: dataclasses.Field[Any], sources: Mapping[str, str]) -> None:
    limits = field.metadata
    if isinstance(value, list):
        for entry in value:
            _check_limits(key, entry, field, sources)
        return
    if value is None:
        return
    broken = ""
    if "choices" in limits and value not in limits["choices"]:
        nearest = did_you_mean(str(value), map(str, limits["choices"]))
        broken = f"is not allowed.{nearest} Allowed: {', '.join(map(str, limits['choices']))}"
    elif "minimum" in limits and not value >= limits["minimum"]:
        broken = f"is too small: at least {limits['minimum']}"
    elif "above" in limits and not value > limits["above"]:
        broken = f"is too small: more than {limits['above']}"
    elif "maximum" in limits and not value <= limits["maximum"]:
        broken = f"is too large: at most {limits['maximum']}"
    if broken:
        raise ConfigError(f"{key}: {value!r} ({_source(key, sources)}) {broken}. It is: {limits['help']}.")


def _field_of(schema: Any, key: str) -> dataclasses.Field[Any] | None:
    *sections, name = key.split(".")
    for section in sections:
        if not dataclasses.is_dataclass(OmegaConf.get_type(schema)):
            return None  # within a free mapping, such as leaked.arguments
        schema = schema[section]
    settings_type = OmegaConf.get_type(schema)
    fields = dataclasses.fields(settings_type) if dataclasses.is_dataclass(settings_type) else ()
    return next((field for field in fields if field.name == name), None)


def _source(key: str, sources: Mapping[str, str]) -> str:
    """Where a key was set, in words; a section by the first of its keys, an entry of a list by the list."""
    # What is below a key has replaced what was there.
    below = (place for place in sources if place.startswith(f"{key}."))
    return next((sources[place] for place in (*below, key, key.split("[")[0]) if place in sources), "in the defaults")


def flattened(values: Values, prefix: str = "") -> Values:
    """Nested settings as one level of dotted keys; an empty mapping is a value.

    >>> flattened({"data": {"name": "photos"}, "seed": 0})
    {'data.name': 'photos', 'seed': 0}
    """
    flat: Values = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
