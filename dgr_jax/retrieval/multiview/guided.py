"""A student of several views that a plan guides: planned queries -> passages.

Of titles and pseudo-queries, beams write those of planned passages alone, in the order of
log-probability + bonus, see `decoding.guide`. The bonus of an identifier is the largest plan score
of its planned passages, over the weight of the plan. Body spans are written as without a plan: the
passages of a prefix are no interval of the suffix array, so that it has no bonus.

Axis letters: n queries of a batch, W identifiers of planned passages, M beams.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.data.identifier_rows import ByPassage
from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.retrieval.batching import _nothing
from dgr_jax.retrieval.multiview.index import size_class
from dgr_jax.retrieval.multiview.search import MultiviewDecoder
from dgr_jax.retrieval.multiview.written import Written, table_rows
from dgr_jax.retrieval.planned import guided_fn, weight_of
from dgr_jax.retrieval.simultaneous import Lexical, PlannedPassages

_FEWEST = 64  # the smallest padded number of identifiers of planned passages


class PlannedIdentifiers:
    """The identifiers of planned passages in one view.

    width: W, how many a query has at most: a power of two, so that corpora of one size class share
      compiled programs.
    """

    def __init__(self, table: IdentifierTable, planned: int) -> None:
        self._rows = ByPassage(table)
        most = np.sort(np.diff(self._rows.offsets))[-planned:].sum()
        self.width = size_class(most, _FEWEST)
        self.nbytes = self._rows.rows.nbytes + self._rows.offsets.nbytes

    def of(self, planned: PlannedPassages) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the table int32 [n, W], ascending, -1 where there are fewer, and the best plan
        score of the passages of each f32 [n, W], -inf there."""
        query, place = np.nonzero(planned.passages >= 0)
        pair, row = self._rows.of(planned.passages[query, place])
        query, score = query[pair], planned.scores[query, place][pair]
        order = np.lexsort((-score, row, query))
        query, row, score = query[order], row[order], score[order]
        new = np.ones(len(row), bool)
        new[1:] = (np.diff(query) > 0) | (np.diff(row) > 0)
        query, row, score = query[new], row[new], score[new]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        rows = np.full((len(planned.passages), self.width), -1, np.int32)
        best = np.full(rows.shape, -np.inf, np.float32)
        rows[query, place], best[query, place] = row, score
        return rows, best


class _Guided(NamedTuple):
    """rows int32 [n, W] of the table, and log_probs f32 [B, W] on their way from the device, -inf
    where no beam wrote them. beside: what a search of all identifiers finds for the queries at
    `short`, which have fewer planned passages than beams; None: all have enough."""

    rows: np.ndarray
    log_probs: jax.Array
    short: np.ndarray
    beside: BeamResult | None


@dataclass
class GuidedDecoder(MultiviewDecoder):
    """A student of several views that is asked PlannedQueries; see the module.

    Where fewer passages are planned for a query than there are beams, it searches all titles and
    pseudo-queries too.
    """

    plan: Lexical = Lexical()

    @classmethod
    def guided(cls, student: MultiviewDecoder, plan: Lexical) -> Self:
        """The same student, guided by a plan of its corpus, with as many beams as it says."""
        same = {f.name: getattr(student, f.name) for f in fields(student)}
        same["search"] = replace(student.search, num_beams=plan.num_beams)
        return cls(**same, plan=plan)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weight = np.float32(weight_of(self.plan))
        tabled = [view for view in self.markers if view != "body"]
        self._planned = {
            view: PlannedIdentifiers(self.index.tables[view], self.plan.most) for view in tabled
        }
        self._guided = {
            view: guided_fn(
                *(self.config, self.search.num_beams),
                *(self.tries[view].layout.ends == "fixed", self.mesh, self.rules),
            )
            for view in tabled
        }

    @property
    def index_bytes(self) -> int:
        """See MultiviewDecoder; with the identifiers by passage."""
        return super().index_bytes + sum(part.nbytes for part in self._planned.values())

    def _start(self, view: str, queries: Any, size: int) -> Any:
        """PlannedQueries, n <= size."""
        tokens = queries.tokens
        if view == "body":
            return super()._start(view, tokens, size)
        rows, best = self._planned[view].of(queries.planned)
        short = np.flatnonzero((queries.planned.passages >= 0).sum(1) < self.search.num_beams)
        few = partitioning.shared_rows(-(-size // 4), self.mesh)  # two shapes are compiled
        few = few if len(short) <= few else size
        beside = super()._start(view, tokens[short], few) if len(short) else None
        blank = [(0, size - len(rows)), (0, 0)]
        planned = (
            np.pad(_tokens(self.index.tables[view], rows), [*blank, (0, 0)]),
            np.pad(best / self._weight, blank, constant_values=-np.inf),
        )
        planned = partitioning.place(planned, partitioning.batch_sharding(self.mesh))
        batch = self._placed(view, tokens, size), *planned
        return _Guided(rows, self._guided[view](self.params, batch), short, beside)

    def _of_view(self, view: str, result: Any, count: int) -> Written:
        if view == "body":
            return super()._of_view(view, result, count)
        beams, beside = self.search.num_beams, result.beside
        best = np.argsort(-result.log_probs[:count], axis=1, kind="stable")[:, :beams]
        rows, log_probs = (
            np.take_along_axis(part, best, 1) for part in (result.rows, result.log_probs[:count])
        )
        rows = np.where(log_probs > -np.inf, rows, -1)
        if beside is not None:
            short, (more, values) = result.short, _nothing(count, beams)
            more[short] = self.tries[view].table_rows(beside.rows[: len(short)])
            values[short] = beside.log_probs[: len(short)]
            same = (more[:, :, None] == rows[:, None]).any(2)
            rows = np.concatenate([rows, np.where(same, -1, more)], 1)
            log_probs = np.concatenate([log_probs, values], 1)
        table = self.index.tables[view]
        return table_rows(view, _tokens(table, rows), log_probs, rows, table)


def _tokens(table: IdentifierTable, rows: np.ndarray) -> np.ndarray:
    """int32 [..., T] of rows; 0 where there is none."""
    return np.where(rows[..., None] >= 0, table.tokens[np.maximum(rows, 0)], 0)
