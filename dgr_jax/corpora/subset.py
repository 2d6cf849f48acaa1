"""A part of a collection, such that smaller parts lie within larger ones."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dgr_jax import ranges
from dgr_jax.corpora.types import Collection, Passage, Qrel, Query


@dataclass(frozen=True)
class Subset:
    """The same queries asked of corpora of several sizes, drawn by a hash of the pid.

    size: passages of the corpus, in its order. Splits have the judgements of these, and the
      queries that keep one.
    core: `core_splits` have the judgements of so many passages alone, whatever the size of the
      corpus, and so the same queries; 0: those of all.
    core_splits: such as the test splits; those to learn from grow with the corpus.
    """

    collection: Collection
    size: int
    core: int = 0
    core_splits: tuple[str, ...] = ("test",)
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self, size=ranges.at_least(1), core=ranges.at_least(0), seed=ranges.SEED)
        if self.core > self.size:
            raise ValueError(
                f"Subset.core: got {self.core}, expected at most {self.size}, Subset.size"
            )

    def check(self, splits: Iterable[str] = ()) -> None:
        """As that of the whole collection."""
        self.collection.check(splits)

    def inputs(self, splits: Iterable[str] = ()) -> Mapping[str, Path | None]:
        """As those of the whole collection."""
        return self.collection.inputs(splits)

    def lacking(self, splits: Sequence[str]) -> tuple[str, ...] | None:
        """As those of the whole collection."""
        return self.collection.lacking(splits)

    @property
    def has_queries(self) -> bool:
        """As the whole collection."""
        return self.collection.has_queries

    def passages(self) -> Iterator[Passage]:
        """The passages of the part, in corpus order.

        Raises ValueError where the collection has fewer.
        """
        kept = self._kept
        return (passage for passage in self.collection.passages() if passage.pid in kept)

    def queries(self, split: str) -> Iterator[Query]:
        """The queries that have a judgement left."""
        judged = {qrel.qid for qrel in self.qrels(split)}
        return (query for query in self.collection.queries(split) if query.qid in judged)

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The judgements of passages of the part, or of its core."""
        core = self.core if split in self.core_splits and self.core else self.size
        kept = set(itertools.islice(self._kept, core))
        return (qrel for qrel in self.collection.qrels(split) if qrel.pid in kept)

    @cached_property
    def _kept(self) -> dict[str, None]:
        """The pids of the part, by their hash."""
        pids = sorted((passage.pid for passage in self.collection.passages()), key=self._hash)
        if len(pids) < self.size:
            raise ValueError(
                f"Subset.size: got {self.size:,}, expected at most "
                f"{len(pids):,}, the passages of the collection"
            )
        return dict.fromkeys(pids[: self.size])

    def _hash(self, pid: str) -> bytes:
        return hashlib.blake2b(f"{self.seed}:{pid}".encode(), digest_size=8).digest()
