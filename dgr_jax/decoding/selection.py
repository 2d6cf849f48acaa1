"""The k best of many scores: exact, ties to the smaller index, without sorting long rows.

Each function computes the maximum of every block of entries and then searches only the blocks with
the largest maxima, so that the scores are read once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MOST_ENTRIES = (1 << 31) - (1 << 16)  # places are int32, and a padded block needs some of them

_SHORT = 1024  # lax.top_k is used for shorter rows than this,
_FEW = 1 << 14  # and for fewer entries than this altogether, as it is as fast


def check_k(k: int) -> None:
    """Raises ValueError for a k that is below 1 or no whole number."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise ValueError(f"k: got {k!r}, expected a whole number")
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """lax.top_k along the last axis: [..., n] -> [..., k], int32 [..., k].

    Raises ValueError for rows longer than MOST_ENTRIES; the other two functions do so for the rows
    of a query together. Blocks are contiguous, so that among equal maxima the earlier block also
    holds the smaller indices, and the k best values lie in the k best blocks.
    """
    n = values.shape[-1]
    _check_entries(1, n)
    block = 1 << max(0, (n // max(k, 1)).bit_length() // 2)
    if n < _SHORT or values.size < _FEW or 4 * k * block > n:
        return tuple(lax.top_k(values, k))
    blocks = -(-n // block)
    lead = [(0, 0)] * (values.ndim - 1)
    padded = jnp.pad(values, [*lead, (0, blocks * block - n)], constant_values=-jnp.inf)
    maxima = padded.reshape(*values.shape[:-1], blocks, block).max(-1)
    _, best = top_k(maxima, k)
    index = jnp.sort(best, -1)[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    index = index.reshape(*best.shape[:-1], -1)
    largest, place = lax.top_k(jnp.take_along_axis(padded, index, -1), k)
    return largest, jnp.take_along_axis(index, place, -1)


def joint_top_k(values: jax.Array, prior: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of values + prior over all rows of a query, without an array of the sums.

    values: [B, M, n], any float dtype; prior f32 [B, M].
    Returns f32 [B, k] and int32 [B, k], places among the M * n entries.
    """
    batch, beams, n = values.shape
    _check_entries(beams, n)
    block = min(128, n & -n)
    if block < 8 or beams * n < 4 * k * block:
        return top_k((values.astype(jnp.float32) + prior[..., None]).reshape(batch, -1), k)
    blocks = values.reshape(batch, beams, -1, block)
    maxima = blocks.max(-1).astype(jnp.float32) + prior[..., None]
    _, best = top_k(maxima.reshape(batch, -1), k)
    best = jnp.sort(best, -1)
    row, query = best // (n // block), jnp.arange(batch)[:, None]
    inside = blocks[query, row, best % (n // block)].astype(jnp.float32)
    inside += prior[query, row][..., None]
    index = best[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    largest, place = lax.top_k(inside.reshape(batch, -1), k)
    return largest, jnp.take_along_axis(index.reshape(batch, -1), place, -1)


def masked_top_k(
    values: jax.Array, bits: jax.Array, prior: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k largest of values + prior over all rows of a query, among entries whose bit is set.

    values: [B, M, 32 * W], any float dtype; prior f32 [B, M]; bits uint32 [B, M, W]: bit p of
    word w stands for entry p * W + w, so that a plane of W entries is contiguous in memory.
    Returns f32 [B, k], -inf where there are fewer, and int32 [B, k], places among the M * 32 * W
    entries.

    A block is the 32 entries of a word. A few more blocks and entries than k are searched; where
    even the last of these ties with the k-th, all entries are searched.
    """
    batch, beams, words = bits.shape
    _check_entries(beams, 32 * words)
    spare = max(4, k // 4)
    planes = values.reshape(batch, beams, 32, words)

    def search_all():
        totals = mask(planes, bits).astype(jnp.float32) + prior[..., None, None]
        return top_k(totals.reshape(batch, -1), k)

    if beams * words < 2 * (k + spare):
        return search_all()
    maxima = lax.platform_dependent(planes, bits, cpu=_maxima_plane_by_plane, default=_maxima)
    maxima = maxima.astype(jnp.float32) + prior[..., None]
    tops, block = top_k(maxima.reshape(batch, -1), k + spare)
    row, word = block // words, block % words
    query = jnp.arange(batch)[:, None]
    inside = mask(planes[query, row, :, word][..., None], bits[query, row, word][..., None])
    inside = inside[..., 0].astype(jnp.float32) + prior[query, row][..., None]
    place = (row * 32)[..., None] + jnp.arange(32, dtype=jnp.int32)
    place = (place * words + word[..., None]).reshape(batch, -1)
    largest, at = lax.top_k(inside.reshape(batch, -1), k + spare)
    place = jnp.take_along_axis(place, at, -1)
    negated, place = lax.sort((-largest, place), num_keys=2)
    kth = -negated[:, k - 1]
    certain = (largest.min(-1) < kth) & (tops.min(-1) < kth) | (kth == -jnp.inf)
    return lax.cond(certain.all(), lambda: (-negated[:, :k], place[:, :k]), search_all)


def _check_entries(rows: int, size: int) -> None:
    if rows * size > MOST_ENTRIES:
        raise ValueError(
            f"the best of {rows:,} x {size:,} scores a query (beams x tokens that may be legal): "
            f"got {rows * size:,}, expected at most {MOST_ENTRIES:,}, as places are int32; set a "
            "smaller num_beams, or identifiers of more and smaller codes"
        )


def mask(planes: jax.Array, bits: jax.Array) -> jax.Array:
    """[..., 32, W] with -inf where the bit of the word is not set."""
    plane = jnp.arange(32, dtype=jnp.uint32)[:, None]
    return jnp.where((bits[..., None, :] >> plane) & 1 > 0, planes, -jnp.inf)


def _maxima(planes, bits):
    """[..., 32, W] -> [..., W]: the largest entry of each word whose bit is set."""
    return mask(planes, bits).max(-2)


def _maxima_plane_by_plane(planes, bits):
    """As `_maxima`, but four planes at a time, which CPUs can vectorise."""

    def add(i, maxima):
        for p in range(4):
            plane = lax.dynamic_index_in_dim(planes, 4 * i + p, -2, keepdims=False)
            legal = (bits >> (4 * i + p).astype(jnp.uint32)) & 1 > 0
            maxima = jnp.maximum(maxima, jnp.where(legal, plane, -jnp.inf))
        return maxima

    return lax.fori_loop(0, 8, add, jnp.full(bits.shape, -jnp.inf, planes.dtype))
