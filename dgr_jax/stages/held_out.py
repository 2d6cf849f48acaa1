"""Questions held out of training, to choose checkpoints and weights on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dgr_jax.corpora.types import Qrel, Query
from dgr_jax.data.same_text import normalised, shared
from dgr_jax.experiments.dense import DensePrepare
from dgr_jax.experiments.generative import Prepare

Settings = Prepare | DensePrepare
Queries = dict[str, dict[str, Query]]  # split -> qid -> query
Qrels = dict[str, list[Qrel]]  # split -> its judgements


def hold_out(queries: Queries, qrels: Qrels, settings: Settings) -> dict[str, dict[str, int]]:
    """Makes the split to choose on, where the settings ask for one, and takes its questions out of
    all splits that are learned from.

    No two questions of the same words stand on both sides, and none of them is a test question: the
    test would measure what was chosen on it. Returns name of a count -> split -> how many
    questions, for the report. Raises ValueError where nothing is left to choose on.
    """
    report: dict[str, dict[str, int]] = {}
    for name in settings.held_out:
        if settings.validation:
            _draw(queries, qrels, settings, name)
        elif tested := _leave_out_test_questions(queries, qrels, settings, name):
            report["tested_not_chosen_on"] = {name: tested}
        texts = {normalised(query.text) for query in queries[name].values()}
        for split in settings.train_splits:
            both = shared(queries[split], queries[name].keys(), texts).qids
            if both:
                report.setdefault("held_out", {})[split] = len(both)
                _remove(queries, qrels, split, both)
    return report


def _draw(queries: Queries, qrels: Qrels, settings: Settings, name: str) -> None:
    """The drawn share of the questions with a positive, of which those of the same words are drawn
    together. A question of several splits has the judgements of the first."""
    by_text: dict[str, dict[str, str]] = {}  # words -> qid -> split
    for split in settings.train_splits:
        tested = _tested(queries, settings, split)
        for qrel in qrels[split]:
            if qrel.relevance >= settings.min_relevance and qrel.qid not in tested:
                words = normalised(queries[split][qrel.qid].text)
                by_text.setdefault(words, {}).setdefault(qrel.qid, split)
    if len(by_text) < 2:
        raise ValueError(
            f"{type(settings).__name__}.validation: got {settings.validation} of {len(by_text)} "
            "questions to learn from that are no test questions, expected two or more"
        )
    count = max(1, round(settings.validation * len(by_text)))
    order = np.random.default_rng(settings.validation_seed).permutation(len(by_text))
    texts = sorted(by_text)
    split_of = {q: s for i in sorted(order[:count]) for q, s in by_text[texts[i]].items()}
    queries[name] = {qid: queries[split][qid] for qid, split in split_of.items()}
    qrels[name] = [
        qrel
        for split in settings.train_splits
        for qrel in qrels[split]
        if split_of.get(qrel.qid) == split
    ]


def _leave_out_test_questions(queries: Queries, qrels: Qrels, settings: Settings, name: str) -> int:
    """Takes test questions out of a split to choose on, and also those without a positive, which no
    student can answer. Returns how many are test questions."""
    tested = _tested(queries, settings, name)
    answered = {q.qid for q in qrels[name] if q.relevance >= settings.min_relevance}
    count = len(queries[name])
    _remove(queries, qrels, name, queries[name].keys() - (answered - tested))
    if not queries[name]:
        raise ValueError(
            f"{type(settings).__name__}.validation_split: got {name!r}, none of whose {count:,} "
            "questions has a positive and is no test question, expected some"
        )
    return len(tested)


def _tested(queries: Queries, settings: Settings, split: str) -> frozenset[str]:
    """The questions of a split that are test questions too."""
    tests = [query for test in settings.test_splits for query in queries[test].values()]
    texts = {normalised(query.text) for query in tests}
    return shared(queries[split], {query.qid for query in tests}, texts).qids


def _remove(queries: Queries, qrels: Qrels, split: str, qids: Iterable[str]) -> None:
    gone = frozenset(qids)
    queries[split] = {qid: query for qid, query in queries[split].items() if qid not in gone}
    qrels[split] = [qrel for qrel in qrels[split] if qrel.qid not in gone]


def readable(report: Mapping[str, Mapping[str, Any]], settings: Settings) -> Iterator[str]:
    """The report in lines, each with the setting that it depends on."""
    setting = f"{type(settings).__name__}.validation{'' if settings.validation else '_split'}"
    for split, count in report.get("held_out", {}).items():
        yield f"{count:,} {split} questions are held out of training, to choose on ({setting})"
    for split, count in report.get("tested_not_chosen_on", {}).items():
        yield f"{count:,} {split} questions are test questions too, and not chosen on ({setting})"
