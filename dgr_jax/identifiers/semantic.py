"""Docids from a k-means tree: the path of clusters to a leaf, then the place in it (DSI)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dgr_jax import ranges
from dgr_jax.identifiers import embeddings, kept_models, kmeans
from dgr_jax.identifiers.embeddings import Embeddings, TfidfSvd
from dgr_jax.identifiers.scheme import Addition, CorpusSize, Material, Scheme, Sizes, TableSizes
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.settings import unless_default
from dgr_jax.special_tokens import EOS_ID

_log = logging.getLogger(__name__)

_TREE = "tree"  # folder of what is kept
_LEAF, _ABSENT = -1, -2  # what is below a cluster, where it is no node


@dataclass(frozen=True)
class KMeansTree(Scheme):
    """Hierarchical k-means (Tay et al. 2022, semantically structured identifiers).

    A cluster of more than `leaf_size` passages is split into at most `branching` clusters; in a
    leaf the passages are numbered in corpus order. train_passages: a larger cluster is split by
    centroids trained on a sample of this size. full_batch: as in `ResidualQuantization`.
    reserve: further places in every leaf, for passages that come later (`dgr_jax.update`).
    """

    # A cluster of another level is another token. The places in leaves of different depth share
    # theirs, but no code follows them, and the prefix before one tells its position.
    codes_by_position = True

    branching: int = 10
    leaf_size: int = 100
    embeddings: Embeddings = field(default_factory=TfidfSvd)
    train_passages: int = 200_000
    full_batch: int = 50_000
    reserve: int = unless_default(0)

    def __post_init__(self) -> None:
        ranges.check(
            self,
            branching=ranges.tokens(2),
            leaf_size=ranges.at_least(1),
            train_passages=ranges.at_least(1),
            full_batch=ranges.at_least(0),
            reserve=ranges.tokens(0),
        )

    def tables(self, material: Material) -> list[IdentifierTable]:
        """Rows of at most depth + 2 tokens: clusters, place in the leaf, EOS where lengths differ.

        The cluster at level l is first_code_id + l * branching + cluster; the places in the leaf
        follow the deepest level, in one block for leaves of all levels.
        """
        store, seed, first_code_id = material.store, material.seed, material.first_code_id
        vectors = embeddings.embedded(self.embeddings, store, seed, material.keep)
        tree: list[tuple[np.ndarray, dict[int, int]]] = []
        levels, depths, places = self.cluster(vectors, seed, tree)
        if material.keep is not None:
            _keep(tree, len(levels), material.keep / _TREE)
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
        num_code_tokens = first_place - first_code_id + int(places.max()) + 1 + self.reserve
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
        return Sizes((table,), codes=sum(levels) + self.reserve)

    def rows(self, addition: Addition) -> np.ndarray:
        """See Scheme: the first free place of the nearest leaf that has one; the centroids stay as
        they are."""
        tree = _Tree(addition, self.branching)
        texts = [passage.contents for passage in addition.passages]
        rows = np.zeros((len(texts), addition.table.tokens.shape[1]), np.int32)
        for row, vector in zip(
            rows, embeddings.later(self.embeddings, texts, addition.kept), strict=True
        ):
            taken = tree.take(vector)
            if taken is None:
                raise ValueError(
                    f"KMeansTree: no identifier is left for "
                    f"{addition.table.num_passages + len(texts):,} passages in leaves of "
                    f"{tree.places} places; prepare and train again with all passages, or "
                    "with KMeansTree.reserve"
                )
            row[: len(taken)] = taken
        return rows

    def cluster(
        self,
        vectors: np.ndarray,
        seed: int,
        tree: list[tuple[np.ndarray, dict[int, int]]] | None = None,
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The tree over vectors [P, D].

        Returns clusters int32 [P] by level (0 below a leaf), depths int64 [P] (clusters above the
        leaf) and places int32 [P] in the leaf. tree: gets the centroids of every cluster that is
        split, and cluster -> the place in `tree` of the one below it, -1 of a leaf.
        """
        num_passages = len(vectors)
        levels: list[np.ndarray] = []
        depths = np.zeros(num_passages, np.int64)
        places = np.zeros(num_passages, np.int32)
        tree = [] if tree is None else tree
        above: dict[int, int] = {}
        waiting = [(np.arange(num_passages), 0, above, 0)]
        while waiting:
            members, level, above, cluster = waiting.pop()
            if len(members) <= self.leaf_size:
                above[cluster] = -1
                depths[members] = level
                places[members] = np.arange(len(members))
                continue
            if level == len(levels):
                levels.append(np.zeros(num_passages, np.int32))
            labels, centroids = self._split(vectors, members, seed + level)
            above[cluster] = len(tree)
            below: dict[int, int] = {}
            tree.append((centroids, below))
            levels[level][members] = labels
            for label in np.unique(labels).tolist():
                waiting.append((members[labels == label], level + 1, below, label))
        _log.info("k-means tree: %d levels over %d passages", len(levels), num_passages)
        return levels, depths, places

    def _split(
        self, vectors: np.ndarray, members: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clusters int32 [G] of some passages, and centroids; equal vectors are dealt out in corpus
        order."""
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
            centroids = np.resize(centroids[labels[0]], (self.branching, vectors.shape[1]))
        return labels, centroids


def _keep(tree: list[tuple[np.ndarray, dict[int, int]]], levels: int, folder: Path) -> None:
    """Keeps the centroids f32 [nodes * branching, D] and, of each, the node below it: -1 of a leaf,
    -2 where there is none. levels: of the tree."""
    branching = max([len(centroids) for centroids, _ in tree], default=0)
    width = tree[0][0].shape[1] if tree else 0
    all_centroids = np.zeros((len(tree), branching, width), np.float32)
    below = np.full((len(tree), branching), _ABSENT, np.int32)
    for node, (centroids, children) in enumerate(tree):
        all_centroids[node, : len(centroids)] = centroids
        below[node, list(children)] = list(children.values())
    arrays = {"centroids": all_centroids, "below": below, "levels": np.array([levels])}
    kept_models.save(folder, arrays)


class _Tree:
    """The tree of clusters that is kept, and which places of its leaves passages have."""

    def __init__(self, addition: Addition, branching: int) -> None:
        arrays = kept_models.load(addition.kept / _TREE, ("centroids", "below", "levels"))
        self._centroids, self._below = arrays["centroids"], arrays["below"]
        self._half_norms = 0.5 * (self._centroids**2).sum(-1)
        self._first, self._branching = addition.first_code_id, branching
        self._first_place = addition.first_code_id + int(arrays["levels"][0]) * branching
        self.places = addition.table.num_code_tokens - (self._first_place - self._first)
        self._tokens = np.asfortranarray(addition.table.tokens)
        self._closed = bool((self._tokens == EOS_ID).any())
        self._taken: dict[tuple[int, ...], np.ndarray] = {}

    def take(self, vector: np.ndarray) -> list[int] | None:
        """The tokens of a vector f32 [D], which from now on are taken; None where no leaf has a
        place left."""
        return self._take(np.asarray(vector, np.float32), 0 if len(self._below) else _LEAF, ())

    def _take(self, vector: np.ndarray, node: int, before: tuple[int, ...]) -> list[int] | None:
        if node == _LEAF:
            return self._take_place(before)
        distances = self._half_norms[node] - self._centroids[node] @ vector
        distances = np.where(self._below[node] == _ABSENT, np.inf, distances)
        for cluster in np.argsort(distances, kind="stable").tolist():
            below = int(self._below[node, cluster])
            token = self._first + len(before) * self._branching + cluster
            if below != _ABSENT and (row := self._take(vector, below, (*before, token))):
                return row
        return None

    def _take_place(self, before: tuple[int, ...]) -> list[int] | None:
        if before not in self._taken:
            low, high = 0, len(self._tokens)
            for level, token in enumerate(before):
                among = self._tokens[low:high, level]
                low, high = low + np.searchsorted(among, [token, token + 1])
            taken = np.zeros(self.places, bool)
            taken[self._tokens[low:high, len(before)] - self._first_place] = True
            self._taken[before] = taken
        taken = self._taken[before]
        if taken.all():
            return None
        place = int((~taken).argmax())
        taken[place] = True
        return [*before, self._first_place + place] + [EOS_ID] * self._closed
