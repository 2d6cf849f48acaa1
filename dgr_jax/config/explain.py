"""What every macro of gin files is: its value, what it means, what it sets and may be."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dgr_jax import display
from dgr_jax.config import configurables, gin_files
from dgr_jax.config.mistakes import FLAGS

_USUAL = {"DATA_DIR": ["Where the collection lies."]}  # what shipped files need not say
_ASSIGNED = re.compile(r"(\w+)\s*=\s*[^#]*(?:#\s*(.*))?$")


@dataclass(frozen=True)
class Macro:
    """A macro of gin files.

    value: as gin writes it, '' where it must be given. meaning: the comments above it and beside
    it, those of included files first. sets: the settings that take its value. choices: what it may
    be, see `configurables.choices`.
    """

    name: str
    value: str
    meaning: str
    sets: tuple[str, ...]
    choices: tuple[str, ...]


def macros(args: argparse.Namespace, bindings: Sequence[str]) -> list[Macro]:
    """Every macro of the files that flags name, in alphabetical order. Raises Mistake as
    `gin_files.load_experiment` does, but not for what must still be given."""
    import gin

    files, paths = gin_files.files_of(args), gin_files.search_paths(args)
    gin_files.read(files, paths, bindings)
    text = gin.config_str(max_line_length=10**6)
    meanings: dict[str, dict[str, None]] = {}
    for name, comment in (pair for file in files for pair in _comments(file, paths)):
        meanings.setdefault(name, {})[comment] = None
    lines = [line.partition(" = ") for line in text.splitlines() if " = " in line]
    return [
        Macro(
            name,
            "" if value == "%gin.REQUIRED" else value,
            " ".join(meanings.get(name, _USUAL.get(name, ()))),
            sets := tuple(s for s, _, v in lines if re.search(rf"%{name}\b", v)),
            tuple(dict.fromkeys(choice for setting in sets for choice in _choices(setting))),
        )
        for name, _, value in lines
        if re.fullmatch(r"\w+", name)
    ]


def show(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Prints every macro."""
    console = display.wide_console()
    width = min(console.width, 100)
    for macro in macros(args, bindings):
        given = FLAGS.get(macro.name, f"--gin.{macro.name}")
        console.print(f"{macro.name} = {macro.value or f'(must be given: {given}=...)'}")
        said = {"": macro.meaning, "sets ": ", ".join(macro.sets)}
        said["choices: "] = ", ".join(macro.choices)
        for line in (f"{what}{text}" for what, text in said.items() if text):
            indent = " " * 4
            wrapped = textwrap.fill(
                line, width, initial_indent=indent, subsequent_indent=indent,
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
            console.print(wrapped)


def _choices(setting: str) -> tuple[str, ...]:
    component, _, key = setting.rpartition("/")[2].rpartition(".")
    return configurables.choices(component, key) if component else ()


def _comments(file: str, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(macro, what is said above it or beside it) of a file, after those of the files that it
    includes."""
    place: Any = gin_files.place_of(file, paths)
    text = place.read_text(encoding="utf-8")
    for statement in gin_files.parsed(text, file):
        if included := getattr(statement, "filename", None):
            yield from _comments(included, paths)
    above: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            above.append(line.lstrip("# "))
            continue
        if assigned := _ASSIGNED.match(line):
            name, beside = assigned.groups()
            if comment := " ".join(filter(None, [*above, beside])):
                yield name, comment
        above = []
