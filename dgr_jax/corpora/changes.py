"""What is added to a corpus and taken out: read from files, checked against what is there.

new.jsonl   {"pid": ..., "title": ..., "text": ...} a line, or BEIR's "_id" in place of "pid"; also
            "metadata": {name: value, ...}
pids.txt    a pid a line
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from pathlib import Path

from dgr_jax.corpora import checks, lines, words
from dgr_jax.corpora.types import Passage

_EXPECTED = "'pid' (or '_id'), 'text' and perhaps 'title'"


def read_passages(path: str | os.PathLike) -> list[Passage]:
    """The passages of a file of JSON lines, plain or gzip.

    Raises ValueError naming file and line for a line that is no passage, one without any text, a
    pid that comes twice, and a file without passages.
    """
    where, passages = _file(path, "--add", "a file of JSON lines"), {}
    for line, record in lines.json_objects(where, _EXPECTED):
        name = "_id" if "_id" in record and "pid" not in record else "pid"
        pid = checks.id_field(record, name, where, line, "passage")
        title = checks.text_field(record, "title", where, line, default="")
        text = checks.text_field(record, "text", where, line, default="")
        passage = Passage(pid, text, title, checks.metadata_field(record))
        if not words.visible(passage.contents):
            expected = "a title or a text that shows something"
            raise lines.error(where, line, f"nothing in the passage {lines.shown(pid)}", expected)
        _once(passages, pid, where, line)
        passages[pid] = passage
    if not passages:
        raise ValueError(f"{where}: found no passages; expected JSON lines with {_EXPECTED}")
    return list(passages.values())


def read_pids(path: str | os.PathLike) -> list[str]:
    """The pids of a file, one a line.

    Raises ValueError naming file and line for what is no pid, a pid that comes twice, and a file
    without any.
    """
    where, pids = _file(path, "--remove", "a file of pids"), {}
    for line, text in lines.read(where):
        if text.strip():
            pid = checks.checked_id(text.strip(), where, line, "passage")
            _once(pids, pid, where, line)
            pids[pid] = line
    if not pids:
        raise ValueError(f"{where}: found no pids; expected one a line")
    return list(pids)


def check_added(passages: Iterable[Passage]) -> tuple[Passage, ...]:
    """The passages; ValueError for one without text, for a pid that comes twice or is none, and for
    what no store can hold."""
    if isinstance(passages, Passage):
        raise ValueError(f"passages: got one passage {passages.pid!r}, expected a list of them")
    by_pid: dict[str, Passage] = {}
    for place, passage in enumerate(passages, start=1):
        at = f"passages: got, as number {place},"
        if not isinstance(passage, Passage):
            raise ValueError(
                f"{at} {type(passage).__name__}, expected dgr_jax.corpora.types.Passage"
            )
        _check_types(passage, at)
        if not passage.pid or checks.UNFIT_FOR_ID.search(passage.pid):
            raise ValueError(f"{at} the pid {lines.shown(passage.pid)}, expected {checks.ID}")
        if passage.pid in by_pid:
            raise ValueError(f"{at} the pid {passage.pid!r} again, expected each once")
        if not words.visible(passage.contents):
            raise ValueError(
                f"{at} nothing in the passage {passage.pid!r}, expected a title or a text that "
                "shows something"
            )
        by_pid[passage.pid] = passage
    return tuple(by_pid.values())


def _check_types(passage: Passage, at: str) -> None:
    """Raises ValueError where a passage has something else than strings, or metadata that cannot be
    written."""
    for name in ("pid", "text", "title"):
        if not isinstance(value := getattr(passage, name), str):
            raise ValueError(f"{at} the {name} {lines.shown(value)}, expected a string")
    if left := passage.metadata.keys() - checks.scalars(passage.metadata).keys():
        name = min(left, key=str)
        raise ValueError(
            f"{at} {lines.shown(passage.metadata[name])} as {name!r} in the metadata of "
            f"{passage.pid!r}, expected a string, a finite number or a truth value"
        )


def check_pids(pids: Iterable[str]) -> tuple[str, ...]:
    """The pids; ValueError for one that comes twice, and for one string in place of a list."""
    if isinstance(pids, str):
        raise ValueError(f"pids: got one string {pids!r}, expected a list of pids")
    seen: set[str] = set()
    asked = tuple(pids)
    for pid in asked:
        if pid in seen:
            raise ValueError(f"pids: got {pid!r} twice, expected each once")
        seen.add(pid)
    return asked


def check_known(pids: Iterable[str], known: Container[str]) -> None:
    """Raises ValueError naming the pids that are not known."""
    if unknown := [pid for pid in pids if pid not in known]:
        more = f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"pids: got {', '.join(map(repr, unknown[:3]))}{more}, expected pids of passages that "
            "are there; nothing was changed"
        )


def _file(path: str | os.PathLike, flag: str, expected: str) -> Path:
    where = lines.place(path)
    if not where.exists() or where.is_dir():
        raise FileNotFoundError(f"{flag}={path}: no such file; expected {expected}")
    return where


def _once(seen: Container[str], pid: str, path: Path, line: int) -> None:
    if pid in seen:
        raise lines.error(path, line, f"the pid {lines.shown(pid)} again", "each pid once")
