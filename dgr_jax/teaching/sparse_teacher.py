"""Sparse encoders as a teacher: vectors over the words of a vocabulary, most of them 0."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from dgr_jax import ranges
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.teaching.teacher import Queries, Teacher, best_first
from dgr_jax.teaching.teachers import batched

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_QUERIES, _PASSAGES = 256, 4096  # how many texts are handed to the encoder together


@dataclass(frozen=True)
class SparseEncoderTeacher(Teacher):
    """Dot products of a sparse encoder, such as SPLADE, of sentence-transformers 5 or newer (extra
    `encoders`).

    Every distinct candidate is encoded once, and the numbers of its vector that are not 0 are held
    in memory. Queries and passages are encoded each as the model has it for them.
    max_active_dims: how many of the largest numbers of a vector are kept; None keeps those that the
      model's own setting does.
    """

    model: str = "naver/splade-cocondenser-ensembledistil"
    batch_size: int = 32
    max_active_dims: int | None = None

    def __post_init__(self) -> None:
        ranges.check(
            self,
            batch_size=ranges.at_least(1),
            max_active_dims=ranges.optional(ranges.at_least(1)),
        )

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        encoder = self._load()
        distinct = dict.fromkeys(itertools.chain.from_iterable(pools.values()))
        rows = {pid: row for row, pid in enumerate(distinct)}
        texts = (store[store.index_of(pid)].contents for pid in rows)
        parts = [self._encode(encoder.encode_document, part) for part in batched(texts, _PASSAGES)]
        if not parts:
            return
        passages = sparse.vstack(parts, format="csr")
        for block in batched(pools.items(), _QUERIES):
            vectors = self._encode(encoder.encode_query, [queries[qid] for qid, _ in block])
            for place, (qid, pids) in enumerate(block):
                listed = passages[[rows[pid] for pid in pids]]
                yield qid, best_first(pids, (listed @ vectors[[place]].T).toarray()[:, 0])

    def _encode(self, encode: Any, texts: list[str]) -> sparse.csr_matrix:
        """f32 [texts, vocabulary]: the vectors, which the encoder gives as a sparse tensor."""
        tensor = encode(
            texts,
            batch_size=self.batch_size,
            convert_to_sparse_tensor=True,
            save_to_cpu=True,
            max_active_dims=self.max_active_dims,
            show_progress_bar=False,
        ).coalesce()
        values = tensor.values().float().numpy().astype(np.float32)
        return sparse.csr_matrix((values, tensor.indices().numpy()), shape=tuple(tensor.shape))

    def _load(self) -> Any:
        try:
            from sentence_transformers import SparseEncoder
        except ImportError:
            raise ImportError(
                "SparseEncoderTeacher.model needs the extra 'dgr_jax[encoders]': pip install "
                "'dgr_jax[encoders]' 'sentence-transformers>=5'"
            ) from None
        try:
            return SparseEncoder(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"SparseEncoderTeacher.model = {self.model!r} cannot be loaded: give a local "
                "folder of a sparse encoder, or a hub id where the network can be reached "
                f"({error})"
            ) from error
