"""Recipes cut rank lists from a teacher's order: the arrays that distillation reads."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.teaching.places import Places

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore
    from dgr_jax.teaching.teacher import Candidates, Qrels, Ranked


@dataclass(frozen=True, eq=False)
class RankLists:
    """n rank lists of at most L passages, in the teacher's order (best first).

    query_rows: int32 [n], places in the sequence of qids. passages: int32 [n, L], passage
    indices, -1 where a list is shorter. teacher_scores: f32 [n, L], 0 where a list is shorter.
    positives: int32 [n], the column of the generation target. report: counts of the lists that were
    made, and of the queries that were left out, by reason.
    """

    query_rows: np.ndarray
    passages: np.ndarray
    teacher_scores: np.ndarray
    positives: np.ndarray
    report: dict[str, int]

    @property
    def positive_passages(self) -> np.ndarray:
        """int32 [n]: the passage index of the generation target."""
        return self.passages[np.arange(len(self.passages)), self.positives]


class ListRecipe(Protocol):
    """How rank lists are cut from a teacher's order."""

    @property
    def length(self) -> int:
        """Passages of a list at most."""

    @property
    def lists_a_query(self) -> int:
        """Lists of a query at most."""

    def select(
        self,
        ranked: Ranked,
        *,
        qids: Sequence[str],
        store: PassageStore,
        qrels: Qrels,
        candidates: Candidates,
        seed: int = 0,
        min_relevance: int = 1,
    ) -> RankLists:
        """The lists of the queries, in the order of `qids`.

        ranked: (qid, its list) of every query, in any order. candidates: the student's, best first.
        Draws depend on the seed and the qid alone, so a query gets the same lists in any company.
        """


@dataclass(frozen=True)
class TopM:
    """The plain recipe: a list is the first `size` passages in the teacher's order.

    If the best positive (by grade, then by the teacher's order) is not among them, it takes the
    last place. Shorter lists are padded; a list of one passage is left out.
    """

    size: int = 5

    lists_a_query = 1  # no setting

    def __post_init__(self) -> None:
        ranges.check(self, size=ranges.at_least(2))

    @property
    def length(self) -> int:
        return self.size

    def select(
        self,
        ranked: Ranked,
        *,
        qids: Sequence[str],
        store: PassageStore,
        qrels: Qrels,
        candidates: Candidates | None = None,
        seed: int = 0,
        min_relevance: int = 1,
    ) -> RankLists:
        """One list a query where possible; nothing is drawn."""
        del candidates, seed
        builder = _Builder(self.size, store, qids)
        for qid, listed in ranked:
            best = builder.best_positive(listed, qrels.get(qid, {}), min_relevance)
            if best is None:
                continue
            if len(listed) < 2:
                builder.count("too_few_negatives")
                continue
            top = list(listed[: self.size])
            if best not in top:
                top[-1] = best
            builder.add(qid, top, best)
        return builder.arrays()


@dataclass(frozen=True)
class TwoLists:
    """The published recipe (DGR, Li et al. 2024): two lists for each query with the same negatives.

    List A holds the best positive, list B a random one (the same where there is no other). Both
    hold the same `negatives` passages that are not positive: the student's best, and others drawn
    from the student's first `depth`. Passages are in the teacher's order; negatives that the
    teacher has not scored cannot be drawn.
    """

    negatives: int = 4
    depth: int = 200

    lists_a_query = 2  # no setting

    def __post_init__(self) -> None:
        ranges.check(self, negatives=ranges.at_least(1))
        ranges.check(self, depth=ranges.at_least(self.negatives, ", TwoLists.negatives"))

    @property
    def length(self) -> int:
        return self.negatives + 1

    def select(
        self,
        ranked: Ranked,
        *,
        qids: Sequence[str],
        store: PassageStore,
        qrels: Qrels,
        candidates: Candidates,
        seed: int = 0,
        min_relevance: int = 1,
    ) -> RankLists:
        """Two lists a query where possible."""
        builder = _Builder(self.length, store, qids)
        for qid, listed in ranked:
            grades = qrels.get(qid, {})
            best = builder.best_positive(listed, grades, min_relevance)
            if best is None:
                continue
            rng = np.random.default_rng([seed, zlib.crc32(qid.encode())])
            place = {passage.pid: i for i, passage in enumerate(listed)}
            eligible = [
                place[pid]
                for pid in dict.fromkeys(candidates.get(qid, ())[: self.depth])
                if pid in place and grades.get(pid, 0) < min_relevance
            ]
            if len(eligible) < self.negatives:
                builder.count("too_few_negatives")
                continue
            drawn = rng.choice(len(eligible) - 1, self.negatives - 1, replace=False) + 1
            negatives = [eligible[0], *(eligible[i] for i in drawn)]
            others = [i for i, p in enumerate(listed) if grades.get(p.pid, 0) >= min_relevance]
            for positive in (place[best.pid], int(rng.choice(others))):
                chosen = [listed[i] for i in sorted([positive, *negatives])]
                builder.add(qid, chosen, listed[positive])
        return builder.arrays()


class _Builder:
    """Collects rank lists of one width, and counts what is left out."""

    def __init__(self, width: int, store: PassageStore, qids: Sequence[str]) -> None:
        self._width = width
        self._store = store
        self._place = Places(qids)
        self._queries = len(qids)
        self._rows, self._positives, self._passages = array("i"), array("i"), array("i")
        self._scores = array("f")
        self._left_out = {"without_positive": 0, "positive_not_scored": 0, "too_few_negatives": 0}

    def best_positive(
        self, listed: Sequence[ScoredPassage], grades: Mapping[str, int], min_relevance: int
    ) -> ScoredPassage | None:
        """The positive with the highest grade, the first of these in the teacher's order.

        None where there is none, which is counted.
        """
        positives = [p for p in listed if grades.get(p.pid, 0) >= min_relevance]
        if positives:
            return max(positives, key=lambda p: grades[p.pid])
        judged = any(grade >= min_relevance for grade in grades.values())
        self.count("positive_not_scored" if judged else "without_positive")
        return None

    def count(self, reason: str) -> None:
        self._left_out[reason] += 1

    def add(self, qid: str, listed: Sequence[ScoredPassage], positive: ScoredPassage) -> None:
        free = self._width - len(listed)
        self._rows.append(self._place.of(qid))
        self._positives.append(listed.index(positive))
        self._passages.extend([*(self._store.index_of(p.pid) for p in listed), *[-1] * free])
        self._scores.extend([*(p.score for p in listed), *[0.0] * free])

    def arrays(self) -> RankLists:
        columns = (self._rows, self._positives, self._passages, self._scores)
        rows, positives, passages, scores = map(np.asarray, columns)  # int32, and float32; no copy
        in_order = bool((rows[:-1] <= rows[1:]).all())
        order = slice(None) if in_order else np.argsort(rows, kind="stable")
        return RankLists(
            query_rows=rows[order],
            passages=passages.reshape(-1, self._width)[order],
            teacher_scores=scores.reshape(-1, self._width)[order],
            positives=positives[order],
            report={"queries": self._queries, "lists": len(rows), **self._left_out},
        )
