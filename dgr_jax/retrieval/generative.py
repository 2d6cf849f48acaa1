"""Queries -> passages, by writing identifiers with a constrained beam search.

Axis letters: B queries, Q query length, M beams, P passages.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from dgr_jax import moved, partitioning, ranges
from dgr_jax.corpora import ranking
from dgr_jax.corpora.ranking import PidOf
from dgr_jax.decoding import trie
from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.decoding.constraint import Unconstrained
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.models import eight_bits
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import exhaustive
from dgr_jax.retrieval.batched import BatchedSystem
from dgr_jax.retrieval.batching import Found, Shapes, _nothing, _pairs
from dgr_jax.retrieval.explanation import Writes
from dgr_jax.retrieval.search_programs import decode_fn
from dgr_jax.retrieval.system import SystemHit, Trained, TrainedSystem, checked_mask
from dgr_jax.settings import without_effect
from dgr_jax.special_tokens import EOS_ID

if TYPE_CHECKING:
    from dgr_jax.decoding.trie_expand import TrieConstraint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """Settings of retrieval.

    num_beams: identifiers kept a query; at least as many as passages wanted.
    batch_size: queries decoded together, rounded up to the data shards of the mesh; the last batch
      is padded. A query asked alone is decoded alone.
    depth: passages a query in a run.
    query_length: tokens of a query, EOS counted; longer ones are cut.
    renormalise: log-probabilities over the legal tokens instead of the whole vocabulary.
    constrained: only identifiers of passages are written. Otherwise any tokens may be; what is no
      identifier finds nothing, and is counted (`Decoder.counts`).
    kernels: 'int8' multiplies rounded kernels, see `models.eight_bits`; 'float': those trained.
    min_query_length, queries_per_shape: a query is padded to query_length or, where at least
      `queries_per_shape` of those retrieved together fit, to its half, quarter ... of at least
      `min_query_length` tokens. Decoding compiles once for each length that is used.
    max_replicated_bytes: an index of more bytes is cut over the model axis of the mesh.
    """

    num_beams: int = 100
    batch_size: int = 32
    depth: int = 100
    query_length: int = 32
    renormalise: bool = False
    constrained: bool = field(default=True, metadata={"fingerprint": "unless default"})
    kernels: str = field(default="float", metadata={"fingerprint": "unless default"})
    min_query_length: int = without_effect(8)
    queries_per_shape: int = without_effect(2048)
    max_replicated_bytes: int = without_effect(4 << 30)

    def __post_init__(self) -> None:
        counts = ("num_beams", "batch_size", "depth", "query_length", "min_query_length")
        ranges.check(
            self,
            **dict.fromkeys(counts, ranges.at_least(1)),
            kernels=eight_bits.KERNELS,
            queries_per_shape=ranges.at_least(0),
            max_replicated_bytes=ranges.at_least(0),
        )
        if self.renormalise and not self.constrained:
            raise ValueError(
                "Search.renormalise: got True with Search.constrained=False, expected False: "
                "without a constraint all tokens are legal"
            )

    def deeper(self) -> Search:
        """The settings of a search that finds one passage more: of what bounds the passages of a
        query, the smallest grows by one."""
        beams = self.num_beams + (self.num_beams <= self.depth)
        return replace(self, depth=self.depth + 1, num_beams=beams)

    @property
    def shapes(self) -> Shapes:
        """Lengths that queries are padded to."""
        return Shapes(self.query_length, self.min_query_length, self.queries_per_shape)


def rank_passages(
    rows: np.ndarray,
    log_probs: np.ndarray,
    table: IdentifierTable,
    depth: int,
    allowed: np.ndarray | None = None,
    pid_of: PidOf | None = None,
) -> Found:
    """Passages of the identifiers found, best first: passage index int32 and score f32 [B, depth].

    rows: rows of the table int [B, M], -1 where nothing was found; log_probs f32 [B, M], best
    first. The passages of one identifier share its score; equal scores stand, and are cut, in the
    order of `ranking`. A passage counts once, at its best identifier. Free places hold -1 and -inf.
    allowed: bool [P], passages that may be returned; None: all.
    pid_of: passage index -> pid; None: equal scores stay in the order of `rows` and of the corpus.
    """
    query, beam = np.nonzero(rows >= 0)
    row = rows[query, beam]
    first, sizes = table.offsets[row], table.offsets[row + 1] - table.offsets[row]
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    owners = np.asarray(table.passages[np.repeat(first, sizes) + within])
    values = np.repeat(log_probs[query, beam], sizes)
    query = np.repeat(query, sizes)
    keep = np.arange(len(owners)) if allowed is None else np.flatnonzero(allowed[owners])
    _, once = np.unique(query[keep] * table.num_passages + owners[keep], return_index=True)
    keep = keep[np.sort(once)]
    return cut(query[keep], owners[keep], values[keep], (len(rows), depth), pid_of)


def cut(
    query: np.ndarray,
    owners: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    pid_of: PidOf | None,
) -> Found:
    """The best passages of each query, index int32 and score f32 of `shape`: (queries, depth).

    query, owners, values: query, passage and score [n], by query, then best first.
    """
    depth = shape[1]
    if pid_of is not None:
        # Of equal scores that begin within the depth, all are ordered before they are cut.
        groups = ranking.groups(query, values)
        begins = np.searchsorted(groups, groups) - np.searchsorted(query, query)
        query, owners, values, groups = (x[begins < depth] for x in (query, owners, values, groups))
        owners = owners[ranking.in_order(groups, owners, pid_of)]
    place = np.arange(len(query)) - np.searchsorted(query, query)
    query, owners, values, place = (x[place < depth] for x in (query, owners, values, place))
    passages, scores = _nothing(*shape)
    passages[query, place] = owners
    scores[query, place] = values
    return passages, scores


@dataclass
class Decoder(BatchedSystem[np.ndarray, BeamResult], TrainedSystem, kind="docid"):
    """Parameters, index and settings ready to answer token batches.

    params: placed on the mesh as `partitioning.abstract_params` says, by the same rules.
    index: built from the rows of the table, in their order.
    allowed: bool [P], passages that may be returned; None: all. See `restrict`.
    counts: of `sequences` found by searches without a constraint, and of `unknown` ones among them,
      which are no identifiers.
    pid_of: passage index -> pid, see `rank_passages` and `by_pid`.
    """

    config: T5Config
    params: Any
    index: trie.Trie
    table: IdentifierTable
    search: Search
    mesh: jax.sharding.Mesh
    allowed: np.ndarray | None = None
    counts: Counter[str] = field(default_factory=Counter)
    pid_of: PidOf | None = None
    rules: partitioning.Rules = partitioning.RULES
    sizes: tuple[int, ...] = ()

    scores_all: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    model_settings: ClassVar = T5Config
    search_settings: ClassVar = Search
    network: ClassVar = Transformer

    @classmethod
    def opened(cls, trained: Trained, params: Any) -> Decoder:
        """A student and the identifiers of a prepared collection."""
        index = trie.load(trained.prepared / "trie")
        table = IdentifierTable.load(trained.prepared / "identifiers")
        settings = trained.search, trained.mesh
        params = eight_bits.searched(params, trained.search.kernels)
        return cls(trained.model, params, index, table, *settings, rules=trained.rules)

    def __post_init__(self) -> None:
        self._constraint = self._trie() if self.search.constrained else self._anything()
        self._decode = decode_fn(
            self.config,
            self.search.num_beams,
            self.index.layout.max_length,
            self.mesh,
            rules=self.rules,
        )

    def _trie(self) -> TrieConstraint:
        return self.index.constraint(
            renormalise=self.search.renormalise,
            shardings=functools.partial(
                partitioning.index_shardings,
                mesh=self.mesh,
                max_replicated_bytes=self.search.max_replicated_bytes,
            ),
        )

    def _anything(self) -> Unconstrained:
        """Sequences as long as the identifiers: ended by EOS, where these differ in length."""
        layout = self.index.layout
        return Unconstrained(layout.max_length, None if layout.ends == "fixed" else EOS_ID)

    @property
    def index_bytes(self) -> int:
        """Bytes that a search reads beside the parameters: the trie, and the passages of leaves."""
        return self.index.nbytes + self.table.offsets.nbytes + self.table.passages.nbytes

    def describe(self) -> dict[str, Any]:
        """See System."""
        return self.described(len(self.table), self.table.tokens.shape[1])

    @property
    def limits(self) -> dict[str, int]:
        """See System."""
        return {"num_beams": self.search.num_beams, "depth": self.search.depth}

    def restrict(self, passage_mask: np.ndarray) -> Decoder:
        """See System. Identifiers of no other passage are not written; ValueError where none is
        left."""
        mask = checked_mask(passage_mask, self.table.num_passages, self.allowed, "Decoder")
        rows = np.maximum.reduceat(mask[self.table.passages], self.table.offsets[:-1])
        return replace(self, index=self.index.restrict(rows), allowed=mask)

    def ranked(self, rows: np.ndarray, log_probs: np.ndarray) -> Found:
        """The passages of identifiers that were found, see `rank_passages`."""
        settings = self.search.depth, self.allowed, self.pid_of
        return rank_passages(rows, log_probs, self.table, *settings)

    def log_probs(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """See System: every identifier is scored."""
        for scores in exhaustive.identifier_log_probs(self, tokens):
            yield exhaustive.of_passages(scores, self.table, self.allowed)

    def hits(self, tokens: np.ndarray) -> Iterator[list[SystemHit]]:
        """See System."""
        for passages, scores in zip(*self.passages(tokens), strict=True):
            pairs = zip(_pairs(passages, scores), self.tokens_of(passages), strict=True)
            yield [SystemHit(*pair, tokens) for pair, tokens in pairs]

    def tokens_of(self, passages: np.ndarray) -> np.ndarray:
        """The identifiers int32 [n, T] of the n passages that are there, int [.]; -1: free."""
        return np.asarray(self.table.tokens[self.rows[passages[passages >= 0]]])

    def may_write(self, queries: np.ndarray) -> Writes | None:
        """See System; None without a constraint."""
        if not self.search.constrained:
            return None
        legal = exhaustive.legal_rows(self)

        def row_of(passage: int) -> int:
            place = int(np.searchsorted(legal, self.rows[passage]))
            there = place < len(legal) and legal[place] == self.rows[passage]
            return place if there else -1

        return Writes(
            *(self.config, self.params, self.mesh, self.rules, queries[0]),
            rows=np.asarray(self.table.tokens[legal], np.int32),
            bonus=None,
            num_beams=self.search.num_beams,
            fixed=self.index.layout.ends == "fixed",
            renormalise=self.search.renormalise,
            row_of=row_of,
            missing=lambda passage: "no identifier of it may be written",
        )

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Row of the table of each passage, int [P], -1: none."""
        return self.table.rows_of_passages()

    def _ranked(
        self, blocks: Iterable[np.ndarray], batch_size: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        yield from super()._ranked(blocks, batch_size)
        if self.counts:
            counted = "of %(sequences)d sequences found, %(unknown)d are no identifier"
            logger.info(counted, self.counts)

    def _lengths(self, queries: np.ndarray) -> np.ndarray:
        lengths = (queries > 0).sum(1)
        if lengths.max(initial=0) > self.search.query_length:
            raise ValueError(
                f"tokens: got a query of {lengths.max()}, expected at most "
                f"{self.search.query_length}, Search.query_length"
            )
        return lengths

    def _start(self, queries: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> BeamResult:
        placed = partitioning.place_padded(queries[places], shape, self.mesh)
        return self._decode(self.params, self._constraint, placed)

    def _rank(self, result: BeamResult, count: int) -> Found:
        rows = self.written_rows(result, count)
        return self.ranked(rows, np.asarray(result.log_probs)[:count])

    def written_rows(self, result: BeamResult, count: int) -> np.ndarray:
        """Rows of the table that the first `count` queries wrote, int [count, M], -1: none."""
        if self.search.constrained:
            return self.index.table_rows(np.asarray(result.rows)[:count])
        rows = self.table.lookup(np.asarray(result.tokens)[:count])
        valid = np.asarray(result.valid)[:count]
        self.counts.update(sequences=int(valid.sum()), unknown=int((valid & (rows < 0)).sum()))
        return rows


__getattr__ = moved.names(__name__, Retriever="retrieval.retriever")
