"""Named components: image sources, leaked models, channels and generators."""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gitlight.errors import ConfigError


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The sentence "Did you mean X?" for the nearest valid name, or an empty string.

    >>> did_you_mean("hybird", ["mlp", "coarse", "hybrid"])
    ' Did you mean hybrid?'
    """
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]}?" if nearest else ""


@dataclass(frozen=True)
class Component:
    """What a name in a config stands for.

    Attributes:
        target: the class or function itself, or where it is, as ``"package.module:name"``. A string is imported
            only when the component is used, so that listing the names (``--help``, error messages) stays fast.
        settings: the dataclass of the component's own settings, each with its default.
    """

    target: Any
    settings: type

    def load(self) -> Any:
        """The component's class or function."""
        if not isinstance(self.target, str):
            return self.target
        module_name, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module_name), attribute)


class Registry:
    """The components of one kind, by name.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Settings:
    ...     name: str = "double"
    >>> registry = Registry("channel", "channel")
    >>> registry.register("double", lambda settings: lambda x: 2 * x, Settings)
    >>> registry["double"].load()(Settings())(21)
    42
    """

    def __init__(self, kind: str, key: str) -> None:
        """``kind`` is the word for messages; ``key`` the setting that holds the name, without ``.name``."""
        self.kind = kind
        self.key = key
        self._components: dict[str, Component] = {}

    def register(self, name: str, target: Any, settings: type) -> None:
        """Add a component.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._components:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self._components[name] = Component(target, settings)

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._components)

    def __getitem__(self, name: str) -> Component:
        if not isinstance(name, str) or name not in self._components:
            raise ConfigError(
                f"{self.key}.name: {name!r} is not a known {self.kind}."
                f"{did_you_mean(str(name), self._components)} Valid names: {', '.join(self._components)}."
            )
        return self._components[name]
