"""Passages, queries and judgements from Python: dictionaries or data frames, as a BEIR folder."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dgr_jax.corpora.beir import write_beir
from dgr_jax.corpora.checks import SURROGATE
from dgr_jax.corpora.types import Passage, Qrel, Query

# The names that a field has elsewhere; the first is ours.
PID = ("pid", "_id", "id", "docno", "doc_id", "corpus-id")
QID = ("qid", "_id", "id", "query_id", "query-id")
TEXT = ("text", "contents", "body")
QUERY = ("text", "query")
GRADE = ("relevance", "label", "score")

Records = Iterable[Mapping[str, Any]]  # or a data frame


def are_records(value: Any) -> bool:
    """Whether it is a data frame, or an iterable of other things than characters."""
    if isinstance(value, (str, bytes, os.PathLike, Mapping)):
        return False
    return _is_frame(value) or isinstance(value, Iterable)


def passages(records: Any) -> Iterator[Passage]:
    """Of records with pid, text and, where there is one, title. Raises ValueError that numbers a
    record without these."""
    for place, record in _rows(records, "passage"):
        title = _text(record, ("title",), place, default="")
        yield Passage(_text(record, PID, place), _text(record, TEXT, place), title)


def queries(records: Any) -> Iterator[Query]:
    """Of records with qid and text and, where they are known, answers."""
    for place, record in _rows(records, "query"):
        answers = record.get("answers")
        answers = tuple(map(str, answers)) if isinstance(answers, Sequence) else ()
        yield Query(_text(record, QID, place), _text(record, QUERY, place), answers)


def qrels(records: Any) -> Iterator[Qrel]:
    """Of records with qid, pid and, where they are graded, relevance; otherwise it is 1."""
    for place, record in _rows(records, "judgement"):
        graded = any(name in record for name in GRADE)
        grade = _field(record, GRADE, place, default=_NONE if graded else 1)
        if isinstance(grade, bool) or not isinstance(grade, Real) or not float(grade).is_integer():
            raise ValueError(f"{place}: got relevance {grade!r}, expected a whole number")
        qid = _text(record, ("qid", "query_id", "query-id"), place)
        pid = _text(record, ("pid", "docno", "doc_id", "corpus-id"), place)
        yield Qrel(qid, pid, int(float(grade)))


def write(folder: Path, collection: Any, asked: Any, judged: Mapping[str, Any]) -> None:
    """Writes records of passages and queries, and of the judgements of each split, as a BEIR
    folder, whole or not at all. What is there already, and is the same, stays as it is.

    Raises ValueError for a record that lacks a field.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        splits = {split: qrels(records) for split, records in judged.items()}
        write_beir(partial, passages(collection), queries(asked), splits)
        if not _same(partial, folder):
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _same(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files."""
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (left, right)
    ]
    return names[0] == names[1] and all(
        filecmp.cmp(left / name, right / name, shallow=False) for name in names[0]
    )


def _is_frame(value: Any) -> bool:
    return hasattr(value, "columns") and hasattr(value, "itertuples")


def _rows(records: Any, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What each record is called in messages, and the record."""
    if _is_frame(records):
        names = [str(name) for name in records.columns]
        rows = records.itertuples(index=False, name=None)
        records = (dict(zip(names, row, strict=True)) for row in rows)
    for count, record in enumerate(records, start=1):
        place = f"{kind} {count:,}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{place}: got {record!r:.80}, expected a dictionary")
        yield place, record


def _is_there(value: Any) -> bool:
    """Whether a field holds anything: None, NaN and the NA of frames are nothing."""
    try:
        return value is not None and bool(value == value)
    except (TypeError, ValueError):
        return False


_NONE = object()


def _field(record: Mapping[str, Any], names: Sequence[str], place: str, default: Any) -> Any:
    """The first of some fields that holds anything."""
    for name in names:
        value = record.get(name)
        if _is_there(value):
            return value
    if default is not _NONE:
        return default
    more = f" (or {', '.join(names[1:])})" if names[1:] else ""
    raise ValueError(
        f"{place}: got the fields {', '.join(map(str, record)) or 'none'}, expected {names[0]!r}"
        f"{more} with a value"
    )


def _text(record: Mapping[str, Any], names: Sequence[str], place: str, default: Any = _NONE) -> str:
    value = _field(record, names, place, default)
    if isinstance(value, str):
        if SURROGATE.search(value):
            raise ValueError(
                f"{place}: got {value!r:.80} as {names[0]!r}, expected text that UTF-8 can hold"
            )
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    raise ValueError(f"{place}: got {value!r:.80} as {names[0]!r}, expected a string")
