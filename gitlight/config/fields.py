"""What a setting is: a dataclass field with its meaning and limits."""

from dataclasses import field, fields
from typing import Any


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its documentation and limits.

    Args:
        default: the default value; a list or mapping becomes a default factory.
        help: one line: meaning and unit.
        **limits: any of ``choices`` (allowed values), ``minimum``, ``above`` (exclusive minimum), ``maximum``.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def redefined(owner: type, name: str, default: Any) -> Any:
    """A setting of ``owner``, meaning and limits as they are there, with another default."""
    (inherited,) = (one for one in fields(owner) if one.name == name)
    return field(default=default, metadata=inherited.metadata)
