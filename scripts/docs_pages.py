"""Pages of the site that are not written in docs/: a hook of MkDocs, see mkdocs.yml.

The reference is made of the code (commands, gin components, modules), so it is never behind it; the
first page is the README.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from dgr_jax.config import configurables

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "dgr_jax").glob("*.py")
    if "cli.main(command)" in path.read_text(encoding="utf-8")
)
COPIED = {  # files at the top of the repository -> their place on the site
    "README.md": "index.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
# Rooms of the package, in the order of a reader, and what gin components of them are about.
ROOMS = {
    "experiments": "Experiments and their stages",
    "corpora": "Collections",
    "data": "Vocabulary and examples",
    "identifiers": "Identifiers",
    "models": "Models and where they start",
    "training": "Objectives and optimizers",
    "losses": "Losses",
    "teaching": "Teachers and rank lists",
    "retrieval": "Search, plans and baselines",
    "decoding": "Scores of passages",
    "partitioning": "Devices",
}
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


def commands() -> str:
    """The flags of every command."""
    parts = [
        "# Commands\n",
        "Every command takes `--gin.NAME=VALUE` too, any number of times.",
    ]
    for name in COMMANDS:
        parser = _parser(name)
        parts.append(f"## `python -m dgr_jax.{name}`\n\n{escaped(parser.description or '')}\n")
        rows = [
            (f"`{' '.join([action.option_strings[-1], *_values(action)])}`", action.help or "")
            for action in parser._actions
        ]
        parts.append(_table(("flag", ""), rows))
    return "\n".join(parts) + "\n"


class _Stop(Exception):
    """A command has made its parser."""


def _parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command, which is stopped where it would read its flags."""
    parsers: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise _Stop

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        with contextlib.suppress(_Stop):
            importlib.import_module(f"dgr_jax.{name}").command([])
    return parsers[0]


def _values(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    value = str(action.metavar or action.dest.upper())
    return [f"[{value}]" if action.nargs == "?" else value]


def components() -> str:
    """All that gin files can name: every component and loss, its settings and their defaults."""
    classes = {c.__name__: c for c in configurables._components()}
    by_room: dict[str, list[str]] = {room: [] for room in ROOMS}  # then others, by their names
    for name in configurables.configurables():
        room = classes[name].__module__.split(".")[1] if name in classes else "losses"
        by_room.setdefault(room, []).append(name)
    parts = [
        "# gin components\n",
        "What gin files can name, `@NAME()`, and what can be set of it: `NAME.setting = value` in "
        "a file, `--gin.NAME.setting=value` on a command line. Settings without a default must be "
        "given. Gin files bind many of these to macros (`SEED`, `LOSS`, `NUM_BEAMS`).\n",
    ]
    for room, names in by_room.items():
        parts.append(f"## {ROOMS.get(room, room.capitalize())}\n")
        for name in sorted(names, key=str.lower):
            parts.append(_component(name, classes.get(name)))
    return "\n".join(parts) + "\n"


def _component(name: str, kind: type | None) -> str:
    make = configurables.configurables()[name]
    settings = inspect.signature(make).parameters
    prose, meanings = described(inspect.cleandoc(make.__doc__ or ""), settings)
    for base in kind.__mro__[1:] if kind else ():
        if dataclasses.is_dataclass(base):
            meanings = described(inspect.cleandoc(base.__doc__ or ""), settings)[1] | meanings
    factories = {
        f.name: f.default_factory
        for f in (dataclasses.fields(kind) if kind else ())
        if f.default_factory is not dataclasses.MISSING
    }
    rows = []
    for setting, parameter in settings.items():
        usual = factories[setting]() if setting in factories else parameter.default
        takes = f"`{_written(parameter.annotation)}`"
        rows.append((f"`{setting}`", takes, _default(usual), meanings.get(setting, "")))
    place = kind.__module__ if kind else "dgr_jax.losses"
    table = _table(("setting", "takes", "default", ""), rows) if rows else "It has no settings.\n"
    return f"### `@{name}()`\n\n`{place}`\n\n{prose}\n\n{table}"


def described(doc: str, names: Any) -> tuple[str, dict[str, str]]:
    """(prose, {name: what it is}) of a docstring whose lines "name: ..." or "a, b: ..." are about
    `names`, or within a line "...; name: ..."; they go on to the next one, or a blank line."""
    inner = re.compile(rf"; (?=(?:{'|'.join(map(re.escape, names))}): )") if names else None
    doc = inner.sub("\n", doc) if inner else doc
    prose: list[str] = []
    meanings: dict[str, str] = {}
    current: list[str] = []
    for line in doc.splitlines():
        entry = _ENTRY.fullmatch(line.strip())
        if entry and set(entry[1].split(", ")) <= set(names):
            current = entry[1].split(", ")
            meanings |= dict.fromkeys(current, entry[2])
        elif current and line.strip():
            for name in current:
                meanings[name] += f" {line.strip()}"
        else:
            current = []
            prose.append(line)
    text = "\n".join(escaped(line) for line in prose if line.strip() not in ("Args:", "Settings:"))
    return text.strip(), meanings


def escaped(text: str) -> str:
    """Text of a docstring as Markdown: what stands in backticks stays, the rest is no markup."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*|\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if isinstance(value, functools.partial):
        value = value.func
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"`@{type(value).__name__}()`"
    if callable(value):
        return f"`@{value.__name__}()`"
    return f"`{value!r}`"


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header)]
    lines += [(*row[:-1], escaped(row[-1])) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def modules() -> str:
    """A heading for every module that others may import, which mkdocstrings fills."""
    parts = ["# Modules\n", "What stands in the code of each module, by rooms.\n"]
    for room, files in _rooms():
        parts.append(f"## {room}\n")
        for file in files:
            name = ".".join(("dgr_jax", *file.relative_to(ROOT / "dgr_jax").with_suffix("").parts))
            parts.append(f"::: {name}\n")
    return "\n".join(parts) + "\n"


def _rooms() -> Iterator[tuple[str, list[Path]]]:
    """(room, its modules that have a docstring), the commands left out."""
    package = ROOT / "dgr_jax"
    rooms: dict[str, list[Path]] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).parts
        if file.name.startswith("__") or parts[0].removesuffix(".py") in COMMANDS:
            continue
        if ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))):
            rooms.setdefault(parts[0] if len(parts) > 1 else "the top", []).append(file)
    yield from rooms.items()


def pages() -> dict[str, str]:
    """Path -> text of the pages of the site that do not lie in docs/."""
    made = {"commands": commands(), "gin": components(), "modules": modules()}
    copied = {path: (ROOT / file).read_text(encoding="utf-8") for file, path in COPIED.items()}
    return copied | {f"reference/{name}.md": text for name, text in made.items()}


def site_links(text: str, path: str) -> str:
    """Text of a page with links that hold on the site, not in the repository."""
    up = "../" * path.count("/")
    for file, place in COPIED.items():
        text = re.sub(rf"\]\((\.\./)*{re.escape(file)}(?=[#)])", f"]({up}{place}", text)
    return text.replace("](docs/", "](") if path in COPIED.values() else text


# What MkDocs calls: before it looks for pages, and for the text of each.


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return site_links(markdown, page.file.src_uri)
