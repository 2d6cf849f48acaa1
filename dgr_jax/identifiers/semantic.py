"""Docids from a k-means tree: the path of clusters to a leaf, then the place in it (DSI)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import numpy as np

from dgr_jax import ranges
from dgr_jax.identifiers import kmeans
from dgr_jax.identifiers.embeddings import Embeddings, TfidfSvd
from dgr_jax.identifiers.scheme import CorpusSize, Material, Scheme, Sizes, TableSizes
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.special_tokens import EOS_ID

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KMeansTree(Scheme):
    """Hierarchical k-means (Tay et al. 2022, semantically structured identifiers).

    A cluster of more than `leaf_size` passages is split into at most `branching` clusters; in a
    leaf the passages are numbered in corpus order. train_passages: a larger cluster is split by
    centroids trained on a sample of this size. full_batch: as in `ResidualQuantization`.
    """

    # A cluster of another level is another token. The places in leaves of different depth share
    # theirs, but no code follows them, and the prefix before one tells its position.
    codes_by_position = True

    branching: int = 10
    leaf_size: int = 100
    embeddings: Embeddings = field(default_factory=TfidfSvd)
    train_passages: int = 200_000
    full_batch: int = 50_000

    def __post_init__(self) -> None:
        ranges.check(
            self,
            branching=ranges.at_least(2),
            leaf_size=ranges.at_least(1),
            train_passages=ranges.at_least(1),
            full_batch=ranges.at_least(0),
        )

    def tables(self, material: Material) -> list[IdentifierTable]:
        """Rows of at most depth + 2 tokens: clusters, place in the leaf, EOS where lengths differ.

        The cluster at level l is first_code_id + l * branching + cluster; the places in the leaf
        follow the deepest level, in one block for leaves of all levels.
        """
        store, seed, first_code_id = material.store, material.seed, material.first_code_id
        levels, depths, places = self.cluster(self.embeddings.embed(store, seed), seed)
        if not levels and len(store) > 1:
            _log.warning(
                "KMeansTree.leaf_size = %d holds all %d passages: their identifiers are numbers in "
                "corpus order and say nothing of what they are about; expected less",
                *(self.leaf_size, len(store)),
            )
        first_place = first_code_id + len(levels) * self.branching
        rows = np.zeros((len(places), len(levels) + 2), np.int32)
        for level, labels in enumerate(levels):
            inside = level < depths
            rows[inside, level] = first_code_id + level * self.branching + labels[inside]
        passage = np.arange(len(rows))
        rows[passage, depths] = first_place + places
        if depths.min() < depths.max():
            rows[passage, depths + 1] = EOS_ID
        num_code_tokens = first_place - first_code_id + int(places.max()) + 1
        table = IdentifierTable.from_rows(rows, view="semantic", num_code_tokens=num_code_tokens)
        return [table.require_docids()]

    def sizes(self, corpus: CorpusSize) -> Sizes:
        """The tree of clusters of one size and, as those of k-means differ, a level more of two."""
        leaf_size = min(self.leaf_size, corpus.passages)
        splits = math.ceil(math.log(corpus.passages / leaf_size) / math.log(self.branching))
        uneven = splits > 1 or splits == 1 and 3 * corpus.passages > leaf_size * self.branching
        levels = (self.branching,) * (splits + (splits > 1)) + (leaf_size,)
        mean = splits + 1 + uneven
        table = TableSizes(corpus.passages, levels, closing=uneven, mean_length=mean)
        return Sizes((table,), codes=sum(levels))

    def cluster(
        self, vectors: np.ndarray, seed: int
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The tree over vectors [P, D].

        Returns clusters int32 [P] by level (0 below a leaf), depths int64 [P] (clusters above the
        leaf) and places int32 [P] in the leaf.
        """
        num_passages = len(vectors)
        levels: list[np.ndarray] = []
        depths = np.zeros(num_passages, np.int64)
        places = np.zeros(num_passages, np.int32)
        waiting = [(np.arange(num_passages), 0)]
        while waiting:
            members, level = waiting.pop()
            if len(members) <= self.leaf_size:
                depths[members] = level
                places[members] = np.arange(len(members))
                continue
            if level == len(levels):
                levels.append(np.zeros(num_passages, np.int32))
            labels = self._split(vectors, members, seed + level)
            levels[level][members] = labels
            waiting += [(members[labels == label], level + 1) for label in np.unique(labels)]
        _log.info("k-means tree: %d levels over %d passages", len(levels), num_passages)
        return levels, depths, places

    def _split(self, vectors: np.ndarray, members: np.ndarray, seed: int) -> np.ndarray:
        """Clusters int32 [G] of some passages; equal vectors are dealt out in corpus order."""
        chosen = members[kmeans.sample(len(members), self.train_passages, seed)]
        centroids = kmeans.fit(
            kmeans.as_float32(vectors[chosen], "embeddings"),
            self.branching,
            seed=seed,
            full_batch=self.full_batch,
        )
        labels = np.empty(len(members), np.int32)
        for part in kmeans.chunks(len(members), vectors.shape[1]):
            rows = kmeans.as_float32(vectors[members[part]], "embeddings")
            labels[part] = kmeans.nearest(rows, centroids)
        if (labels == labels[0]).all():
            labels = (np.arange(len(members)) * self.branching // len(members)).astype(np.int32)
        return labels
