"""A given run, its passages in the order of a student: every identifier scored in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.retrieval.batching import scored_passages
from dgr_jax.retrieval.planned import PlannedDecoder, PlannedQueries, with_identifiers
from dgr_jax.retrieval.simultaneous import Lexical, PlannedPassages

_LOGITS = 1 << 26  # of a batch: 256 MB

Run = Mapping[str, Sequence[ScoredPassage]]


def rerank(
    decoder: Any,
    vocabulary: Vocabulary,
    store: PassageStore,
    queries: Mapping[str, str],
    run: Run,
    weight: float | None = None,
) -> dict[str, list[ScoredPassage]]:
    """The passages of a run for each query (qid -> text), best first by log p(identifier); with a
    weight, by their score in the run + weight * that. Those that the student is restricted from are
    left out.

    Raises ValueError for a student of which passages have several identifiers or none, a run
    without passages for the queries, and passages that are not in the corpus.
    """
    student = with_identifiers(getattr(decoder, "student", decoder), "rerank")
    planned = _planned([(qid, run.get(qid, ())) for qid in queries], store, weight is not None)
    if student.allowed is not None:
        planned.passages[~student.allowed[planned.passages]] = -1
    count = planned.passages.shape[1]
    together = max(1, _LOGITS // (count * student.config.vocab_size))
    search = replace(
        student.search, depth=count, batch_size=min(student.search.batch_size, together)
    )
    plan = Lexical(planned=count, ranked_by="identifiers", weight=1.0 if weight is None else weight)
    ranker = PlannedDecoder.of(replace(student, search=search), plan, None, beside=False)
    ranker = ranker.by_pid(store.pid_of)
    tokens = vocabulary.encode_inputs(list(queries.values()), search.query_length)
    ranked = ranker.passages(PlannedQueries(tokens, planned))
    return scored_passages(list(queries), *ranked, store.pids)


def _planned(
    lists: Sequence[tuple[str, Sequence[ScoredPassage]]], store: PassageStore, scored: bool
) -> PlannedPassages:
    """The lists as planned passages. scored: whether their scores count; otherwise they are 0."""
    most = max((len(passages) for _, passages in lists), default=0)
    if not most:
        raise ValueError(
            f"rerank: the run has no passages for the {len(lists)} queries, expected some; is it "
            "of other queries?"
        )
    planned = PlannedPassages(
        np.full((len(lists), most), -1, np.int32), np.full((len(lists), most), -np.inf, np.float32)
    )
    for row, (qid, passages) in enumerate(lists):
        for place, passage in enumerate(passages):
            if passage.pid not in store:
                raise ValueError(
                    f"rerank: got passage {passage.pid!r} for query {qid!r}, expected passages of "
                    f"the corpus, such as {store.pids[0]!r}"
                )
            planned.passages[row, place] = store.index_of(passage.pid)
            planned.scores[row, place] = passage.score if scored else 0.0
    return planned
