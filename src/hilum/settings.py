"""Frozen dataclasses ↔ JSON and TOML, overrides as `a.b=c`, and complaints a reader can act on.

Every mistake in a file or on the command line is reported at once, with the known names beside it.
"""

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from hilum.errors import UsageError

T = TypeVar("T")


def to_dict(settings: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain


def hash_json(record: Any) -> str:
    """16 hex digits that name a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def from_dict(cls: type[T], values: dict[str, Any], where: str = "settings") -> T:
    """Build a dataclass from plain values; absent keys take their defaults.

    Raises UsageError that lists every unknown key and every value of a wrong type.
    """
    complaints: list[str] = []
    built = _build(cls, values, "", complaints)
    if complaints:
        raise UsageError(f"{where}: " + "; ".join(complaints))
    return typing.cast(T, built)


def override(settings: T, assignments: Iterable[str]) -> T:
    """Apply `a.b=c` assignments; values are read as TOML (numbers, booleans, lists) or else as text."""
    values = to_dict(settings)
    complaints: list[str] = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        *parents, leaf = name.strip().split(".")
        node: Any = values
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not equals or not isinstance(node, dict) or leaf not in node:
            what = "is no setting" if equals else "lacks '=' and a value"
            complaints.append(f"'{assignment}' {what}{_known(values, parents)}; expected a.b=value")
            continue
        node[leaf] = _parse(text.strip())
    built = _build(type(settings), values, "", complaints)
    if complaints:
        raise UsageError("; ".join(complaints))
    return typing.cast(T, built)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {error}") from None


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, table by table; unknown names are kept for `from_dict` to complain about."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two nested records differ, as `a.b: 1 ≠ 2`."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left} ≠ {right}")
    return found


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _known(values: Any, parents: list[str]) -> str:
    for parent in parents:
        if not isinstance(values, dict) or parent not in values:
            break
        values = values[parent]
    return f" (known here: {', '.join(values)})" if isinstance(values, dict) else ""


def _spell(hint: Any) -> str:
    """A type as a reader knows it: [number, number], [[whole number, …], …]."""
    if typing.get_origin(hint) is tuple:
        return "[" + ", ".join("…" if h is Ellipsis else _spell(h) for h in typing.get_args(hint)) + "]"
    return {float: "number", int: "whole number", str: "text", bool: "true or false"}.get(hint, str(hint))


def _build(cls: Any, values: Any, prefix: str, complaints: list[str]) -> Any:
    if not isinstance(values, dict):
        complaints.append(f"{prefix.rstrip('.') or 'settings'}: expected a table of settings, found {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    for name in sorted(values.keys() - fields):
        complaints.append(f"unknown setting {prefix}{name} (known: {', '.join(sorted(fields))})")
    built = {n: _convert(hints[n], v, f"{prefix}{n}", complaints) for n, v in values.items() if n in fields}
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    complaints += [f"{prefix}{name} is missing" for name in needed if name not in values]
    if complaints:  # from here or from before: nothing will be used
        return None
    try:
        return cls(**built)
    except (TypeError, ValueError) as error:  # a check in __post_init__
        complaints.append(f"{prefix.rstrip('.') or 'settings'}: {error}")
        return None


def _convert(hint: Any, value: Any, name: str, complaints: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.", complaints)
    if origin is Literal:
        ok, wanted = value in arguments, " | ".join(map(str, arguments))
    elif origin is types.UnionType:
        for option in arguments:
            trial: list[str] = []
            converted = None if option is type(None) and value is None else _convert(option, value, name, trial)
            if not trial and (converted is not None or value is None):
                return converted
        ok, wanted = False, str(hint)
    elif origin is tuple:
        ok = isinstance(value, list | tuple)
        wanted = f"a list like {_spell(hint)}"
        if ok:
            variadic = len(arguments) == 2 and arguments[1] is Ellipsis
            inner = [arguments[0]] * len(value) if variadic else list(arguments)
            ok = len(inner) == len(value)
            if ok:
                return tuple(_convert(h, v, name, complaints) for h, v in zip(inner, value))
    elif hint is float:
        ok, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        value = float(value) if ok else value
    elif hint is int:
        ok, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif hint is type(None):
        ok, wanted = value is None, "nothing"
    else:
        ok, wanted = isinstance(value, hint), hint.__name__
    if not ok:
        complaints.append(f"{name}: expected {wanted}, found {value!r}")
    return value
