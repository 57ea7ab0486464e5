"""From a YAML file, its ``base:`` files and command-line overrides to a checked `Config`; and back to YAML."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gitlight.attacks import ATTACKS
from gitlight.config import Config
from gitlight.data import SOURCES
from gitlight.disk import writing
from gitlight.errors import ConfigError
from gitlight.generators import GENERATORS
from gitlight.gradients import CHANNELS
from gitlight.leaked import LEAKED_MODELS
from gitlight.registry import Registry, did_you_mean
from gitlight.sweep.trial import agent_run_folder

COMPONENTS: dict[str, Registry] = {"data": SOURCES, "leaked": LEAKED_MODELS, "generator": GENERATORS, "attack": ATTACKS}
"""Sections of `Config` whose settings depend on their ``name``."""

_COMMAND_LINE = "the command line"
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}

Values = dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides, check everything.

    Args:
        path: a YAML file, or a run's folder (its ``config.yaml``). A file may name another as its ``base:``, relative
            to itself, whose settings it overrides.
        overrides: ``key.path=value``, the value in YAML.

    Returns:
        The settings with every default filled in; ``output_dir`` is set.

    Raises:
        ConfigError: a file is missing or not YAML, a key is unknown, or a value is of the wrong type or not allowed.
            The message names the key, the value, where it was set, and what is allowed.
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    path = path / "config.yaml" if folder else path
    values: Values = {}
    sources: dict[str, str] = {}
    for source, layer in [*_read_with_bases(path, ()), (_COMMAND_LINE, _parse_overrides(overrides))]:
        _merge_layer(values, layer)
        sources.update(dict.fromkeys(_dotted(layer), source))
    config = _typed(values, sources)
    for key, value, field in _leaves(config):
        _check_limits(key, value, field, sources)
    if folder and "output_dir" not in [override.partition("=")[0] for override in overrides]:
        config.output_dir = str(folder)  # where the run is now, which may have been moved
    elif config.output_dir is None:
        config.output_dir = str(agent_run_folder() or Path("runs") / path.stem)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write a config as YAML, all or nothing; `load_config` of the file gives an equal config."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        OmegaConf.save(OmegaConf.create(to_plain(config)), temporary)
        temporary.replace(path)


def to_plain(config: Config) -> Values:
    """A config as nested dicts, lists and plain values."""
    return dataclasses.asdict(config)


def dotted(config: Config) -> Values:
    """A config as one level of keys such as ``data.name``; the channel is a list under ``channel``."""
    return _dotted(to_plain(config))


def _read_with_bases(path: Path, below: tuple[Path, ...]) -> list[tuple[str, Values]]:
    """The file's settings and, before them, its base's; each with where they come from."""
    named_by = f", the base of {below[-1]}" if below else ""
    if path.resolve() in [other.resolve() for other in below]:
        raise ConfigError(f"base: {path} is its own base, through {', '.join(map(str, below))}.")
    if not path.is_file():
        siblings = [str(other) for other in sorted(path.parent.glob("*.yaml"))]
        raise ConfigError(f"{path}{named_by}: no such config file.{did_you_mean(str(path), siblings)}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}{named_by}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}{named_by}: expected settings as `key: value` lines, found {type(content).__name__}.")
    settings: Values = {str(key): value for key, value in content.items()}
    base = settings.pop("base", None)
    if base is None:
        return [(str(path), settings)]
    return [*_read_with_bases(path.parent / str(base), (*below, path)), (str(path), settings)]


def _parse_overrides(overrides: Sequence[str]) -> Values:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip() or key.startswith("-"):
            raise ConfigError(
                f"{override!r} on the command line: expected key.path=value, such as trainer.max_epochs=3."
            )
    # `attack=ig` before `attack.iterations=300` must not be lost in it.
    named = [
        f"{key}.name={value}" if key in COMPONENTS and not value.lstrip().startswith("{") else override
        for override in overrides
        for key, _, value in [override.partition("=")]
    ]
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist(named))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)} on the command line: {error}") from error
    assert isinstance(parsed, dict)
    return {str(key): value for key, value in parsed.items()}


def _merge_layer(values: Values, layer: Values) -> None:
    """Lay ``layer`` over ``values``, in place.

    A component given by a word alone, as in ``attack=ig``, is its name. Where it names another component for a section,
    settings that only the former one has are dropped, and those that the former has by default: they said nothing about
    this one.
    """
    for section, registry in COMPONENTS.items():
        if isinstance(layer.get(section), str):
            layer[section] = {"name": layer[section]}
        former, chosen = values.get(section), layer.get(section)
        if isinstance(former, dict) and isinstance(chosen, dict) and chosen.get("name") in registry.names():
            known = {field.name for field in dataclasses.fields(registry[chosen["name"]].settings)}
            kept = {key: value for key, value in former.items() if key in known}
            if chosen["name"] != former.get("name") and former.get("name") in registry.names():
                defaults = registry[former["name"]].settings()  # a saved config has them all
                kept = {key: value for key, value in kept.items() if value != getattr(defaults, key)}
            values[section] = kept
    _merge(values, layer)


def _merge(values: Values, layer: Values) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _typed(values: Values, sources: Mapping[str, str]) -> Config:
    """Values as a `Config`, keys and types checked."""
    schema = OmegaConf.structured(Config)
    for section, registry in COMPONENTS.items():
        given = values.get(section)
        name = given.get("name") if isinstance(given, dict) else None
        schema[section] = OmegaConf.structured(registry[name if name is not None else schema[section].name].settings)
    values["channel"] = _channel_stages(values.get("channel", []), sources)
    _check_keys(values, OmegaConf.to_object(schema), "", sources)
    for key, value in _dotted(values).items():
        if value is False and "off" in getattr(_field_of(schema, key), "metadata", {}).get("choices", ()):
            value = "off"  # YAML 1.1, which PyYAML reads, takes the bare word for a boolean
        try:
            # One key at a time, so that an error can say which; whole sections are known to be mappings by now.
            OmegaConf.update(schema, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(_wrong_type(key, value, _field_of(schema, key), sources)) from error
    try:
        config = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{str(error).splitlines()[0]} (an interpolation in the config)") from error
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
        sources: key → where it was set.

    Raises:
        ConfigError: the name or a key is unknown, or a value is of the wrong type or not allowed.
    """
    schema = OmegaConf.structured(registry[given["name"]].settings)
    _check_keys(given, OmegaConf.to_object(schema), f"{place}.", sources)
    for key, value in given.items():
        try:
            OmegaConf.update(schema, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(_wrong_type(f"{place}.{key}", value, _field_of(schema, key), sources)) from error
    settings = OmegaConf.to_object(schema)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        _check_limits(f"{place}.{field.name}", getattr(settings, field.name), field, sources)
    return settings


def _check_keys(values: Values, schema: Any, prefix: str, sources: Mapping[str, str]) -> None:
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in values.items():
        place = prefix + str(key)
        if key not in fields:
            nearest = did_you_mean(str(key), fields) or did_you_mean(place, _dotted(dataclasses.asdict(schema)))
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


def _wrong_type(key: str, value: Any, field: dataclasses.Field[Any] | None, sources: Mapping[str, str]) -> str:
    annotation = "" if field is None else getattr(field.type, "__name__", str(field.type))
    kind = next((words for name, words in _KINDS.items() if annotation.startswith(name)), annotation)
    if "None" in annotation:
        kind += " or null"
    meaning = f" It is: {field.metadata['help']}." if field is not None and "help" in field.metadata else ""
    return f"{key}: {value!r} ({_source(key, sources)}) is not {kind}.{meaning}"


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


def _leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        elif field.name != "channel":
            yield f"{prefix}{field.name}", value, field


def _field_of(schema: Any, key: str) -> dataclasses.Field[Any] | None:
    *sections, name = key.split(".")
    for section in sections:
        if not dataclasses.is_dataclass(OmegaConf.get_type(schema)):
            return None  # within a free mapping, such as leaked.arguments
        schema = schema[section]
    settings_type = OmegaConf.get_type(schema)
    fields = dataclasses.fields(settings_type) if dataclasses.is_dataclass(settings_type) else ()
    return next((field for field in fields if field.name == name), None)


def _dotted(values: Values, prefix: str = "") -> Values:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: Values = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _source(key: str, sources: Mapping[str, str]) -> str:
    """Where a key was set, in words."""
    outer = key.split("[")[0]
    known = next((sources[place] for place in (key, outer) if place in sources), None)
    if known is None:
        known = next((source for place, source in sources.items() if place.startswith(f"{key}.")), "the defaults")
    return f"in {known}" if known != _COMMAND_LINE else "on the command line"
