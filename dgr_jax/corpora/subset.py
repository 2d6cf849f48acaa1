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
    """A part of a collection's passages, drawn by a hash of the pid, with the judgements of these.

    Parts of several sizes, for which the same queries are asked, show what the size of a corpus
    does.

    size: how many passages the part has; they stay in the order of the corpus. A split has the
      judgements of these passages, and the queries that keep a judgement.
    core: the splits named in `core_splits` have the judgements of the first `core` passages drawn,
      whatever `size` is, and so the same queries at every size; 0 gives them those of all passages.
    core_splits: usually the test splits; other splits, for learning, grow with the corpus.
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
        """Checks the files of the whole collection."""
        self.collection.check(splits)

    def inputs(self, splits: Iterable[str] = ()) -> Mapping[str, Path | None]:
        """The files of the whole collection."""
        return self.collection.inputs(splits)

    def lacking(self, splits: Sequence[str]) -> tuple[str, ...] | None:
        """What the whole collection lacks."""
        return self.collection.lacking(splits)

    @property
    def has_queries(self) -> bool:
        """Whether the whole collection has queries."""
        return self.collection.has_queries

    def passages(self) -> Iterator[Passage]:
        """The passages of the part, in corpus order.

        Raises ValueError where the collection has fewer.
        """
        kept = self._kept
        return (passage for passage in self.collection.passages() if passage.pid in kept)

    def queries(self, split: str) -> Iterator[Query]:
        """The queries of a split that have a judgement in this part."""
        judged = {qrel.qid for qrel in self.qrels(split)}
        return (query for query in self.collection.queries(split) if query.qid in judged)

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The judgements of passages of the part, in a core split those of the core alone."""
        core = self.core if split in self.core_splits and self.core else self.size
        kept = set(itertools.islice(self._kept, core))
        return (qrel for qrel in self.collection.qrels(split) if qrel.pid in kept)

    @cached_property
    def _kept(self) -> dict[str, None]:
        """The pids of the part, in the order of their hash."""
        pids = sorted((passage.pid for passage in self.collection.passages()), key=self._hash)
        if len(pids) < self.size:
            raise ValueError(
                f"Subset.size: got {self.size:,}, expected at most "
                f"{len(pids):,}, the passages of the collection"
            )
        return dict.fromkeys(pids[: self.size])

    def _hash(self, pid: str) -> bytes:
        return hashlib.blake2b(f"{self.seed}:{pid}".encode(), digest_size=8).digest()
