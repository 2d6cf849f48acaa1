"""What a teacher is: it puts candidate passages into an order.

A teacher gets queries and, for each, candidate passages (those that the student retrieved). Judged
passages are always scored with them. It yields (qid, passages best first). A passage that the
teacher cannot score stays out of the list, for an invented score would teach an invented order. A
recipe (dgr_jax.teaching.list_recipes) then makes the arrays that distillation reads.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax.corpora.types import ScoredPassage

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_log = logging.getLogger(__name__)

_LARGEST = 1e30  # of a score: losses take differences of them in float32
_FLAT = 0.1  # a warning is given when at least this share of the lists has no order

Ranked = Iterable[tuple[str, Sequence[ScoredPassage]]]
Queries = Mapping[str, str]
Candidates = Mapping[str, Sequence[str]]
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Teacher(ABC):
    """What all teachers share; a further one gives `order`, and its name in
    `dgr_jax.config.configurables`.

    judged_first: True puts positives of the qrels first, higher grades before lower ones, wherever
    the teacher ranks them, and even if it does not score them. A positive whose score is not above
    that of the next passage gets that score plus the mean gap between neighbours of the list.
    """

    judged_first: bool = False

    def rank(
        self,
        queries: Queries,
        candidates: Candidates,
        store: PassageStore,
        qrels: Qrels,
        *,
        min_relevance: int = 1,
        coverage: Mapping[str, Coverage] | None = None,
        self_hits: Container[str] = (),
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        """(qid, the teacher's list) of every query once, in the order in which the teacher works.

        Few lists are in memory at a time, whatever the number of queries. Queries without
        candidates and positives, and those that the teacher does not know, get an empty list.
        Scores that are not finite, or beyond 1e30, are left out. At the end there is a warning
        about these, and one about lists of equal scores where there are many, as they teach no
        order.

        coverage: qid -> the counts that the query's list is added to, in the teacher's own order,
          before judged passages are moved to the front.
        self_hits: queries that are passages of the corpus; the passage with their id is left out.
        """
        pools = _Pools(queries, candidates, store, qrels, min_relevance)
        left, counts = dict.fromkeys(queries), Counter()
        for qid, listed in self.order(queries, pools, store):
            del left[qid]
            if qid in self_hits:
                listed = [passage for passage in listed if passage.pid != qid]
            own = [passage for passage in listed if abs(passage.score) <= _LARGEST]
            counts["scores"] += len(listed)
            counts["not_finite"] += len(listed) - len(own)
            counts["lists"] += len(own) > 1
            counts["flat"] += flat(own)
            if coverage is not None and qid in coverage:
                coverage[qid].scores_not_finite += len(listed) - len(own)
            yield qid, self._finished(qid, own, candidates, pools, coverage)
        for qid in left:
            yield qid, self._finished(qid, [], candidates, pools, coverage)
        self._warn(counts)

    def _finished(
        self,
        qid: str,
        own: list[ScoredPassage],
        candidates: Candidates,
        pools: _Pools,
        coverage: Mapping[str, Coverage] | None,
    ) -> list[ScoredPassage]:
        positives = pools.positives(qid)
        if coverage is not None and qid in coverage:
            coverage[qid].add(own, candidates.get(qid, ()), positives)
        return judged_first(own, positives) if self.judged_first else own

    def _warn(self, counts: Counter) -> None:
        name = type(self).__name__
        if counts["not_finite"]:
            _log.warning(
                "Teach.teacher=@%s(): %s of %s scores are not finite (NaN or inf), or beyond 1e30, "
                "and are left out; expected real numbers: look at its model or its files",
                *(name, f"{counts['not_finite']:,}", f"{counts['scores']:,}"),
            )
        if counts["flat"] and counts["flat"] >= _FLAT * counts["lists"]:
            _log.warning(
                "Teach.teacher=@%s(): %s of %s lists have one score for all passages: losses "
                "that compare scores learn no order from them",
                *(name, f"{counts['flat']:,}", f"{counts['lists']:,}"),
            )

    @abstractmethod
    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterable[tuple[str, list[ScoredPassage]]]:
        """(qid, the passages of its pool that the teacher can score, best first)."""


class _Pools(Mapping[str, list[str]]):
    """qid -> the pids to score: candidates, then positives. A list is made when it is read."""

    def __init__(
        self,
        queries: Queries,
        candidates: Candidates,
        store: PassageStore,
        qrels: Qrels,
        min_relevance: int,
    ) -> None:
        self._queries, self._candidates, self._store = queries, candidates, store
        self._qrels, self._least = qrels, min_relevance

    def __getitem__(self, qid: str) -> list[str]:
        return list(dict.fromkeys([*self._candidates.get(qid, ()), *self.positives(qid)]))

    def __contains__(self, qid: object) -> bool:
        return qid in self._queries

    def __iter__(self) -> Iterator[str]:
        return iter(self._queries)

    def __len__(self) -> int:
        return len(self._queries)

    def positives(self, qid: str) -> dict[str, int]:
        """pid -> grade of the query's positives that are in the corpus."""
        grades = self._qrels.get(qid, {})
        return {p: g for p, g in grades.items() if g >= self._least and p in self._store}


def best_first(pids: Sequence[str], scores: np.ndarray) -> list[ScoredPassage]:
    """Passages in the order of their scores, ties by pid; those with a score of NaN come last."""

    def key(passage: ScoredPassage) -> tuple[bool, float, str]:
        unknown = math.isnan(passage.score)
        return unknown, 0.0 if unknown else -passage.score, passage.pid

    return sorted(
        (ScoredPassage(*pair) for pair in zip(pids, scores.tolist(), strict=True)), key=key
    )


def flat(listed: Sequence[ScoredPassage]) -> bool:
    """Whether a list of two or more passages has one score for all, as float32, which losses
    read, so that it teaches no order."""
    return len(listed) > 1 and len({np.float32(passage.score) for passage in listed}) == 1


def judged_first(
    listed: Sequence[ScoredPassage], positives: Mapping[str, int]
) -> list[ScoredPassage]:
    """The list with positives (pid -> grade) moved or added to its front; see `Teacher`."""
    if not positives:
        return list(listed)
    others = [p for p in listed if p.pid not in positives]
    front: list[tuple[str, float]] = [(p.pid, p.score) for p in listed if p.pid in positives]
    scored = {pid for pid, _ in front}
    front += [(pid, float("-inf")) for pid in positives if pid not in scored]
    front.sort(key=lambda item: -positives[item[0]])  # stable: the teacher's order within a grade
    gap = 1.0
    if len(listed) > 1 and listed[0].score > listed[-1].score:
        gap = (listed[0].score - listed[-1].score) / (len(listed) - 1)
        # The gap is large enough for float32 to tell the scores apart.
        gap = max(gap, 1e-6 * max(abs(listed[0].score), abs(listed[-1].score)))
    below = others[0].score if others else None
    lifted: list[ScoredPassage] = []
    for pid, score in reversed(front):
        if below is None:
            score = max(score, 0.0) if score == float("-inf") else score
        elif score <= below:
            score = below + gap
        lifted.append(ScoredPassage(pid, score))
        below = score
    return lifted[::-1] + others


@dataclass
class Coverage:
    """Counts how much of the candidates a teacher scores, and how far it agrees with the qrels."""

    queries: int = 0
    queries_scored: int = 0
    queries_with_positive: int = 0
    candidates: int = 0
    candidates_scored: int = 0
    positive_in_candidates: int = 0
    positive_scored: int = 0
    first_is_positive: int = 0
    reciprocal_ranks: float = 0.0
    lists_of_equal_scores: int = 0
    scores_not_finite: int = 0

    def add(
        self, own: Sequence[ScoredPassage], candidates: Sequence[str], positives: Container[str]
    ) -> None:
        """Counts a query: the teacher's own list, the student's candidates, the positives."""
        scored = {passage.pid for passage in own}
        self.queries += 1
        self.queries_scored += bool(own)
        self.lists_of_equal_scores += flat(own)
        self.candidates += len(candidates)
        self.candidates_scored += sum(pid in scored for pid in candidates)
        if not positives:
            return
        self.queries_with_positive += 1
        self.positive_in_candidates += any(pid in positives for pid in candidates)
        rank = next((n for n, p in enumerate(own, start=1) if p.pid in positives), None)
        if rank:
            self.positive_scored += 1
            self.first_is_positive += rank == 1
            self.reciprocal_ranks += 1.0 / rank if rank <= 10 else 0.0

    def report(self) -> dict[str, float]:
        """The counts, and shares that are made of them.

        Counts: `queries`, those with a scored passage, those with a positive; and where there are
        any, lists with one score for all passages, and scores that were left out. Shares: of the
        candidates, those that the teacher scored; of the queries with a positive, those whose
        candidates hold one (`positive_in_candidates`) and those whose list does
        (`positive_scored`). Success@1 and RR@10 measure the teacher's own order over the queries
        with a positive; a list without one counts 0.
        """
        judged = self.queries_with_positive or 1
        faults = ("lists_of_equal_scores", "scores_not_finite")
        return {
            "queries": self.queries,
            "queries_scored": self.queries_scored,
            "queries_with_positive": self.queries_with_positive,
            "candidates": self.candidates,
            "candidates_scored": self.candidates_scored / (self.candidates or 1),
            "positive_in_candidates": self.positive_in_candidates / judged,
            "positive_scored": self.positive_scored / judged,
            "Success@1": self.first_is_positive / judged,
            "RR@10": self.reciprocal_ranks / judged,
            **{name: getattr(self, name) for name in faults if getattr(self, name)},
        }
