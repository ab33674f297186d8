"""Strict JSON for frozen dataclasses: the record of a run's configuration.

Encoding writes plain values and, where a field may hold one of several classes, the registered name of its
class; decoding refuses unknown fields, missing fields and wrong types and names the path.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_dlm.interfaces import InputError

T = TypeVar("T")
CLASS_KEY = "class"
CHOICES = "choices"
"""Entry of a field's metadata: the classes that the field may hold, by registered name."""


def encode(value: Any) -> Any:
    """A dataclass, tuple, enum, path or scalar as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        name = _registered_name(type(value))
        return fields if name is None else {CLASS_KEY: name, **fields}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot encode {type(value).__name__}")


def decode(declared: type[T], data: Any, path: str = "config") -> T:
    """The dataclass that `encode` wrote, now or in an earlier version.

    A field that the record lacks takes its default, so the default of a new field must be what was done
    before there was a choice.

    Args:
        declared: the dataclass type, or a base class of the type that was encoded.
        data: parsed JSON.
        path: name of the value in error messages.

    Returns:
        An instance of `declared` or of the subclass the record names.

    Raises:
        InputError: unknown field, missing field without default, unknown class, value of the wrong type.
    """
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object, found {type(data).__name__}")
    cls, hints = declared, _hints(declared)  # type: ignore[arg-type]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = {field.name for field in fields}
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    found = set(data) - {CLASS_KEY}
    if unknown := sorted(found - known):
        raise InputError(f"{path}.{unknown[0]}: unknown field of {cls.__name__}, perhaps of a later version")
    if missing := sorted(required - found):
        raise InputError(f"{path}.{missing[0]}: missing field of {cls.__name__}")
    values = {
        field.name: _decode_value(
            _chosen(hints[field.name], data[field.name], field.metadata.get(CHOICES), f"{path}.{field.name}"),
            data[field.name],
            f"{path}.{field.name}",
        )
        for field in fields
        if field.name in found
    }
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@cache
def _hints(declared: type) -> dict[str, Any]:
    """Types of a class's fields; evaluating them takes longer than decoding a record."""
    return get_type_hints(declared)


def _registered_name(cls: type) -> str | None:
    """Name by which a record tells a class from others that its field may hold; no other class is named."""
    name = getattr(cls, "name", None)
    return name if isinstance(name, str) else None


def _chosen(declared: Any, value: Any, choices: Mapping[str, type] | None, path: str) -> Any:
    """`declared`, or of the field's choices the class that the record names."""
    name = value.get(CLASS_KEY) if isinstance(value, dict) else None
    if name is None or choices is None:
        return declared
    for registered, choice in choices.items():
        # Records of earlier versions have the names of classes in Python.
        if name in (registered, choice.__name__):
            return choice
    raise InputError(f"{path}: {name!r} is not a {declared.__name__}")


def _decode_value(declared: Any, value: Any, path: str) -> Any:
    origin = get_origin(declared)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(declared):
            return None
        (declared,) = [arg for arg in get_args(declared) if arg is not type(None)]
        return _decode_value(declared, value, path)
    if origin is Literal:
        return _expect(value in get_args(declared), value, path, f"one of {get_args(declared)}")
    if origin is tuple:
        # A field that used to hold one value.
        value = [value] if isinstance(value, str) else value
        _expect(isinstance(value, list), value, path, "a list")
        arguments = get_args(declared)
        types_of_items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        _expect(len(types_of_items) == len(value), value, path, f"{len(types_of_items)} items")
        return tuple(
            _decode_value(t, v, f"{path}[{i}]")
            for i, (t, v) in enumerate(zip(types_of_items, value, strict=True))
        )
    if dataclasses.is_dataclass(declared):
        return decode(declared, value, path)  # type: ignore[arg-type]
    return _decode_scalar(declared, value, path)


def _decode_scalar(declared: Any, value: Any, path: str) -> Any:
    if isinstance(declared, type) and issubclass(declared, Enum):
        _expect(value in [member.value for member in declared], value, path, declared.__name__)
        return declared(value)
    if declared is Path:
        return Path(_expect(isinstance(value, str), value, path, "a path"))
    if declared is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            return float(_expect(is_number, value, path, "a number"))
        except OverflowError:
            return _expect(False, value, path, "a number that a float holds")
    accepts: Callable[[Any], bool] = lambda v: type(v) is declared  # noqa: E731
    return _expect(accepts(value), value, path, declared.__name__)


def _expect(holds: bool, value: Any, path: str, what: str) -> Any:
    if not holds:
        raise InputError(f"{path}: expected {what}, found {value!r}")
    return value
