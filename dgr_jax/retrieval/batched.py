"""Systems that answer batch by batch: the device has the next while the host ranks the one before.

Axis letters: n queries of a block, B queries of a batch, Q query length, D passages of a query.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora.ranking import PidOf
from dgr_jax.retrieval.batching import Found, Shapes, _nothing, batches
from dgr_jax.retrieval.overlap import one_behind
from dgr_jax.retrieval.system import SearchingSystem

_PAYS = 8  # short queries beside longer ones from which on a batch of their own costs less

Queries = TypeVar("Queries", bound=Sized)
Result = TypeVar("Result")


class _Batch(NamedTuple, Generic[Result]):
    """Queries at `places` of a block, on their way through the device.

    block: the arrays [n, D] of the whole block; those of these queries are written into them.
    result: None for a block without queries.
    last: whether the block is whole when these are ranked.
    """

    block: tuple[np.ndarray, ...]
    places: np.ndarray
    result: Result | None
    last: bool


class BatchedSystem(SearchingSystem, Generic[Queries, Result]):
    """A system whose queries, as `encode` makes them, are answered in batches of few lengths.

    Result: what the device makes of a batch, and the host ranks.
    pid_of: passage index -> pid, by which passages of equal score are ordered; None: they are not.
    """

    pid_of: PidOf | None

    def passages(self, queries: Queries) -> Found:
        """Passage index int32 and score f32 [n, D], best first; free places hold -1 and -inf."""
        passages, scores, *_ = self._answers(queries)
        return passages, scores

    def passages_of_blocks(self, blocks: Iterable[Queries]) -> Iterator[Found]:
        """`passages` of each block of queries, which a generator may encode.

        The next batch, of the next block too, is on the device while the host ranks the one before.
        """
        for passages, scores, *_ in self._ranked(blocks, self.batch_size):
            yield passages, scores

    def by_pid(self, pid_of: PidOf) -> Self:
        """See System."""
        ordered = copy.copy(self)
        ordered.pid_of = pid_of
        return ordered

    def _answers(self, queries: Queries) -> tuple[np.ndarray, ...]:
        """Passages, scores and whatever else `_rank` says of them, [n, D] each."""
        (block,) = self._ranked([queries], self.padded(len(queries)))
        return block

    def _ranked(
        self, blocks: Iterable[Queries], batch_size: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        for batch in one_behind(self._started(blocks, batch_size)):
            if batch.result is not None:
                ranked = self._rank(batch.result, len(batch.places))
                for whole, part in zip(batch.block, ranked, strict=True):
                    whole[batch.places] = part
            if batch.last:
                yield batch.block

    def _started(self, blocks: Iterable[Queries], batch_size: int) -> Iterator[_Batch[Result]]:
        shapes, size = self.search.shapes, partitioning.shared_rows(batch_size, self.mesh)
        if self.sizes:
            shapes = Shapes(shapes.longest, (shapes.longest + 1) // 2, _PAYS)
        for queries in blocks:
            block, lengths = self._nothing(len(queries)), self._lengths(queries)
            planned = list(batches(lengths, shapes, size))
            if not planned:
                yield _Batch(block, lengths, None, last=True)
            for position, (length, places) in enumerate(planned, start=1):
                if self.sizes:
                    size = partitioning.shared_rows(self.padded(len(places)), self.mesh)
                result = self._start(queries, places, (size, length))
                yield _Batch(block, places, result, last=position == len(planned))

    def _nothing(self, queries: int) -> tuple[np.ndarray, ...]:
        """The arrays of so many queries without a passage."""
        return _nothing(queries, self.search.depth)

    def _lengths(self, queries: Queries) -> np.ndarray:
        """Tokens of each query, int [n]. Raises ValueError for a query that is too long."""
        raise NotImplementedError

    def _start(self, queries: Queries, places: np.ndarray, shape: tuple[int, int]) -> Result:
        """Gives the queries at some places to the device, padded to `shape` (B, Q)."""
        raise NotImplementedError

    def _rank(self, result: Result, count: int) -> tuple[np.ndarray, ...]:
        """Waits for a batch; the arrays [count, D] of its first `count` queries, which are those
        that were asked."""
        raise NotImplementedError
