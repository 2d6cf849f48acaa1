"""Training files of other tools for retrievers, read and written: JSON lines, each a query with
positive and negative passages and, where there are any, a teacher's scores; also .gz.

tevatron                query_id, query, and positive_passages and negative_passages, lists of
                        {docid, title, text, score}
sentence-transformers   query (or anchor), positive, negative or negative_1, negative_2 and so on,
                        and scores (or label) of the positive and the negatives in this order
flag                    query, pos and neg, lists of texts, with pos_scores and neg_scores, or with
                        teacher_scores of both; perhaps pos_id and neg_id (FlagEmbedding)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dgr_jax.corpora import checks, lines
from dgr_jax.corpora.types import Passage, Query

_QUERY_FIELDS = ("query", "anchor", "question")
_SCORE_FIELDS = ("scores", "score", "labels", "label")
_KINDS = "positive_passages (Tevatron), positive (sentence-transformers) or pos (FlagEmbedding)"
_FIELDS = f"a query and {_KINDS}"
_NEGATIVE = re.compile(r"negative_(\d{1,6})")


@dataclass(frozen=True, slots=True)
class Listed:
    """A passage of a query; its score is None where there is none."""

    passage: Passage
    positive: bool
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A query and its passages, in the order of the file; line: where they begin there."""

    query: Query
    passages: tuple[Listed, ...]
    line: int = 0

    @property
    def scored(self) -> bool:
        """Whether its passages have scores: all of them, or none."""
        return self.passages[0].score is not None


def key(text: str) -> str:
    """16 hex digits that stand for a text: its id in files that give it none."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def read(
    path: str | os.PathLike,
    pids: Mapping[str, str] | None = None,
    qids: Mapping[str, str] | None = None,
) -> Iterator[Example]:
    """Every query once, in the order of the file; lines of one query must follow each other.

    pids, qids: `key` of a text -> the id of the passage or query with this text, for those that
    have no id in the file; other texts get their key as id. Raises ValueError, naming the line, at
    a missing field, a score that is no finite number, scores for some passages of a query alone,
    a passage with two scores or as positive and negative, and a query that comes again.
    """
    path = lines.place(path)
    first: dict[str, int] = {}
    named = (_named(example, pids or {}, qids or {}) for example in _examples(path))
    for qid, group in groupby(named, key=lambda example: example.query.qid):
        rows = list(group)
        if first.setdefault(qid, rows[0].line) != rows[0].line:
            again = f"the query {lines.shown(rows[0].query.text)} again, first seen on line"
            expected = "the lines of a query one after another"
            raise lines.error(path, rows[0].line, f"{again} {first[qid]}", expected)
        yield _joined(rows, path)


def write(path: str | os.PathLike, form: str, examples: Iterable[Example]) -> int:
    """Writes a file of one of the `FORMATS` and returns the number of its lines.

    A query has one line, in "sentence-transformers" one for each positive passage; its readers want
    the same number of negatives on each line, and ValueError is raised where it differs.
    """
    rows, widths = 0, set()
    with lines.writing(path) as handle:
        for example in examples:
            for record in FORMATS[form](example):
                rows += 1
                widths.add(len(record))
                if form == "sentence-transformers" and len(widths) > 1:
                    raise ValueError(
                        f"{form}: found {len(example.passages)} passages for the query "
                        f"{example.query.qid!r}; expected as many negatives as on other lines"
                    )
                handle.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return rows


def _examples(path: Path) -> Iterator[Example]:
    """The lines of a file; ids are "" where it has none."""
    for line, record in lines.json_objects(path, _FIELDS):
        parse = next((parse for field, parse in _PARSERS.items() if field in record), None)
        if parse is None:
            fields = f"the fields {lines.shown(list(record))[1:-1] or 'none'}"
            raise lines.error(path, line, fields, _FIELDS)
        name = next((name for name in _QUERY_FIELDS if name in record), "query")
        text = checks.text_field(record, name, path, line)
        qid = ""
        if record.get("query_id") is not None:
            qid = checks.id_field(record, "query_id", path, line, "query")
        passages = tuple(parse(record, path, line))
        if not passages:
            raise lines.error(path, line, "no passages", "at least one")
        yield Example(Query(qid, text), passages, line)


def _tevatron(record: dict[str, Any], path: Path, line: int) -> Iterator[Listed]:
    for field in ("positive_passages", "negative_passages"):
        items = record.get(field) or []
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            got = f"{field!r}: {lines.shown(items)}"
            raise lines.error(path, line, got, "a list of objects {docid, title, text}")
        for item in items:
            passage = Passage(
                checks.id_field(item, "docid", path, line, "passage"),
                checks.text_field(item, "text", path, line, default=""),
                checks.text_field(item, "title", path, line, default=""),
            )
            score = None
            if item.get("score") is not None:
                score = _score(item["score"], path, line, f"of the passage {passage.pid!r}")
            yield Listed(passage, field == "positive_passages", score)


def _sentence_transformers(record: dict[str, Any], path: Path, line: int) -> list[Listed]:
    numbered = sorted((int(m[1]), m[0]) for m in map(_NEGATIVE.fullmatch, record) if m)
    positives = checks.text_list(record, "positive", path, line)
    negatives = checks.text_list(record, "negative", path, line)
    negatives += tuple(checks.text_field(record, name, path, line) for _, name in numbered)
    name = next((name for name in _SCORE_FIELDS if name in record), _SCORE_FIELDS[0])
    scores = _scores(record, name, len(positives) + len(negatives), path, line)
    return _of_texts(positives, negatives, scores)


def _flag(record: dict[str, Any], path: Path, line: int) -> list[Listed]:
    positives = checks.text_list(record, "pos", path, line)
    negatives = checks.text_list(record, "neg", path, line)
    if record.get("teacher_scores") is not None:
        scores = _scores(record, "teacher_scores", len(positives) + len(negatives), path, line)
    else:
        scores = _scores(record, "pos_scores", len(positives), path, line)
        scores += _scores(record, "neg_scores", len(negatives), path, line)
    pids = _ids(record, ("pos_id", "pos_index"), len(positives), path, line)
    pids += _ids(record, ("neg_id", "neg_index"), len(negatives), path, line)
    return _of_texts(positives, negatives, scores, pids)


_PARSERS: dict[str, Callable[[dict[str, Any], Path, int], Iterable[Listed]]] = {
    "positive_passages": _tevatron,
    "negative_passages": _tevatron,
    "positive": _sentence_transformers,
    "pos": _flag,
}


def _of_texts(
    positives: tuple[str, ...],
    negatives: tuple[str, ...],
    scores: list[float | None],
    pids: list[str] | None = None,
) -> list[Listed]:
    texts = positives + negatives
    return [
        Listed(Passage(pid, text), place < len(positives), score)
        for place, (text, score, pid) in enumerate(
            zip(texts, scores, pids or [""] * len(texts), strict=True)
        )
    ]


def _scores(
    record: dict[str, Any], name: str, count: int, path: Path, line: int
) -> list[float | None]:
    """The numbers of a field, one for each of `count` passages; None each where it is missing."""
    values = record.get(name)
    if values is None:
        return [None] * count
    _check_list(values, name, count, path, line)
    return [_score(value, path, line, f"in {name!r}") for value in values]


def _ids(
    record: dict[str, Any], names: tuple[str, str], count: int, path: Path, line: int
) -> list[str]:
    """The ids of `count` passages; "" each where there are none."""
    name = next((name for name in names if record.get(name) is not None), "")
    if not name:
        return [""] * count
    _check_list(record[name], name, count, path, line)
    return [checks.id_field({name: v}, name, path, line, "passage") for v in record[name]]


def _check_list(values: Any, name: str, count: int, path: Path, line: int) -> None:
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, list) else lines.shown(values)
        raise lines.error(path, line, f"{name!r}: {got}", f"a list of {count}, one a passage")


def _score(value: Any, path: Path, line: int, what: str) -> float:
    """A finite float; an integer too large for one counts as infinite."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
    except OverflowError:
        pass
    raise lines.error(path, line, f"the score {lines.shown(value)} {what}", "a finite number")


def _named(example: Example, pids: Mapping[str, str], qids: Mapping[str, str]) -> Example:
    """The example with ids for all that have none."""
    query, named = example.query, []
    if not query.qid:
        query = Query(_id_of(query.text, qids), query.text)
    for listed in example.passages:
        if not listed.passage.pid:
            text = listed.passage.contents  # these files have no titles apart
            listed = Listed(Passage(_id_of(text, pids), text), listed.positive, listed.score)
        named.append(listed)
    return Example(query, tuple(named), example.line)


def _id_of(text: str, known: Mapping[str, str]) -> str:
    digits = key(text)
    return known.get(digits, digits)


def _joined(rows: list[Example], path: Path) -> Example:
    """One example of the lines of a query; a passage that comes again counts once."""
    listed: dict[str, Listed] = {}
    scored = rows[0].scored
    for row in rows:
        if row.query.text != rows[0].query.text:
            got = f"another text of the query {row.query.qid!r} than on line {rows[0].line}"
            raise lines.error(path, row.line, got, "one text a query")
        for item in row.passages:
            before = listed.setdefault(item.passage.pid, item)
            if (before.positive, before.score) != (item.positive, item.score):
                got = f"the passage {lines.shown(item.passage.pid)} of the query"
                if before.positive != item.positive:
                    got += " as positive and as negative"
                else:
                    got += f" with the scores {before.score} and {item.score}"
                raise lines.error(path, row.line, got, "each passage once, or twice the same")
            if (item.score is not None) != scored:
                got = "scores for some passages of the query, and none for others"
                raise lines.error(path, row.line, got, "a score for each, or for none")
    return Example(rows[0].query, tuple(listed.values()), rows[0].line)


def _split(example: Example) -> tuple[list[Listed], list[Listed]]:
    positives = [listed for listed in example.passages if listed.positive]
    return positives, [listed for listed in example.passages if not listed.positive]


def _tevatron_rows(example: Example) -> Iterator[dict[str, Any]]:
    def record(listed: Listed) -> dict[str, Any]:
        passage = listed.passage
        fields = {"docid": passage.pid, "title": passage.title, "text": passage.text}
        return fields | ({"score": listed.score} if example.scored else {})

    positives, negatives = _split(example)
    yield {
        "query_id": example.query.qid,
        "query": example.query.text,
        "positive_passages": [record(listed) for listed in positives],
        "negative_passages": [record(listed) for listed in negatives],
    }


def _sentence_transformers_rows(example: Example) -> Iterator[dict[str, Any]]:
    positives, negatives = _split(example)
    for positive in positives:
        row: dict[str, Any] = {"query": example.query.text, "positive": positive.passage.contents}
        for place, negative in enumerate(negatives, start=1):
            row[f"negative_{place}"] = negative.passage.contents
        if example.scored:
            row["scores"] = [listed.score for listed in (positive, *negatives)]
        yield row


def _flag_rows(example: Example) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {"query": example.query.text}
    parts = dict(zip(("pos", "neg"), _split(example), strict=True))
    row |= {name: [listed.passage.contents for listed in part] for name, part in parts.items()}
    if example.scored:
        row |= {f"{name}_scores": [item.score for item in part] for name, part in parts.items()}
    yield row


FORMATS: dict[str, Callable[[Example], Iterator[dict[str, Any]]]] = {
    "tevatron": _tevatron_rows,
    "sentence-transformers": _sentence_transformers_rows,
    "flag": _flag_rows,
}
