"""Queries -> passages, by vectors of a dual encoder and exact search.

Axis letters: n texts, Q their length, d vector width, P passages.

    encoder = Encoder(config, params, mesh)
    embed(encoder, store, vocabulary.encode_inputs, path, search)
    index = open_index(path, search.index, mesh)
    passages, scores = Searcher(encoder, index, search).passages(tokens)

`retriever.Retriever` opens a finished experiment.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from dgr_jax import partitioning, ranges
from dgr_jax.corpora import ranking, words
from dgr_jax.corpora.ranking import PidOf
from dgr_jax.corpora.store import PassageStore
from dgr_jax.model_dir import kept
from dgr_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from dgr_jax.retrieval import batching, exact_search, kept_vectors
from dgr_jax.retrieval.batching import Shapes
from dgr_jax.retrieval.exact_search import ExactSearch, Found, Index
from dgr_jax.retrieval.overlap import one_behind
from dgr_jax.retrieval.system import Trained, TrainedSystem, checked_mask
from dgr_jax.settings import without_effect

logger = logging.getLogger(__name__)

VECTORS = "vectors.npy"  # of the passages, beside the checkpoints of their encoder
_BLANK = "blank.npy"  # beside them: the passages that show nothing, where there are any

_SPARE = 16  # places beyond the depth, where most ties end
_FOUND = 1 << 24  # places of all queries that are searched deeper together

EncodeInputs = Callable[[Sequence[str], int], np.ndarray]  # texts, length -> int32 [n, length]


@dataclass(frozen=True)
class DenseSearch:
    """Settings of dense retrieval.

    depth: passages a query in a run.
    query_length, passage_length: tokens of a text, EOS counted; longer ones are cut.
    index: how vectors are kept and searched.
    batch_size: texts encoded together, rounded up to the data shards of the mesh.
    min_length, texts_per_shape: texts are padded to their full length or, where enough of those
      encoded together fit, to its half, quarter ..., as `generative.Search` does with queries.
    """

    depth: int = 100
    query_length: int = 32
    passage_length: int = 128
    index: ExactSearch = ExactSearch()
    batch_size: int = without_effect(128)
    min_length: int = without_effect(8)
    texts_per_shape: int = without_effect(1024)

    def __post_init__(self) -> None:
        lengths = ("query_length", "passage_length", "min_length")
        ranges.check(
            self,
            **dict.fromkeys((*lengths, "depth", "batch_size"), ranges.at_least(1)),
            texts_per_shape=ranges.at_least(0),
        )

    def deeper(self) -> DenseSearch:
        """The settings of a search that finds one passage more."""
        return dataclasses.replace(self, depth=self.depth + 1)

    def shapes(self, longest: int) -> Shapes:
        """Lengths that texts of at most `longest` tokens are padded to."""
        return Shapes(longest, self.min_length, self.texts_per_shape)


@functools.lru_cache(maxsize=8)
def encode_fn(
    config: DualEncoderConfig,
    method: str,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules = partitioning.RULES,
) -> Any:
    """The compiled encoder: (params, int32 [B, Q]) -> f32 [B, d], whole on every device.

    method: 'encode_queries' or 'encode_passages'. Each data shard encodes its own rows.
    """
    model: Any = DualEncoder(config)

    def encode(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens, method=method)

    on_shards = partitioning.on_batch_shards(encode, mesh, whole=1, rules=rules)
    return jax.jit(on_shards, out_shardings=partitioning.replicated(mesh))


@dataclass(frozen=True)
class Encoder:
    """A trained dual encoder; params lie on the mesh as `partitioning.abstract_params` says, by the
    same rules."""

    config: DualEncoderConfig
    params: Any
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules = partitioning.RULES

    def queries(self, tokens: np.ndarray, search: DenseSearch) -> np.ndarray:
        """int32 [n, Q] -> f32 [n, d]; ValueError for more tokens than query_length."""
        return self._encode(tokens, "query", search)

    def passages(self, tokens: np.ndarray, search: DenseSearch) -> np.ndarray:
        """int32 [n, Q] -> f32 [n, d]; ValueError for more tokens than passage_length."""
        return self._encode(tokens, "passage", search)

    def _encode(self, tokens: np.ndarray, kind: str, search: DenseSearch) -> np.ndarray:
        """In batches of a few padded shapes; the next is on the device while one is fetched."""
        longest = getattr(search, f"{kind}_length")
        lengths = (tokens > 0).sum(1)
        if lengths.max(initial=0) > longest:
            raise ValueError(
                f"tokens: got a {kind} of {lengths.max()}, expected at most {longest}, "
                f"DenseSearch.{kind}_length"
            )
        method = "encode_queries" if kind == "query" else "encode_passages"
        encode = encode_fn(self.config, method, self.mesh, self.rules)
        vectors = np.zeros((len(tokens), self.config.dim), np.float32)
        # One that comes alone does not wait for a whole batch.
        size = partitioning.shared_rows(1 if len(tokens) == 1 else search.batch_size, self.mesh)
        place = functools.partial(partitioning.place_padded, mesh=self.mesh)
        started = (
            (places, encode(self.params, place(tokens[places], (size, length))))
            for length, places in batching.batches(lengths, search.shapes(longest), size)
        )
        for places, encoded in one_behind(started):
            vectors[places] = np.asarray(encoded)[: len(places)]
        return vectors


def embed(
    encoder: Encoder,
    store: PassageStore,
    encode_inputs: EncodeInputs,
    path: Path,
    search: DenseSearch,
) -> None:
    """Writes the vectors of all passages, title and text, to a .npy file f32 [P, d] in their order.

    It is written through a memory map, a block of passages at a time, and stands at `path` when it
    is whole. An encoder has a vector for no text too, which is near to any query: passages that
    show nothing get zeros, are counted, and are named in a file beside it, by which `open_index`
    never finds them.
    """
    partial = path.with_name(f"{path.name}.partial")
    shape = (len(store), encoder.config.dim)
    vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    start, blank = 0, []
    for passages in _blocks(store, batching.BLOCK):
        texts = [passage.contents for passage in passages]
        shown = np.array([words.visible(text) for text in texts])
        tokens = encode_inputs(texts, search.passage_length)
        vectors[start : start + len(texts)] = encoder.passages(tokens, search) * shown[:, None]
        blank += (start + np.flatnonzero(~shown)).tolist()
        start += len(passages)
        logger.info("embed: %d/%d passages", start, len(store))
    vectors.flush()
    del vectors
    name_blank(path, blank, len(store))
    os.replace(partial, path)


def name_blank(vectors: Path, blank: Sequence[int] | np.ndarray, passages: int) -> None:
    """Writes what `open_blank` reads, beside the vectors of so many passages."""
    path = vectors.with_name(_BLANK)
    if not len(blank):
        path.unlink(missing_ok=True)
        return
    logger.warning(
        "embed: %d of %d passages have no text: they get no vector and are never found",
        *(len(blank), passages),
    )
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, np.array(blank, np.int64))
    os.replace(partial, path)


def open_index(
    path: Path, settings: ExactSearch, mesh: jax.sharding.Mesh, capacity: int = 0
) -> Index:
    """The index of what `embed` wrote to `path`; capacity: see Index."""
    vectors = exact_search.open_vectors(path)
    return Index(vectors, settings, mesh, open_blank(path, len(vectors)), capacity)


def open_blank(path: Path, passages: int) -> np.ndarray:
    """int64 [.]: the passages that show nothing, beside the vectors of so many at `path`."""
    blank, hidden = path.with_name(_BLANK), np.zeros(0, np.int64)
    if kept.is_listed(blank) or blank.is_file():
        with kept.reading(blank) as file:
            hidden = np.load(file, allow_pickle=False)
            if hidden.dtype != np.int64 or not ((hidden >= 0) & (hidden < passages)).all():
                raise ValueError(f"got {hidden.dtype}, expected passages of {passages}")
    return hidden


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


@dataclass(frozen=True)
class Searcher(TrainedSystem, kind="dense"):
    """A dual encoder and an index of its passages, ready to answer token batches.

    pid_of: passage index -> pid: equal scores stand, and are cut, in the order of `ranking`; None:
      in corpus order.
    """

    encoder: Encoder
    index: Index
    search: DenseSearch
    pid_of: PidOf | None = None

    scores_all: ClassVar[bool] = True
    model_settings: ClassVar = DualEncoderConfig
    search_settings: ClassVar = DenseSearch
    network: ClassVar = DualEncoder
    together: ClassVar[bool] = False

    @classmethod
    def opened(cls, trained: Trained, params: Any) -> Searcher:
        """An encoder, and the vectors of its passages from the folder of its stage."""
        encoder = Encoder(trained.model, params, trained.mesh, trained.rules)
        place, capacity = kept_vectors.located(trained.folder, trained.prepared)
        index = open_index(place / VECTORS, trained.search.index, trained.mesh, capacity)
        return cls(encoder, index, trained.search)

    def __post_init__(self) -> None:
        if self.index.dim != self.encoder.config.dim:
            raise ValueError(
                f"Searcher: got an index of width {self.index.dim}, expected "
                f"{self.encoder.config.dim}, that of the encoder; embed the passages again"
            )

    def pad_to(self, sizes: Sequence[int]) -> None:
        """See System: a query is encoded alone or in a whole batch, and vectors are padded to
        powers of two; there is nothing to choose."""

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices that it runs on."""
        return self.encoder.mesh

    @property
    def index_bytes(self) -> int:
        """Bytes of what a search reads beside the parameters: the vectors, as they are stored."""
        return self.index.num_passages * self.index.settings.row_bytes(self.index.dim)

    @property
    def limits(self) -> dict[str, int]:
        """See System."""
        return {"depth": self.search.depth, "passages": self.index.num_passages}

    def describe(self) -> dict[str, Any]:
        """See System."""
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.encoder.params)),
            "dtype": self.encoder.config.t5.dtype,
            "query_length": self.search.query_length,
            "vectors": self.index.num_passages,
            "width": self.index.dim,
            "storage": self.index.settings.storage,
        }

    def restrict(self, passage_mask: np.ndarray) -> Searcher:
        """See System. The vectors stay where they are."""
        index = self.index
        mask = checked_mask(passage_mask, index.num_passages, index.visible, "Searcher")
        return dataclasses.replace(self, index=index.restrict(mask))

    def log_probs(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """See System: the softmax of the scores over all passages."""
        from scipy.special import logsumexp  # which takes long to import

        for start in range(0, len(tokens), self.search.batch_size):
            block = tokens[start : start + self.search.batch_size]
            vectors = self.encoder.queries(block, self.search)
            passages, scores = self.index.search(vectors, self.index.num_passages)
            all_scores = np.full(scores.shape, -np.inf)
            query, place = np.nonzero(passages >= 0)  # passages without a text are never found
            all_scores[query, passages[query, place]] = scores[query, place]
            yield all_scores - logsumexp(all_scores, axis=1, keepdims=True)

    def passages(self, tokens: np.ndarray) -> Found:
        """int32 [n, Q] -> passage index int32 and score f32 [n, depth], best first.

        Free places hold -1 and -inf.
        """
        return self._ranked(self.encoder.queries(tokens, self.search))

    def by_pid(self, pid_of: PidOf) -> Searcher:
        """The same searcher, which brings passages of equal score into the order of their pids."""
        return dataclasses.replace(self, pid_of=pid_of)

    def _ranked(self, vectors: np.ndarray) -> Found:
        """f32 [n, d] -> what `Index.search` finds, equal scores in their order.

        A query whose last places are one long tie is searched again, deeper, until the tie ends: of
        all its passages those with the lowest pids are kept.
        """
        depth, most = self.search.depth, self.index.num_passages
        if self.pid_of is None or not len(vectors):
            return self.index.search(vectors, depth)
        wide, left = min(depth + _SPARE, max(depth, most)), np.arange(len(vectors))
        passages = np.full((len(vectors), depth), -1, np.int32)
        scores = np.full((len(vectors), depth), -np.inf, np.float32)
        while len(left):
            tied = []
            for some in np.array_split(left, -(-len(left) * wide // _FOUND)):
                nearest, values = self.index.search(vectors[some], wide)
                last = values[:, depth - 1]
                tied.append(some[(last == values[:, -1]) & (last > -np.inf)])
                passages[some] = self._ordered(nearest, values, self.pid_of)[:, :depth]
                scores[some] = values[:, :depth]
            left = np.concatenate(tied) if wide < most else left[:0]
            wide = min(8 * wide, most)
        return passages, scores

    @staticmethod
    def _ordered(passages: np.ndarray, scores: np.ndarray, pid_of: PidOf) -> np.ndarray:
        """The passages of each query, int32 [n, k], those of equal score by pid."""
        query, place = np.nonzero(passages >= 0)
        there, ordered = passages[query, place], passages.copy()
        group = ranking.groups(query, scores[query, place])
        ordered[query, place] = there[ranking.in_order(group, there, pid_of)]
        return ordered

    def passages_of_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[Found]:
        """`passages` of each block of queries. Vectors that are streamed pass once for all blocks,
        as they take longest: nothing is found before the last block is encoded."""
        if self.index.plan.blocks == 1:
            yield from map(self.passages, blocks)
            return
        vectors = [self.encoder.queries(tokens, self.search) for tokens in blocks]
        if not vectors:
            return
        results = self._ranked(np.concatenate(vectors))
        ends = np.cumsum([len(block) for block in vectors])[:-1]
        yield from zip(*(np.split(part, ends) for part in results), strict=True)
