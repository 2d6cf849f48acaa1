"""Queries and judgements of the splits: checked, cleaned by the rules, written and read again."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgr_jax.corpora import beir, checks, store
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Collection, Qrel, Query
from dgr_jax.data.rules import measured_splits
from dgr_jax.data.same_text import normalised, shared
from dgr_jax.experiments.dense import DensePrepare
from dgr_jax.experiments.generative import Prepare
from dgr_jax.model_dir import kept
from dgr_jax.stages import held_out

logger = logging.getLogger(__name__)

JUDGED = "collection"  # folder of queries and judgements, in BEIR layout
UNJUDGED = "unjudged"  # folder of the queries of splits without judgements, in BEIR layout

Settings = Prepare | DensePrepare


@dataclass(frozen=True)
class Judged:
    """split -> its queries by qid, and its judgements where it has some. report: what was left out
    or kept by the rules, by split."""

    queries: dict[str, dict[str, Query]] = field(default_factory=dict)
    qrels: dict[str, list[Qrel]] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    def asked(self, splits: Iterable[str]) -> list[Query]:
        """The queries of these splits."""
        return [query for split in splits for query in self.queries[split].values()]

    def count(self, name: str, split: str, value: Any) -> None:
        """Adds a value to the report, unless it is 0 or empty."""
        if value:
            self.report.setdefault(name, {})[split] = value


def read(collection: Collection, settings: Settings, passages: PassageStore) -> Judged:
    """Queries and judgements of all splits, as the rules let them be.

    A test split may have answers instead of judgements, see `evaluation.answer_hits`. Raises
    ValueError where a split has no judgements, or one to learn from no positive, and where the
    queries of two splits have one id and different words. Questions that are held out of training
    are a split of their own, see `held_out.hold_out`.
    """
    judged = Judged()
    for split in settings.splits:
        judged.queries[split] = {query.qid: query for query in collection.queries(split)}
        qrels = _qrels(collection, split, judged.queries[split], split in settings.test_splits)
        if qrels is not None:
            judged.qrels[split] = _checked(judged, qrels, split, settings, passages)
        same = [qid for qid in judged.queries[split] if qid in passages]
        judged.count("queries_that_are_passages", split, len(same))
    _check_texts(judged)
    for split in settings.train_splits:
        _shared(judged, split, settings)
    judged.report.update(held_out.hold_out(judged.queries, judged.qrels, settings))
    for split in judged.qrels.keys() & set(settings.test_splits):
        qrels = judged.qrels[split]
        answered = {q.qid for q in qrels if q.relevance >= settings.min_relevance}
        judged.count("queries_without_positive", split, len({q.qid for q in qrels} - answered))
    for split in settings.train_splits:
        if not any(q.relevance >= settings.min_relevance for q in judged.qrels[split]):
            raise ValueError(
                f"split {split!r} has no positive: no relevance of {settings.min_relevance} or "
                f"more ({type(settings).__name__}.min_relevance)"
            )
    return judged


def _qrels(
    collection: Collection, split: str, queries: Mapping[str, Query], tested: bool
) -> list[Qrel] | None:
    """The judgements of a split. Returns None for a test split that has answers instead."""
    try:
        return list(collection.qrels(split))
    except FileNotFoundError:
        if not tested or not any(query.answers for query in queries.values()):
            raise
    logger.info("prepare: split %r has no judgements, only answers", split)
    return None


def _checked(
    judged: Judged, qrels: Iterable[Qrel], split: str, settings: Settings, passages: PassageStore
) -> list[Qrel]:
    """The judgements of known queries and passages, each pair once; queries that lose all of theirs
    are left out."""
    owner, where = type(settings).__name__, f"qrels of split {split!r}"
    queries = judged.queries[split]
    checked = checks.check_qrels(
        qrels,
        queries,
        passages,
        where=where,
        unknown=settings.unknown_judgements,
        setting=f"{owner}.unknown_judgements",
    )
    if not checked.kept:
        raise ValueError(f"{where}: found none; expected a judged query or more")
    kept, repeated = checks.judged_once(
        checked.kept,
        contradictions=settings.contradictory_judgements,
        where=where,
        setting=f"{owner}.contradictory_judgements",
    )
    judged.count("unknown_judgements", split, checked.dropped)
    judged.count("repeated_judgements", split, repeated)
    if checked.dropped:
        left = {qrel.qid for qrel in kept}
        judged.queries[split] = {qid: q for qid, q in queries.items() if qid in left}
        lost = len(queries) - len(judged.queries[split])
        judged.count("queries_without_judgements", split, lost)
    return kept


def _check_texts(judged: Judged) -> None:
    """The judged queries of all splits are kept together, by their ids."""
    seen: dict[str, tuple[str, str]] = {}
    for split in judged.qrels:
        for query in judged.queries[split].values():
            other, text = seen.setdefault(query.qid, (split, query.text))
            if text != query.text and normalised(text) != normalised(query.text):
                raise ValueError(
                    f"split {split!r}: the query {query.qid!r} is {query.text[:60]!r}, and in "
                    f"split {other!r} it is {text[:60]!r}; expected one text of each id: give "
                    "other splits, or other ids"
                )


def _shared(judged: Judged, split: str, settings: Settings) -> None:
    """Counts the queries of a training split that are test queries too, and drops them where they
    are not to be kept."""
    tests, queries = judged.asked(settings.test_splits), judged.queries[split]
    both = shared(queries, {q.qid for q in tests}, {normalised(q.text) for q in tests})
    if not both.qids:
        return
    counts = {"queries": len(both.qids), "by_id": len(both.by_id), "by_text": len(both.by_text)}
    judged.count("shared_queries", split, counts)
    if settings.shared_queries == "keep":
        return
    judged.queries[split] = {qid: q for qid, q in queries.items() if qid not in both.qids}
    judged.qrels[split] = [q for q in judged.qrels[split] if q.qid not in both.qids]
    if not judged.qrels[split]:
        raise ValueError(
            f"split {split!r}: all of its {len(queries):,} queries are test queries too, and are "
            f"left out by {type(settings).__name__}.shared_queries = 'drop', expected others"
        )


def readable(report: Mapping[str, Mapping[str, Any]], settings: Settings) -> Iterable[str]:
    """The report in lines, each with the setting that it depends on."""
    owner = type(settings).__name__
    for split, counts in report.get("shared_queries", {}).items():
        kept = settings.shared_queries == "keep"
        yield (
            f"{counts['queries']:,} {split} queries are test queries too ({counts['by_id']:,} by "
            f"their id, {counts['by_text']:,} by their text) and are "
            + ("learned from, so that measures are in part of memory" if kept else "left out")
            + f" ({owner}.shared_queries = {settings.shared_queries!r})"
        )
    for split, count in report.get("repeated_judgements", {}).items():
        rule = settings.contradictory_judgements
        grade = "" if rule == "error" else f"; of several grades the {rule} counts"
        yield (
            f"{count:,} {split} judgements are of pairs that were judged before, and are left out"
            f"{grade} ({owner}.contradictory_judgements = {rule!r})"
        )
    for split, count in report.get("queries_without_judgements", {}).items():
        yield (
            f"{count:,} {split} queries have no judgement of a known passage, and are left out "
            f"({owner}.unknown_judgements = {settings.unknown_judgements!r})"
        )
    for split, count in report.get("queries_without_positive", {}).items():
        yield (
            f"{count:,} {split} queries have no passage of a relevance of {settings.min_relevance} "
            f"or more ({owner}.min_relevance): they count as 0 for every system"
        )
    for split, count in report.get("queries_that_are_passages", {}).items():
        kept = settings.self_hits == "keep"
        yield (
            f"{count:,} {split} queries have the id of a passage, which "
            + ("they may find" if kept else "they do not find, unless it is judged relevant")
            + f" ({owner}.self_hits = {settings.self_hits!r})"
        )
    yield from held_out.readable(report, settings)


def write(folder: Path, judged: Judged) -> None:
    """Writes what `queries` and `qrels` read: collection/, and unjudged/<split>/."""
    for split in sorted(judged.queries.keys() - judged.qrels.keys()):
        beir.write_beir(folder / UNJUDGED / split, None, judged.queries[split].values(), {})
    if judged.qrels:
        kept = {q.qid: q for split in judged.qrels for q in judged.queries[split].values()}
        beir.write_beir(folder / JUDGED, None, kept.values(), judged.qrels)


def queries(folder: Path, split: str) -> dict[str, Query]:
    """qid -> query of a split that was written."""
    alone = folder / UNJUDGED / split
    if alone.is_dir():
        asked = _opened(alone).all_queries()
    else:
        asked = _opened(folder / JUDGED).queries(split)
    return {query.qid: query for query in asked}


def qrels(folder: Path, split: str) -> list[Qrel]:
    """The judgements of a split, in their order; [] of one that has answers instead."""
    if (folder / UNJUDGED / split).is_dir():
        return []
    return list(_opened(folder / JUDGED).qrels(split))


def keep_training_queries(folder: Path, settings: Settings) -> None:
    """Writes beside the passages which training queries each is a positive of, of what `write` has
    written, see `PassageStore.queries`."""
    by_pid: dict[str, list[str]] = {}
    for split in settings.train_splits:
        asked = queries(folder, split)
        for qrel in qrels(folder, split):
            if qrel.relevance >= settings.min_relevance:
                by_pid.setdefault(qrel.pid, []).append(asked[qrel.qid].text)
    store.write_queries(by_pid, folder / "passages")


def _opened(folder: Path) -> beir.BeirCollection:
    kept.whole(folder)
    return beir.BeirCollection(str(folder))


def test_texts(settings: Settings, folder: Path) -> frozenset[str]:
    """The queries to test and to choose on that were written, `normalised`, where pseudo-queries
    come from a file that may hold copies of them."""
    if not settings.sources.pseudo_query_path:
        return frozenset()
    return frozenset(
        normalised(query.text)
        for split in measured_splits(settings)
        for query in queries(folder, split).values()
    )


def self_hits(
    settings: Settings,
    qids: Iterable[str],
    passages: Container[str],
    qrels: Mapping[str, Mapping[str, int]],
) -> frozenset[str]:
    """Those of the queries whose passage of the same id is to be left out of what they find."""
    if settings.self_hits == "keep":
        return frozenset()
    return frozenset(q for q in qids if q in passages and qrels.get(q, {}).get(q, 0) <= 0)
