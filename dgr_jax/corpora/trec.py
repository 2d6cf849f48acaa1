"""TREC files: judgements (qrels), runs, and tables of scores; plain or .gz.

Order of a run as it is read and written: that of `ranking`, by score and then by pid. The rank
column decides in two cases only:
- a run that holds an order and no scores, as language models give it: where within no query the
  scores differ, or all are written as one of nan, none, null, na, -, the ranks are the order and
  -rank becomes the score;
- `ties="rank"`: passages of equal score keep the order of their ranks. This is the right choice for
  runs with rounded scores, and for a reranker's run that kept the scores of the ranker before it.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dgr_jax.corpora import checks, files, lines, ranking
from dgr_jax.corpora.types import Qrel, RankList, ScoredPassage

logger = logging.getLogger(__name__)

_SPACE = re.compile(r"[ \t]+")
_UNFIT = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\ufeff]")
_NO_SCORE = frozenset({"nan", "none", "null", "na", "-"})
_RELEVANCE_HEADERS = frozenset({"score", "relevance", "rel", "label"})
_QREL_COLUMNS = {4: "qid, an unused one, pid, relevance", 3: "qid, pid, relevance", 2: "qid, pid"}
_RUN_COLUMNS = "6 columns: qid, Q0, pid, rank, score, tag"
_SCORE_COLUMNS = "3 columns: qid, pid, score"


class _Row(NamedTuple):
    """A line of a run; its score is None where the file has none, and its rank is 0 where it comes
    from a table of scores."""

    line: int
    qid: str
    pid: str
    rank: int
    score: float | None


def qrels(path: str | os.PathLike) -> Iterator[Qrel]:
    """The judgements of a file in TREC form (qid 0 pid relevance), or without the second column
    (qid pid relevance, as in BEIR), or without the relevance too (qid pid: 1 each).

    Columns are separated by tabs or spaces; a header of the last two forms is passed over. The
    first judgement decides the number of columns. Raises ValueError at another number of columns
    and at a relevance that is no whole number.
    """
    path = lines.place(path)
    width = 0
    for line, fields in _fields(path):
        named = len(fields) > 2 and fields[-1].lower() in _RELEVANCE_HEADERS
        if line == 1 and (named or checks.is_header(fields)):
            continue
        if len(fields) not in _QREL_COLUMNS or (width and len(fields) != width):
            wanted = " or ".join(
                f"{count} columns ({names})"
                for count, names in _QREL_COLUMNS.items()
                if not width or count == width
            )
            raise lines.error(path, line, _columns(fields), wanted)
        width = len(fields)
        pid = fields[2] if width == 4 else fields[1]
        relevance = 1 if width == 2 else checks.relevance(fields[-1], path, line)
        yield Qrel(fields[0], pid, relevance)


def runs(path: str | os.PathLike, *, ties: str = "pid") -> Iterator[RankList]:
    """The rank lists of a six-column run, best first, queries in the order of the file.

    The first lines of the module say what the order is; `ties` is "pid" or "rank". One query at a
    time is held in memory, or the whole file where its queries are interleaved. Raises ValueError
    at a wrong number of columns, a rank that is no whole number, a score that is no finite number
    and a passage that comes twice for its query.
    """
    if ties not in ("pid", "rank"):
        raise ValueError(f"found ties={ties!r}; expected 'pid' or 'rank' (gin: runs.ties)")
    path = lines.place(path)
    with files.rereadable(path):
        grouped, scored = _survey(path)
        for rows in _by_query(_run_rows(path), path, grouped):
            if scored:
                yield _by_score(rows, path, ties)
            else:
                yield _by_rank(rows, path)


def scores(path: str | os.PathLike) -> Iterator[RankList]:
    """The rank lists of a table of scores (qid, pid, score; tabs or spaces), best first.

    A header that ends in "score" is passed over. Equal scores are ordered by pid. Raises the errors
    of `runs`.
    """
    path = lines.place(path)
    with files.rereadable(path):
        for rows in _by_query(_score_rows(path), path, _is_grouped(path)):
            yield _by_score(rows, path, "pid")


def write_run(
    path: str | os.PathLike, rank_lists: Iterable[RankList], tag: str, *, exact: bool = False
) -> None:
    """Writes a run, best first, ranks from 1; packed where the name ends in .gz.

    Scores are unrounded and fall strictly with the rank; ties are broken in their last digits (see
    `ranking`), unless `exact` leaves every score as it is. The file appears whole or not at all.
    Raises ValueError for white space in an id or the tag, a score that is no finite number of
    float32, a passage twice in a list and a query with two lists.
    """
    _check_column("tag", tag)
    written: set[str] = set()
    with lines.writing(path) as handle:
        for rank_list in rank_lists:
            _check_column("qid", rank_list.qid)
            if rank_list.qid in written:
                raise ValueError(
                    f"found two rank lists of the query {rank_list.qid!r}; expected one"
                )
            written.add(rank_list.qid)
            passages = _sorted(rank_list)
            scores = [passage.score for passage in passages]
            if not exact:
                scores = ranking.falling(scores)
            for rank, (passage, score) in enumerate(zip(passages, scores, strict=True), start=1):
                row = f"{rank_list.qid} Q0 {passage.pid} {rank} {score!r} {tag}\n"
                handle.write(row.encode())


def run_in_memory(lists: Iterable[RankList]) -> dict[str, list[ScoredPassage]]:
    """qid -> its passages, best first."""
    return {rank_list.qid: list(rank_list.passages) for rank_list in lists}


def rank_lists(run: dict[str, list[ScoredPassage]]) -> Iterator[RankList]:
    """The rank lists of a run in memory: the inverse of `run_in_memory`."""
    for qid, passages in run.items():
        yield RankList(qid, tuple(passages))


def qrels_in_memory(judgements: Iterable[Qrel]) -> dict[str, dict[str, int]]:
    """qid -> pid -> relevance; the last of two judgements of one pair counts."""
    judged: dict[str, dict[str, int]] = {}
    for qrel in judgements:
        judged.setdefault(qrel.qid, {})[qrel.pid] = qrel.relevance
    return judged


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, columns) of the lines that are not empty. Only tabs and ASCII spaces end a column.

    Raises ValueError at a control character, which no id can hold.
    """
    for line, text in lines.read(path):
        if not text.isprintable() and (unfit := _UNFIT.search(text)):
            raise lines.error(path, line, f"the character {unfit[0]!r}", "columns without it")
        fields = text.split() if text.isascii() else _SPACE.split(text.strip(" \t"))
        if fields and fields[0]:
            yield line, fields


def _columns(fields: list[str]) -> str:
    start = " ".join(fields)
    return f"{len(fields)} column{'s' * (len(fields) != 1)} ({start[:60]!r})"


def _run_rows(path: Path) -> Iterator[_Row]:
    for line, fields in _fields(path):
        if len(fields) != 6:
            raise lines.error(path, line, _columns(fields), _RUN_COLUMNS)
        qid, _, pid, rank, score, _ = fields
        value = _score(score)
        if value is None and score.lower() not in _NO_SCORE:
            raise lines.error(path, line, f"the score {lines.shown(score)}", "a finite number")
        yield _Row(line, qid, pid, checks.integer(rank, path, line, "rank"), value)


def _score_rows(path: Path) -> Iterator[_Row]:
    for line, fields in _fields(path):
        if len(fields) != 3:
            raise lines.error(path, line, _columns(fields), _SCORE_COLUMNS)
        qid, pid, score = fields
        if line == 1 and score.lower() == "score":
            continue
        yield _Row(line, qid, pid, 0, _score(score))


def _score(text: str) -> float | None:
    """The finite number in `text`, None where it is none; Python's "1_0" and digits beyond ASCII
    are not taken for numbers."""
    if "_" in text or not text.isascii():
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _survey(path: Path) -> tuple[bool, bool]:
    """(whether the lines of each query stand together, whether the run holds scores and not only
    an order)."""
    first: dict[str, float | None] = {}
    current, grouped, several, differ = None, True, False, False
    for _, fields in _fields(path):
        qid = fields[0]
        score = _score(fields[4]) if len(fields) == 6 and not differ else None
        if qid not in first:
            first[qid] = score
        else:
            several = True
            grouped &= qid == current
            differ = differ or score != first[qid]
        current = qid
    return grouped, differ or (not several and None not in first.values())


def _is_grouped(path: Path) -> bool:
    """Whether the lines of each query stand together."""
    seen: set[str] = set()
    for qid, _ in groupby(_fields(path), key=lambda row: row[1][0]):
        if qid in seen:
            return False
        seen.add(qid)
    return True


def _by_query(rows: Iterable[_Row], path: Path, grouped: bool) -> Iterator[list[_Row]]:
    """The rows of each query; ValueError at a passage that comes twice for its query."""
    if grouped:
        lists: Iterable[list[_Row]] = (list(group) for _, group in groupby(rows, attrgetter("qid")))
    else:
        logger.warning(
            "%s: the lines of a query do not stand together, so the whole file is held in memory; "
            "sort it by its first column to stream it",
            path,
        )
        gathered: dict[str, list[_Row]] = {}
        for row in rows:
            gathered.setdefault(row.qid, []).append(row)
        lists = gathered.values()
    for query in lists:
        first: dict[str, int] = {}
        for row in query:
            if first.setdefault(row.pid, row.line) != row.line:
                repeated = f"the passage {lines.shown(row.pid)} of the query {lines.shown(row.qid)}"
                repeated += f" again, first seen on line {first[row.pid]}"
                raise lines.error(path, row.line, repeated, "each passage once a query")
        yield query


def _by_score(rows: list[_Row], path: Path, ties: str) -> RankList:
    ranks = 1 if ties == "rank" else 0
    order = []
    for row in rows:
        if row.score is None:
            raise lines.error(
                path, row.line, f"no score for {lines.shown(row.pid)}", "a finite number"
            )
        order.append((-row.score, ranks * row.rank, row.pid))
    order.sort()
    return RankList(rows[0].qid, tuple(ScoredPassage(pid, -score) for score, _, pid in order))


def _by_rank(rows: list[_Row], path: Path) -> RankList:
    """The passages in the order of their ranks, with -rank as score; where ranks repeat, and so
    give no order, by score."""
    if len({row.rank for row in rows}) == len(rows):
        return _by_score([row._replace(score=float(-row.rank)) for row in rows], path, "pid")
    if rows[0].score is None:
        got = f"neither scores nor different ranks for the query {lines.shown(rows[0].qid)}"
        raise lines.error(path, rows[0].line, got, "one of them")
    return _by_score(rows, path, "pid")


def _sorted(rank_list: RankList) -> list[ScoredPassage]:
    """The passages in the order they are written; ValueError where no run can hold them."""
    pids: set[str] = set()
    for passage in rank_list.passages:
        _check_column("pid", passage.pid)
        if not math.isfinite(passage.score):
            raise ValueError(
                f"found the score {passage.score} for the query {rank_list.qid!r} and the passage "
                f"{passage.pid!r}; expected a finite number"
            )
        if passage.pid in pids:
            raise ValueError(
                f"found the passage {passage.pid!r} twice for the query {rank_list.qid!r}; "
                f"expected each passage once"
            )
        pids.add(passage.pid)
    return ranking.best_first(rank_list.passages)


def _check_column(what: str, text: str) -> None:
    if not text or checks.UNFIT_FOR_ID.search(text):
        raise ValueError(
            f"found the {what} {lines.shown(text)}; expected a word, for white space separates "
            "columns, and control characters end them for some readers"
        )
