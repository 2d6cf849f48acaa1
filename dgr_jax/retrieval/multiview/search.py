"""A student that writes identifiers of several views: queries -> passages.

A view is chosen by its marker before the query, and searched under its own constraint: the trie of
titles, the trie of pseudo-queries, or all substrings of the text. The identifiers of all views
together determine the passages and their scores, see dgr_jax.retrieval.multiview.index.

Axis letters: B queries, Q query length, M beams.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import numpy as np

from dgr_jax import partitioning, ranges
from dgr_jax.corpora.ranking import PidOf
from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.decoding.passage_scoring import Scoring
from dgr_jax.decoding.trie import Trie
from dgr_jax.models import eight_bits
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.batching import Found
from dgr_jax.retrieval.multiview.index import MultiviewIndex, Scored, best
from dgr_jax.retrieval.multiview.keys import Keys, keys
from dgr_jax.retrieval.multiview.view_indexes import ViewIndexes
from dgr_jax.retrieval.multiview.written import Written, written_rows, written_spans
from dgr_jax.retrieval.overlap import one_behind
from dgr_jax.retrieval.search_programs import decode_fn
from dgr_jax.retrieval.system import SystemHit, Trained, TrainedSystem, checked_mask
from dgr_jax.special_tokens import EOS_ID

_KEYED = 32  # queries whose findings are held, before their keys are cut


@dataclass(frozen=True)
class MultiviewSearch:
    """Settings of retrieval with identifiers of several views.

    The defaults are the published numbers (MINDER, Li et al. 2023).

    num_beams: how many identifiers are kept in each view; of body spans, all their prefixes too.
    batch_size: how many queries are decoded together, rounded up to a multiple of the mesh's data
      shards; the last batch is padded. A query asked alone is decoded alone.
    depth: how many passages a query has in a run.
    query_length: number of tokens of a query, with the marker of the view and EOS; longer queries
      are cut.
    scoring: how passages are scored by their identifiers.
    kernels: 'int8' multiplies rounded kernels, see `models.eight_bits`; 'float': those trained.
    """

    num_beams: int = 15
    batch_size: int = 32
    depth: int = 100
    query_length: int = 32
    scoring: Scoring = Scoring()
    kernels: str = field(default="float", metadata={"fingerprint": "unless default"})

    def __post_init__(self) -> None:
        counts = ("num_beams", "batch_size", "depth")
        ranges.check(
            self,
            kernels=eight_bits.KERNELS,
            **dict.fromkeys(counts, ranges.at_least(1)),
            query_length=ranges.at_least(3, ", the marker of the view and EOS counted"),
        )

    def deeper(self) -> MultiviewSearch:
        """The settings of a search that finds one passage more, see `generative.Search`."""
        most = self.scoring.max_passages
        scoring = dataclasses.replace(self.scoring, max_passages=most + (most <= self.depth))
        return dataclasses.replace(self, depth=self.depth + 1, scoring=scoring)


@dataclass
class MultiviewDecoder(TrainedSystem, kind="multiview"):
    """Parameters, indexes and settings ready to answer token batches.

    params: placed on the mesh as `partitioning.abstract_params` says, by the same rules.
    index: text, tables and scoring; its text is not searched where 'body' has no marker.
    tries: view -> the trie of its table's rows, in their order.
    markers: view -> the token that stands for it; only these views are searched.
    span_tokens, opening: settings of body spans, see SuffixArray.constraint.
    """

    config: T5Config
    params: Any
    index: MultiviewIndex
    tries: Mapping[str, Trie]
    markers: Mapping[str, int]
    search: MultiviewSearch
    mesh: jax.sharding.Mesh
    span_tokens: int = 10
    opening: np.ndarray | None = None
    rules: partitioning.Rules = partitioning.RULES
    sizes: tuple[int, ...] = ()

    writes: ClassVar[bool] = True
    model_settings: ClassVar = T5Config
    search_settings: ClassVar = MultiviewSearch
    network: ClassVar = Transformer

    @classmethod
    def opened(cls, trained: Trained, params: Any) -> MultiviewDecoder:
        """See TrainedSystem."""
        indexes = ViewIndexes.load(trained.prepared, trained.vocabulary)
        settings = trained.search, trained.mesh, trained.rules
        params = eight_bits.searched(params, trained.search.kernels)
        return cls.of(trained.model, params, indexes, *settings)

    @classmethod
    def of(
        cls,
        config: T5Config,
        params: Any,
        indexes: ViewIndexes,
        search: MultiviewSearch,
        mesh: jax.sharding.Mesh,
        rules: partitioning.Rules = partitioning.RULES,
    ) -> MultiviewDecoder:
        """A decoder over the indexes of a prepared collection."""
        markers = indexes.markers
        index = MultiviewIndex(
            indexes.text, indexes.tables, search.scoring,
            special_ids=(EOS_ID, *markers.values()), num_tokens=indexes.num_tokens,
        )  # fmt: skip
        return cls(
            config, params, index, indexes.tries, markers, search, mesh,
            span_tokens=indexes.span_tokens, opening=indexes.opening, rules=rules,
        )  # fmt: skip

    def __post_init__(self) -> None:
        constraints, lengths = {}, {}
        for view in self.markers:
            if view == "body":
                assert self.index.text is not None
                length = self.span_tokens
                constraint = self.index.text.constraint(max_length=length, opening=self.opening)
            else:
                constraint = self.tries[view].constraint()
                length = self.tries[view].layout.max_length
            constraints[view] = partitioning.place(constraint, partitioning.replicated(self.mesh))
            lengths[view] = length
        self._constraints = constraints
        self._decode = {
            view: decode_fn(
                *(self.config, self.search.num_beams, length, self.mesh),
                record=view == "body",
                rules=self.rules,
            )
            for view, length in lengths.items()
        }

    @property
    def query_length(self) -> int:
        """Number of tokens of a query, with EOS and without a marker."""
        return self.search.query_length - 1

    @property
    def index_bytes(self) -> int:
        """Bytes that a search reads beside the parameters: the suffix array, tries and tables."""
        text = 0 if self.index.text is None else self.index.text.nbytes
        tables = [self.index.tables[view] for view in self.tries]
        owned = sum(table.offsets.nbytes + table.passages.nbytes for table in tables)
        return text + owned + sum(trie.nbytes for trie in self.tries.values())

    def describe(self) -> dict[str, Any]:
        """See System. Identifiers are titles, pseudo-queries, and body spans, one a token of the
        text."""
        body = 0 if self.index.text is None else len(self.index.text)
        count = body + sum(len(self.index.tables[view]) for view in self.tries)
        return self.described(count, self.identifier_length)

    @property
    def identifier_length(self) -> int:
        """Number of tokens of the longest identifier."""
        spans = [self.span_tokens] * (self.index.text is not None)
        return max([*spans, *(table.tokens.shape[1] for table in self.index.tables.values())])

    @property
    def most_identifiers(self) -> int:
        """The most identifiers that a query can write."""
        beams = self.search.num_beams
        return sum(beams * (self.span_tokens if v == "body" else 1) for v in self.markers)

    @property
    def limits(self) -> dict[str, int]:
        """See System."""
        most = self.search.scoring.max_passages
        return {"depth": self.search.depth, "scoring.max_passages": most}

    def restrict(self, passage_mask: np.ndarray) -> Self:
        """See System. Titles and pseudo-queries of no other passage are not written, ValueError
        where none is left; spans of the text are those of all passages. Counts stay those of the
        whole corpus."""
        count, allowed = self.index.num_passages, self.index.allowed
        mask = checked_mask(passage_mask, count, allowed, "MultiviewDecoder")
        index = dataclasses.replace(self.index, allowed=mask)
        tries = {
            view: trie.restrict(
                np.maximum.reduceat(
                    mask[index.tables[view].passages], index.tables[view].offsets[:-1]
                )
            )
            for view, trie in self.tries.items()
        }
        return dataclasses.replace(self, index=index, tries=tries)

    def by_pid(self, pid_of: PidOf) -> Self:
        """The same decoder, which brings passages of equal score into the order of their pids."""
        ordered = copy.copy(self)
        ordered.index = dataclasses.replace(self.index, pid_of=pid_of)
        return ordered

    def passages(self, tokens: np.ndarray) -> Found:
        """int32 [n, Q] without marker -> passage index int32 and score f32 [n, depth], best first;
        free places hold -1 and -inf."""
        scored = self._scored([tokens], self.padded(len(tokens)))
        return best(list(scored), self.search.depth)

    def hits(self, tokens: np.ndarray) -> Iterator[list[SystemHit]]:
        """See System: the tokens are those of the identifier of most weight."""
        for result in self._scored([tokens], self.padded(len(tokens))):
            best_of = result.query.tokens[result.packed.members[: self.search.depth, 0]]
            rows = zip(result.passages.tolist(), result.scores.tolist(), best_of, strict=False)
            yield [SystemHit(*row) for row in rows]

    def passages_of_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[Found]:
        """`passages` of each block of queries, which a generator may tokenise."""
        counted, blocks = itertools.tee(blocks)
        scored = self._scored(blocks, self.search.batch_size)
        for block in counted:
            ranked = (
                best([result], self.search.depth) for result in itertools.islice(scored, len(block))
            )
            passages, scores = zip(*ranked, strict=True) if len(block) else ([], [])
            nothing = np.zeros((0, self.search.depth), np.float32)
            yield (
                np.concatenate([nothing.astype(np.int32), *passages]),
                np.concatenate([nothing, *scores]),
            )

    def candidates(self, blocks: Iterable[np.ndarray], limit: int) -> Iterator[Keys]:
        """See System; with the keys of the passages, see `multiview.keys`."""
        depth = self.search.depth
        sizes = {"identifiers": self.most_identifiers, "length": self.identifier_length}
        counted, blocks = itertools.tee(blocks)
        scored = self._scored(blocks, self.search.batch_size)
        for block in counted:
            parts = []
            for start in range(0, len(block), _KEYED):
                few = list(itertools.islice(scored, min(_KEYED, len(block) - start)))
                passages, scores = best(few, depth)
                held = keys(few, depth=depth, limit=limit, **sizes)
                parts.append({"passages": passages, "scores": scores} | held)
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _scored(self, blocks: Iterable[Any], batch_size: int) -> Iterator[Scored]:
        """What each query of all blocks found, one after another, with its identifiers.

        The next batch is on the device while the host ranks the one before.
        """
        for batch in one_behind(self._started(blocks, batch_size)):
            yield from self.index.rank(self._written(*batch))

    def _started(
        self, blocks: Iterable[Any], batch_size: int
    ) -> Iterator[tuple[int, dict[str, BeamResult]]]:
        size = partitioning.shared_rows(batch_size, self.mesh)
        for queries in blocks:
            for start in range(0, len(queries), size):
                batch = queries[start : start + size]
                yield len(batch), {view: self._start(view, batch, size) for view in self.markers}

    def _start(self, view: str, tokens: np.ndarray, size: int) -> BeamResult:
        """tokens int32 [n <= size, Q]."""
        placed = self._placed(view, tokens, size)
        return self._decode[view](self.params, self._constraints[view], placed)

    def _placed(self, view: str, tokens: np.ndarray, size: int) -> jax.Array:
        """int32 [size, Q], with the marker of the view before each query."""
        longest = int((tokens > 0).sum(1).max())
        if longest > self.query_length:
            raise ValueError(
                f"tokens: got a query of {longest}, expected at most {self.query_length}, "
                "MultiviewSearch.query_length without the marker of the view"
            )
        padded = np.zeros((size, self.search.query_length), np.int32)
        padded[:, :2] = self.markers[view], EOS_ID  # for the rows that no query fills
        width = min(tokens.shape[1], self.query_length)
        padded[: len(tokens), 1 : width + 1] = tokens[:, :width]
        return partitioning.place(padded, partitioning.batch_sharding(self.mesh))

    def _written(self, count: int, results: Mapping[str, BeamResult]) -> list[Written]:
        """The identifiers that `count` queries wrote in each view, on the host."""
        results = jax.device_get(dict(results))
        return [self._of_view(view, result, count) for view, result in results.items()]

    def _of_view(self, view: str, result: BeamResult, count: int) -> Written:
        result = jax.tree.map(lambda leaf: leaf[:count], result)
        if view == "body":
            return written_spans(result)
        rows = self.tries[view].table_rows(result.rows)
        return written_rows(view, result, rows, self.index.tables[view])
