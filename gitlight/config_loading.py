"""From a YAML file, its ``base:`` files and command-line overrides to a `Config`; and back to YAML."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gitlight.config import Config
from gitlight.config_validation import COMPONENTS, Values, checked_config, flattened
from gitlight.disk import writing
from gitlight.errors import ConfigError
from gitlight.registry import did_you_mean
from gitlight.sweep.trial import agent_run_folder


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
    for source, layer in [*_read_with_bases(path, ()), ("on the command line", _parse_overrides(overrides))]:
        _merge_layer(values, layer)
        sources.update(dict.fromkeys(flattened(layer), source))
    config = checked_config(values, sources)
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
    return flattened(to_plain(config))


def _read_with_bases(path: Path, below: tuple[Path, ...]) -> list[tuple[str, Values]]:
    """The file's settings and, before them, its base's; each with where they come from, in words."""
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
        return [(f"in {path}", settings)]
    return [*_read_with_bases(path.parent / str(base), (*below, path)), (f"in {path}", settings)]


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
