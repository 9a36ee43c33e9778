"""From what a YAML file says to the dataclasses it means: unknown keys and wrong types are errors that say where."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from rc_agents.errors import ConfigError, nearest


def build(cls: Any, data: Any, where: str) -> Any:
    """Returns an object of a dataclass from plain data.

    Args:
        cls: the dataclass; its fields' types say what is nested.
        data: a mapping with some of its fields.
        where: what to call it in an error, such as `packaged.yaml: settings.medical`.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping of {cls.__name__}'s fields, got {data!r}")
    known = {one.name: one for one in fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), list(known))}")
    needed = [
        name
        for name, one in known.items()
        if one.default is MISSING and one.default_factory is MISSING and name not in data
    ]
    if needed:
        raise ConfigError(f"{where}: {needed[0]!r} is missing")
    hints = typing.get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return build(hint, value, where)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _any_of(inner, value, where)
    if origin is typing.Literal:
        if value not in inner:
            raise ConfigError(f"{where}: one of {', '.join(map(str, inner))}, not {value!r}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        each = inner[:1] * len(value) if inner[-1:] == (Ellipsis,) else inner
        if len(each) != len(value):
            raise ConfigError(f"{where}: expected {len(each)} values, got {value!r}")
        pairs = zip(each, value, strict=True)
        return tuple(_value(kind, one, f"{where}[{n}]") for n, (kind, one) in enumerate(pairs))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {
            str(key): _value(inner[1], one, f"{where}.{key}") if inner else one
            for key, one in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{where}: expected {_name(hint)}, got {value!r}")
    return value


def _any_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _value(kinds[0], value, where)
    for kind in kinds:
        try:
            return _value(kind, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where}: expected {' or '.join(map(_name, kinds))}, got {value!r}")


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is not None:
        return str(hint).replace("collections.abc.", "").replace("typing.", "")
    return getattr(hint, "__name__", str(hint))
