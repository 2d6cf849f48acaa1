"""A plan by words and a student of several views: plan score + weight * root of the passage score.

Of titles and pseudo-queries the student writes those of planned passages, guided by the plan; see
`multiview.guided`. What it writes, body spans too, scores every passage that holds it. A planned
passage that holds nothing of it has the passage score 0, and one that the student found and the
plan did not name has the plan score 0, so that both are known of all that either of them found.

A passage score is a sum of log-odds to the power Scoring.exponent, 2 as published; its root brings
it back to the scale of log-odds, on which the log-probability of a docid is, and so to one weight.

Axis letters: n queries of a block, P passages.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np

from dgr_jax.corpora.ranking import PidOf
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.retrieval.batching import Found, _nothing
from dgr_jax.retrieval.multiview.guided import GuidedDecoder
from dgr_jax.retrieval.multiview.index import Scored
from dgr_jax.retrieval.multiview.search import MultiviewDecoder, MultiviewSearch
from dgr_jax.retrieval.plan_scores import ranked
from dgr_jax.retrieval.planned import BY_WORDS, PlannedQueries, check_corpus, weight_of
from dgr_jax.retrieval.simultaneous import Lexical, Planner
from dgr_jax.retrieval.system import SearchingSystem, SystemHit


class _Both(NamedTuple):
    """Passages int32, totals, plan scores and passage scores f32 [depth] of a query, best first,
    -1 and -inf where there are fewer; what the student found, None: it was not asked."""

    passages: np.ndarray
    totals: np.ndarray
    plan: np.ndarray
    scores: np.ndarray
    found: Scored | None


@dataclass
class PlannedViews(SearchingSystem):
    """A student of several views that answers beside a plan, for the passages of both.

    plan: its beams are those of each view; where it decides alone, the student is not asked.
    """

    student: GuidedDecoder
    plan: Lexical
    planner: Planner
    pid_of: PidOf | None = None
    sizes: tuple[int, ...] = ()

    writes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_corpus(self.plan, self.student.index.num_passages)
        self._weight = weight_of(self.plan)

    @classmethod
    def of(cls, student: MultiviewDecoder, plan: Lexical, planner: Planner) -> Self:
        """A student with a plan."""
        plan = plan.of_corpus(student.index.num_passages)
        return cls(GuidedDecoder.guided(student, plan), plan, planner)

    @property
    def search(self) -> MultiviewSearch:
        """The settings of the student's search."""
        return self.student.search

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices that it runs on."""
        return self.student.mesh

    @property
    def query_length(self) -> int:
        """See System."""
        return self.student.query_length

    def describe(self) -> dict[str, Any]:
        """See System: what the student says of itself."""
        return self.student.describe()

    @property
    def index_bytes(self) -> int:
        """See System."""
        return self.planner.nbytes + self.student.index_bytes

    @property
    def limits(self) -> dict[str, int]:
        """See System."""
        if self.plan.ranked_by == "plan":
            return {"planned": self.plan.most, "depth": self.search.depth}
        return self.student.limits

    def restrict(self, passage_mask: np.ndarray) -> PlannedViews:
        """See System."""
        return replace(self, student=self.student.restrict(passage_mask))

    def by_pid(self, pid_of: PidOf) -> PlannedViews:
        """See System."""
        ordered = copy.copy(self)
        ordered.student, ordered.pid_of = self.student.by_pid(pid_of), pid_of
        return ordered

    def encode(self, vocabulary: Vocabulary, texts: Sequence[str]) -> PlannedQueries:
        """See System: tokens without a marker, and the planned passages."""
        planned = self.planner.best(texts, self.plan.most, self.student.index.allowed)
        return PlannedQueries(self.student.encode(vocabulary, texts), planned)

    def passages(self, queries: PlannedQueries) -> Found:
        """See System."""
        (block,) = self._of_blocks([queries], self.padded(len(queries)))
        return block

    def passages_of_blocks(self, blocks: Iterable[PlannedQueries]) -> Iterator[Found]:
        """See System."""
        return self._of_blocks(blocks, self.batch_size)

    def hits(self, queries: PlannedQueries) -> Iterator[list[SystemHit]]:
        """See System. The parts are 'plan', the plan score, and 'passage_score', that of the
        identifiers; the tokens are those of the one of most weight, none where it holds none."""
        for both in self._answers([queries], self.padded(len(queries))):
            there = both.passages >= 0
            columns = (part[there].tolist() for part in both[:4])
            tokens = _best_identifiers(both.found)
            nothing = np.zeros(0, np.int32)
            yield [
                SystemHit(i, total, tokens.get(i, nothing), {"plan": plan, "passage_score": score})
                for i, total, plan, score in zip(*columns, strict=True)
            ]

    def _of_blocks(self, blocks: Iterable[PlannedQueries], batch_size: int) -> Iterator[Found]:
        counted, blocks = itertools.tee(blocks)
        answers = self._answers(blocks, batch_size)
        for block in counted:
            passages, scores = _nothing(len(block), self.search.depth)
            for row, both in enumerate(itertools.islice(answers, len(block))):
                passages[row], scores[row] = both.passages, both.totals
            yield passages, scores

    def _answers(self, blocks: Iterable[PlannedQueries], batch_size: int) -> Iterator[_Both]:
        """What each query of all blocks has, one after another."""
        planned, asked = itertools.tee(blocks)
        alone = self.plan.ranked_by == "plan"
        found = itertools.repeat(None) if alone else self.student._scored(asked, batch_size)
        rows = (row for block in planned for row in zip(*block.planned, strict=True))
        for (passages, scores), of_student in zip(rows, found, strict=False):
            there = passages >= 0
            yield self._both(passages[there], scores[there], of_student)

    def _both(self, planned: np.ndarray, scores: np.ndarray, found: Scored | None) -> _Both:
        """Planned passages int32 [.], their plan scores, and what the student found."""
        own = planned[:0] if found is None else found.passages
        passages = np.union1d(planned, own).astype(np.int32)
        parts = np.zeros((2, len(passages)), np.float32)
        parts[0, np.searchsorted(passages, planned)] = scores
        if found is not None:
            parts[1, np.searchsorted(passages, own)] = found.scores
        root = parts[1] ** np.float32(1 / self.search.scoring.exponent)
        totals = parts[0] + np.float32(self._weight) * root
        (best,), (total,) = ranked(passages[None], totals[None], self.search.depth, self.pid_of)
        count = (best >= 0).sum()
        of_best = np.full((2, len(best)), -np.inf, np.float32)
        of_best[:, :count] = parts[:, np.searchsorted(passages, best[:count])]
        return _Both(best, total, of_best[0], of_best[1], found)


def _best_identifiers(found: Scored | None) -> dict[int, np.ndarray]:
    """Passage -> tokens of its identifier of most weight."""
    if found is None:
        return {}
    best = found.query.tokens[found.packed.members[: len(found.passages), 0]]
    return dict(zip(found.passages.tolist(), best, strict=True))


BY_WORDS[MultiviewDecoder] = PlannedViews
