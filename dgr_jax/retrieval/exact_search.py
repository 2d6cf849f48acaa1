"""The best passages by inner product, exactly: every query against every vector, on the device.

Axis letters: B queries, d width, P passages, k passages wanted, R rows of a block, n devices.

A block of vectors is divided over all devices of the mesh. Each device multiplies its rows with the
queries, a chunk at a time, and keeps a running top k. The devices' lists are merged at the end; all
of this is one compiled step. Vectors that fit stay on the devices. Others, such as a memory-mapped
file of any size, pass through in blocks: while one is searched, the next is read and sent.

Among equal scores the lower passage index comes first. That holds at every step, as passages are
compared in their order, or a sorted list of earlier passages is put before one of later ones.

The numbers that are multiplied, by the setting `storage`:

    float32   queries and vectors as they are, in full float32 on every device
    bfloat16  both rounded to bfloat16, with sums in float32
    int8      a vector v as round(127 * v / m) * (m / 127), m = max |v|; queries as for bfloat16
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax import partitioning, ranges
from dgr_jax.decoding.selection import check_k
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.batching import Found
from dgr_jax.settings import without_effect

logger = logging.getLogger(__name__)

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_FEW = 2048  # rows with at most this many scores are sorted as they are
_GROUP = 64  # the longest group of neighbours; the size of a chunk is a multiple of it
_ROWS = PartitionSpec(partitioning.AXES)  # divided over all devices, whatever axes they form
_WHOLE = PartitionSpec()


@dataclass(frozen=True)
class ExactSearch:
    """Settings of exact search.

    storage: 'float32', 'bfloat16' or 'int8'; see the module.
    batch_size: how many queries are searched together; fewer are padded to a power of two.
    chunk, max_scores: the most vectors, and the most scores, that a device computes at once.
    max_device_bytes: vectors that would take more bytes of a device are streamed, in blocks of half
      this size.
    """

    storage: str = "float32"
    batch_size: int = without_effect(256)
    chunk: int = without_effect(1 << 20)
    max_scores: int = without_effect(1 << 24)
    max_device_bytes: int = without_effect(8 << 30)

    def __post_init__(self) -> None:
        counts = ("batch_size", "chunk", "max_scores", "max_device_bytes")
        count = dict.fromkeys(counts, ranges.at_least(1))
        ranges.check(self, storage=ranges.one_of(*BYTES), **count)

    def row_bytes(self, dim: int) -> int:
        """Bytes of a stored vector, with its scale."""
        return dim * BYTES[self.storage] + 4 * (self.storage == "int8")


@dataclass(frozen=True)
class BlockPlan:
    """How vectors are divided over blocks, devices and chunks.

    blocks: number of parts of the corpus.
    rows: how many rows of a block each device holds.
    chunks: into how many equal parts these rows are cut for a whole batch of queries, a power of
      two.
    device_bytes: bytes that vectors take on a device, those of two blocks where they are streamed.
    """

    blocks: int
    rows: int
    chunks: int
    device_bytes: int

    @classmethod
    def of(cls, passages: int, dim: int, settings: ExactSearch, devices: int) -> BlockPlan:
        row_bytes = settings.row_bytes(dim)
        blocks, rows = 1, -(-passages // devices)
        if rows * row_bytes > settings.max_device_bytes:
            most = max(1, settings.max_device_bytes // 2 // row_bytes)
            blocks = -(-rows // most)
            rows = -(-rows // blocks)
        chunks = _chunks(rows, settings, settings.batch_size)
        rows = chunks * _GROUP * -(-rows // (chunks * _GROUP))
        return cls(blocks, rows, chunks, min(blocks, 2) * rows * row_bytes)


def _chunks(rows: int, settings: ExactSearch, batch_size: int) -> int:
    """Into how many parts `rows` are cut for a batch of queries, a power of two."""
    most = min(settings.chunk, max(_GROUP, settings.max_scores // batch_size))
    return _power_of_two(-(-rows // most))


def _power_of_two(least: int) -> int:
    """The lowest power of two that is at least `least`."""
    return 1 << (least - 1).bit_length()


Leaf = TypeVar("Leaf")  # an array, or what stands for it: its shape, its sharding


class Block(NamedTuple, Generic[Leaf]):
    """Rows of the corpus on the devices, the last padded.

    vectors [R, d] as they are stored; scales f32 [R] of int8, else None; visible bool [R]: rows
    that may be found, which padding may not; first int32 []: passage index of row 0.
    """

    vectors: Leaf
    scales: Leaf | None
    visible: Leaf
    first: Leaf


def open_vectors(path: str | Path) -> np.ndarray:
    """A .npy file with f32 or f16 [P, d], memory-mapped; ValueError for any other array."""
    with kept.reading(path) as file:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    _check_vectors(vectors, str(path))
    return vectors


class Index:
    """Passage vectors, ready to be searched.

    Args:
      vectors: f32 or f16 [P, d], in memory or memory-mapped, finite. They are read once, or once
        for each search where they are streamed. With several processes, each reads the rows of its
        devices.
      mesh: vectors are divided over all its devices; None takes one device.
      hidden: rows that are never found, ascending.
      capacity: vectors for which the devices have room; an index of more is not compiled again.

    Raises ValueError for vectors of another dtype or shape, and for too many to count in int32.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        settings: ExactSearch = ExactSearch(),
        mesh: jax.sharding.Mesh | None = None,
        hidden: Sequence[int] | np.ndarray = (),
        capacity: int = 0,
    ) -> None:
        _check_vectors(vectors, "vectors")
        self.visible = np.ones(len(vectors), bool)
        self.visible[np.asarray(hidden, np.int64)] = False
        self.settings = settings
        self.mesh = partitioning.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        self.num_passages, self.dim = vectors.shape
        self.plan = BlockPlan.of(max(capacity, len(vectors)), self.dim, settings, self.mesh.size)
        self._vectors: Any = vectors
        self._resident: Block | None = None
        if self.plan.blocks == 1:
            self._resident, self._vectors = self._block(0), None
        else:
            logger.info(
                "%d vectors of %d are streamed in %d blocks; ExactSearch.max_device_bytes=%d",
                *(self.num_passages, self.dim, self.plan.blocks, settings.max_device_bytes),
            )

    def restrict(self, mask: np.ndarray) -> Index:
        """The index that finds only some of the rows that this one finds, bool [P]; the vectors
        stay where they are, and nothing is compiled again."""
        index = copy.copy(self)
        index.visible = self.visible & mask
        if self._resident is not None:
            padding = self.plan.rows * self.mesh.size - self.num_passages
            visible = np.pad(index.visible, (0, padding))
            placed = partitioning.place(visible, NamedSharding(self.mesh, _ROWS))
            index._resident = self._resident._replace(visible=placed)
        return index

    def search(self, queries: np.ndarray, k: int) -> Found:
        """f32 [n, d] -> passage index int32 and score f32 [n, k], best first, ties by index.

        Where there are fewer passages than k, the remaining places hold -1 and -inf.
        Raises ValueError for queries of another width, or k below 1.
        """
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"queries: got shape {list(queries.shape)}, expected [n, {self.dim}], the width "
                "of the passage vectors"
            )
        check_k(k)
        passages = np.full((len(queries), k), -1, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        filled = min(k, self.num_passages)
        size = min(self.settings.batch_size, _power_of_two(len(queries)))
        starts = range(0, len(queries), size)
        for start, best in zip(starts, self._best(queries, starts, size, filled), strict=True):
            rows = slice(start, min(start + size, len(queries)))
            for whole, part in zip((scores, passages), best, strict=True):
                whole[rows, :filled] = np.asarray(part)[: rows.stop - start]
        return passages, scores

    def _best(self, queries: np.ndarray, starts: range, size: int, k: int) -> list[Any]:
        """Scores and passage indices [size, k] of each batch of queries, on the devices."""
        chunks = min(self.plan.chunks, _chunks(self.plan.rows, self.settings, size))
        step = _step(self.mesh, self.settings.storage, chunks, k)
        nothing = np.full((size, k), -np.inf, np.float32), np.full((size, k), -1, np.int32)
        best = [jax.device_put(nothing, partitioning.replicated(self.mesh)) for _ in starts]
        for block in self._blocks():
            jax.block_until_ready(best)  # ends the block before, so that devices hold only two
            for batch, start in enumerate(starts):
                rows = queries[start : start + size]
                padded = np.pad(rows, [(0, size - len(rows)), (0, 0)])
                best[batch] = step(block, padded, *best[batch])
        return best

    def _blocks(self) -> Iterator[Block]:
        if self._resident is not None:
            yield self._resident
        else:
            yield from map(self._block, range(self.plan.blocks))

    def _block(self, place: int) -> Block:
        """Reads rows and sends them to the devices that hold them."""
        size = self.plan.rows * self.mesh.size
        first = min(place * size, self.num_passages)
        sharding = NamedSharding(self.mesh, _ROWS)
        places: Mapping[jax.Device, Any] = sharding.addressable_devices_indices_map(
            (size, self.dim)
        )
        parts = []
        for device, (rows, _) in places.items():
            start, stop, _ = rows.indices(size)
            held = self._vectors[first + start : min(first + stop, self.num_passages)]
            stored, scales = _stored(np.asarray(held, np.float32), self.settings.storage)
            padding = [(0, stop - start - len(held))]
            seen = np.pad(self.visible[first + start : first + start + len(held)], padding)
            both = [np.pad(stored, [*padding, (0, 0)]), np.pad(scales, padding), seen]
            parts.append([jax.device_put(part, device) for part in both])
        make = jax.make_array_from_single_device_arrays
        vectors, scales, visible = (list(part) for part in zip(*parts, strict=True))
        return Block(
            make((size, self.dim), sharding, vectors),
            make((size,), sharding, scales) if self.settings.storage == "int8" else None,
            make((size,), sharding, visible),
            np.int32(first),
        )


def _check_vectors(vectors: np.ndarray, where: str) -> None:
    if vectors.ndim != 2 or vectors.dtype not in (np.float32, np.float16) or not vectors.size:
        raise ValueError(
            f"{where}: got {vectors.dtype} {list(vectors.shape)}, expected float32 or float16 "
            "[P, d], P and d above 0"
        )
    if len(vectors) >= 2**31:
        raise ValueError(f"{where}: got {len(vectors):,} rows, expected less than 2^31")


def _stored(vectors: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """f32 [R, d] -> (the vectors as they are stored, their scales f32 [R])."""
    ones = np.ones(len(vectors), np.float32)
    if storage == "float32":
        return vectors, ones
    if storage == "bfloat16":
        return vectors.astype(ml_dtypes.bfloat16), ones
    highest = np.abs(vectors).max(axis=1, initial=0.0)
    highest = np.where(highest > 0, highest, 1.0).astype(np.float32)
    stored = np.rint(vectors * (127.0 / highest)[:, None]).astype(np.int8)
    return stored, (highest / 127.0).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _step(mesh: jax.sharding.Mesh, storage: str, chunks: int, k: int) -> Any:
    """The compiled step (block, queries f32 [B, d], scores f32 [B, k], passages int32 [B, k]) ->
    (scores, passages) of the k best after the block is searched too."""
    # Products of bfloat16 numbers are exact in float32, which CPUs multiply faster.
    cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = jnp.float32 if cpu or storage == "float32" else jnp.bfloat16

    def on_device(block: Block, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = block.vectors.shape[0] // chunks
        start = jax.lax.axis_index(partitioning.AXES) * rows * chunks

        def add(best: Any, chunk: Any) -> tuple[Any, None]:
            chunk_index, vectors, scales, visible = chunk
            scores = _products(queries, vectors, scales, dtype)
            place = start + chunk_index * rows
            scores, places = _top(scores, min(k, rows), visible)
            return _merge(best, (scores, block.first + place + places)), None

        cut = lambda x: x.reshape(chunks, rows, *x.shape[1:])
        parts = (jnp.arange(chunks), *jax.tree.map(cut, block[:3]))
        size = queries.shape[0]
        none = jnp.full((size, k), -jnp.inf), jnp.full((size, k), -1, jnp.int32)
        best, _ = jax.lax.scan(add, none, parts)
        return jax.tree.map(lambda x: x[:, None], best)

    # Lists of the devices side by side, [B, n, k].
    searched = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(Block(_ROWS, _ROWS, _ROWS, _WHOLE), _WHOLE),
        out_specs=PartitionSpec(None, partitioning.AXES),
        check_vma=False,
    )

    def step(block: Block, queries: jax.Array, *best: jax.Array) -> tuple[jax.Array, jax.Array]:
        if storage != "float32":
            queries = queries.astype(jnp.bfloat16)
        best_of_devices = searched(block, queries.astype(dtype))
        best_of_devices = jax.tree.map(lambda x: x.reshape(x.shape[0], -1), best_of_devices)
        scores, passages = _merge(best, best_of_devices)
        return scores, jnp.where(scores > -jnp.inf, passages, -1)

    return jax.jit(step, out_shardings=partitioning.replicated(mesh))


def abstract_step(
    mesh: jax.sharding.Mesh, settings: ExactSearch, passages: int, dim: int, k: int
) -> tuple[Any, tuple[Any, ...]]:
    """The compiled step for a whole batch of queries, and its arguments as shapes without data."""
    plan = BlockPlan.of(passages, dim, settings, mesh.size)
    array = lambda shape, dtype, spec=_WHOLE: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    rows, size = plan.rows * mesh.size, settings.batch_size
    block = Block(
        array((rows, dim), jnp.dtype(settings.storage), _ROWS),
        array((rows,), np.float32, _ROWS) if settings.storage == "int8" else None,
        array((rows,), np.bool_, _ROWS),
        array((), np.int32),
    )
    queries = array((size, dim), np.float32)
    best = array((size, k), np.float32), array((size, k), np.int32)
    return _step(mesh, settings.storage, plan.chunks, k), (block, queries, *best)


def _products(queries: jax.Array, vectors: jax.Array, scales: Any, dtype: Any) -> jax.Array:
    """[B, d] and [c, d] -> f32 [B, c]"""
    scores = jnp.einsum(
        "bd,cd->bc",
        queries,
        vectors.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return scores if scales is None else scores * scales


def _merge(best: Any, more: Any) -> tuple[jax.Array, jax.Array]:
    """The top k of two sorted lists of (scores, passages), [B, k] and [B, m]; among equal scores,
    those of the first list come first."""
    scores, passages = (jnp.concatenate(pair, 1) for pair in zip(best, more, strict=True))
    scores, places = jax.lax.top_k(scores, best[0].shape[1])
    return scores, jnp.take_along_axis(passages, places, 1)


def _top(scores: jax.Array, k: int, visible: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The k best of each row [c], and their places; those not visible, bool [c], count as -inf.
    None: all are.

    As lax.top_k: of equal ones, the lower place. The k best lie in those k groups of neighbours
    whose best is highest: a maximum over each group, which costs little, leaves few to be sorted.
    A group that ties with the last of these is behind k scores that are as good and stand before
    it. The scores as they are stay in the reach of one reduction and one gather: what is visible is
    asked in each, as an array of masked scores would cost as much as half of the products.
    """
    size = scores.shape[1]
    seen = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
    group = math.gcd(size, min(_GROUP, 1 << int(math.log2(max(1.0, math.sqrt(size / k))))))
    if size <= _FEW or group == 1:
        return jax.lax.top_k(seen, k)
    best = jnp.max(seen.reshape(scores.shape[0], -1, group), -1)
    _, chosen = _top(best, k, None)
    chosen = jnp.sort(chosen, axis=-1)  # what follows is in the order of places again
    near = jnp.take_along_axis(scores.reshape(*best.shape, group), chosen[..., None], 1)
    places = chosen[..., None] * group + jnp.arange(group)
    if visible is not None:
        near = jnp.where(visible[places], near, -jnp.inf)
    near = near.reshape(scores.shape[0], -1)
    best, place = _top(near, k, None)
    return best, jnp.take_along_axis(places.reshape(near.shape), place, 1)
