"""What settings are to the stages that are made from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def fingerprint(settings: Any) -> str:
    """Hash of settings as JSON."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_effect(default: Any) -> Any:
    """A field that changes speed or output, but not results: it makes no stage run again."""
    return field(default=default, metadata={"fingerprint": False})


def unless_default(default: Any) -> Any:
    """A field that came later than finished stages: they stay so where it has its default."""
    return field(default=default, metadata={"fingerprint": "unless default"})


def describe(value: Any) -> Any:
    """A setting as JSON: what it is and every field that has an effect on results.

    The folder that a collection lies in is left out, so that data may be moved. A setting that came
    later (metadata "unless default", or a function of the settings) is left out where all is as it
    was without it, so that older stages stay.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: describe(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.name != "folder" and _has_effect(f, value)
        }
        return {"is": type(value).__qualname__, **fields}
    if isinstance(value, functools.partial):
        return {
            "is": describe(value.func),
            "args": describe(value.args),
            **describe(value.keywords),
        }
    if callable(value):
        return value.__qualname__
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _has_effect(setting: dataclasses.Field, settings: Any) -> bool:
    """Whether one of these settings makes results other than they would be without it."""
    marked = setting.metadata.get("fingerprint", True)
    if marked == "unless default":
        return getattr(settings, setting.name) != setting.default
    return marked(settings) if callable(marked) else marked


def restored(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings of a kind, from what dataclasses.asdict and JSON have made of them."""
    hints = typing.get_type_hints(kind)

    def of(hint: Any, value: Any) -> Any:
        if isinstance(hint, type) and isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
            return restored(hint, value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: of(hints.get(name), value) for name, value in values.items()})


def from_described(kind: type[Settings], described: Any, where: str) -> Settings:
    """Settings of a kind, from what `describe` and JSON have made of them; fields that are left out
    have their defaults.

    where: whose they are, for messages. Raises ValueError for another class than those that were
    imported.
    """
    name = described.get("is") if isinstance(described, Mapping) else described
    known: dict[str, Any] = {
        c.__name__: c for c in _subclasses(kind) if dataclasses.is_dataclass(c)
    }
    if name not in known:
        raise ValueError(
            f"{where}: was made with {name!r}, expected one of {', '.join(sorted(known))}: import "
            "the module that defines it"
        )
    hints, values = typing.get_type_hints(known[name]), {}
    for setting, value in described.items():
        if isinstance(value, Mapping):
            value = from_described(hints[setting], value, where)
        if setting != "is":
            values[setting] = tuple(value) if isinstance(value, list) else value
    return known[name](**values)


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    for cls in kind.__subclasses__():
        yield from _subclasses(cls)


def folders_of(value: Any) -> set[str]:
    """Every folder that the settings name, by a field `folder`."""
    if isinstance(value, tuple):
        return set().union(*map(folders_of, value))
    if not dataclasses.is_dataclass(value):
        return set()
    inside = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    own = {inside["folder"]} if isinstance(inside.get("folder"), str) else set()
    return own.union(*map(folders_of, inside.values()))


def paths(value: Any) -> dict[str, str]:
    """Every file that the settings name: 'SentencePiece.path' -> 'spiece.model'; blank: left out.

    A file is named by a field `path` or `..._path`.
    """
    by_setting: dict[str, str] = {}
    if isinstance(value, tuple):
        for part in value:
            by_setting |= paths(part)
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            inside = getattr(value, f.name)
            if (f.name == "path" or f.name.endswith("_path")) and isinstance(inside, str):
                by_setting |= {f"{type(value).__name__}.{f.name}": inside} if inside else {}
            by_setting |= paths(inside)
    return by_setting
