"""Trees of mappings and scalars, as YAML and JSON give them, to dataclasses: strictly, by the declared types.

In: a dataclass and a tree. Out: the object, or one line that names the dotted path, the value, and the nearest right
name. The reader's own guesses (`1e-4` a string, `no` a bool) do not get through.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

from protformer.errors import ConfigError

Config = TypeVar("Config")


def decode(kind: type[Config], tree: object, path: str = "") -> Config:
    """Build the dataclass `kind` from a tree of mappings and scalars; what does not fit its declaration is refused."""
    return typing.cast(Config, _decode_value(kind, tree, path))


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The values of nested mappings by their dotted paths."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def suggest(name: str, known: Iterable[str]) -> str:
    """What to add to a message about a name that is not known: the nearest that is, if any is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _decode_value(kind: Any, value: object, path: str) -> object:
    if is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, path)
    origin = typing.get_origin(kind)
    if origin is Literal:
        # YAML reads the bare words no, off, yes and on as booleans; no choice here is one of them.
        choices = typing.get_args(kind)
        if value in choices and not isinstance(value, bool):
            return value
        raise ConfigError(
            f"{path}: {value!r} is not one of {', '.join(map(str, choices))}" + suggest(str(value), map(str, choices))
        )
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: {value!r} is not a list")
        member = typing.get_args(kind)[0]
        return origin(_decode_value(member, item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        return _decode_union(typing.get_args(kind), value, path)
    return _decode_scalar(kind, value, path)


def _decode_union(members: tuple[Any, ...], value: object, path: str) -> object:
    if type(None) in members:
        if value is None:
            return None
        (member,) = (m for m in members if m is not type(None))
        return _decode_value(member, value, path)
    literals = [m for m in members if typing.get_origin(m) is Literal]
    if literals:
        (literal,), (scalar,) = literals, (m for m in members if m not in literals)
        if isinstance(value, str) and value in typing.get_args(literal):
            return value
        return _decode_scalar(scalar, value, path, or_else=typing.get_args(literal))
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {value!r} is not a group of fields such as {{kind: {_tag(members[0])}}}")
    tags = {_tag(member): member for member in members}
    tag = value.get("kind", _tag(members[0]))
    if tag not in tags:
        raise ConfigError(f"{path}.kind: {tag!r} is not one of {', '.join(tags)}" + suggest(str(tag), tags))
    return _decode_dataclass(tags[tag], value, path)


def _decode_dataclass(kind: type, value: object, path: str) -> object:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path or 'the configuration'}: {value!r} is not a group of fields")
    declared = {f.name: f for f in fields(kind)}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, item in value.items():
        dotted = f"{path}.{name}" if path else str(name)
        if name not in declared:
            raise ConfigError(
                f"{dotted}: no such field ({_as_typed(dotted, item)})"
                + (suggest(str(name), declared) or f"; fields: {', '.join(declared)}")
            )
        arguments[name] = _decode_value(hints[name], item, dotted)
    try:
        return kind(**arguments)
    except TypeError as error:
        missing = [n for n, f in declared.items() if n not in arguments and _has_no_default(f)]
        raise ConfigError(f"{path or 'the configuration'}: missing {', '.join(missing)}") from error


def _as_typed(path: str, value: object) -> str:
    """A value, or of a group of fields the first one, as the user will know it again."""
    if isinstance(value, Mapping) and value:
        name, item = next(iter(value.items()))
        return _as_typed(f"{path}.{name}", item) if isinstance(item, Mapping) else f"{path}.{name}={item}"
    return f"value {value!r}"


def _decode_scalar(kind: Any, value: object, path: str, *, or_else: tuple[str, ...] = ()) -> object:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        # PyYAML takes 1e-4 (no dot) for a string.
        try:
            number = float(typing.cast(Any, value))
        except (TypeError, ValueError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
    if kind is str and isinstance(value, str):
        return value
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ConfigError(f"{path}: {value!r} is not {' or '.join([*or_else, words.get(kind, str(kind))])}")


def _has_no_default(declared: Any) -> bool:
    return declared.default is MISSING and declared.default_factory is MISSING


def _tag(member: Any) -> str:
    return str(typing.get_args(typing.get_type_hints(member)["kind"])[0])
