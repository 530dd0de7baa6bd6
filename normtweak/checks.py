"""Checks that every configuration shares: a value in its place, and frozen dataclasses from plain data."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any


def require(condition: bool, where: str, argument: str, wanted: str, got: object) -> None:
    """Raise the house's ValueError, `where: argument must be wanted, got got`, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{where}: {argument} must be {wanted}, got {got}")


def one_of(where: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise the house's ValueError unless `value` is among `choices`."""
    require(value in choices, where, argument, "one of " + ", ".join(map(str, choices)), value)


def check_ids(where: str, largest: int, vocabulary: int) -> None:
    """Raise the house's ValueError for a tokenizer with ids that the model has no embedding for: another model's, say."""
    require(largest < vocabulary, where, "the tokenizer", f"the model's own, with ids below {vocabulary}", f"id {largest}")


def check_pattern(where: str, argument: str, pattern: str) -> None:
    """Raise the house's ValueError for a pattern that is no regular expression, or an empty one, which is found everywhere."""
    require(bool(pattern), where, argument, "a regular expression", "an empty one")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {argument} must be a regular expression, got {pattern!r} ({error})") from None


def from_dict(cls: Any, settings: Any) -> Any:
    """A frozen dataclass from plain data, nested tables for its nested dataclasses. Raises ValueError for an unknown key or a value of the wrong type."""
    where = cls.__name__
    require(isinstance(settings, dict), where, "settings", "a table of names and values", settings)
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        require(key in types, where, "key", "one of " + ", ".join(types), key)
        values[key] = _typed(where, key, types[key], value)
    return cls(**values)


def _typed(where: str, key: str, wanted: Any, value: Any) -> Any:
    if typing.get_origin(wanted) is tuple:
        require(isinstance(value, list | tuple), where, key, "a list", repr(value))
        return tuple(_typed(where, key, typing.get_args(wanted)[0], item) for item in value)
    options: tuple[Any, ...] = typing.get_args(wanted) or (wanted,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return value if type(value) is option else from_dict(option, value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, option) and (option is not int or not isinstance(value, bool)):
            return value
    names = " or ".join(option.__name__ for option in options)
    raise ValueError(f"{where}: {key} must be {names}, got {value!r}")
