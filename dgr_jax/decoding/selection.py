"""The k largest of long rows: exact, ties to the smaller index, without sorting the rows.

Both functions keep the maximum of each block of entries, look only into the blocks with the
largest maxima, and so read the row once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_SHORT = 1024  # below this lax.top_k is as fast


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """lax.top_k along the last axis: [..., n] -> [..., k], int32 [..., k].

    Blocks are contiguous, so of equal maxima the earlier block also holds the smaller indices:
    the k best values lie in the k best blocks.
    """
    n = values.shape[-1]
    block = 1 << max(0, (n // max(k, 1)).bit_length() // 2)
    if n < _SHORT or 4 * k * block > n:
        return lax.top_k(values, k)
    blocks = -(-n // block)
    lead = [(0, 0)] * (values.ndim - 1)
    padded = jnp.pad(values, [*lead, (0, blocks * block - n)], constant_values=-jnp.inf)
    maxima = padded.reshape(*values.shape[:-1], blocks, block).max(-1)
    _, best = lax.top_k(maxima, k)
    index = jnp.sort(best, -1)[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    index = index.reshape(*best.shape[:-1], -1)
    found, place = lax.top_k(jnp.take_along_axis(padded, index, -1), k)
    return found, jnp.take_along_axis(index, place, -1)


def masked_top_k(values: jax.Array, bits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest among the entries whose bit is set; -inf where there are fewer.

    values: [..., 32 * W]; bits uint32 [..., W]: bit p of word w stands for entry p * W + w, so
    that a plane of 32 blocks-at-a-time is contiguous in memory.  [...] -> [..., k], int32 [..., k].

    A block is the 32 entries of a word.  More blocks than k are looked into; when the last of
    them might tie with the k-th value, the row is searched in full.
    """
    words = bits.shape[-1]
    opened = k + max(4, k // 4)
    planes = values.reshape(*values.shape[:-1], 32, words)
    if words < 4 * opened:
        return lax.top_k(mask(planes, bits).reshape(values.shape), min(k, 32 * words))
    maxima = jnp.full(bits.shape, -jnp.inf, values.dtype)
    for p in range(32):
        maxima = jnp.maximum(maxima, jnp.where((bits >> p) & 1 > 0, planes[..., p, :], -jnp.inf))
    tops, blocks = top_k(maxima, opened)
    blocks = jnp.sort(blocks, -1)
    inside = jnp.take_along_axis(planes, blocks[..., None, :], -1)
    inside = mask(inside, jnp.take_along_axis(bits, blocks, -1))
    index = jnp.arange(32, dtype=jnp.int32)[:, None] * words + blocks[..., None, :]
    flat = (*values.shape[:-1], 32 * opened)
    found, place = lax.top_k(inside.reshape(flat), k)
    last = tops.min(-1)  # a slice of the sorted tops would make XLA sort the whole rows
    certain = (found.min(-1) > last) | (last == -jnp.inf)
    return lax.cond(
        certain.all(),
        lambda: (found, jnp.take_along_axis(index.reshape(flat), place, -1)),
        lambda: top_k(mask(planes, bits).reshape(values.shape), k),
    )


def mask(planes: jax.Array, bits: jax.Array) -> jax.Array:
    """[..., 32, W] with -inf where the bit of the word is not set."""
    plane = jnp.arange(32, dtype=jnp.uint32)[:, None]
    return jnp.where((bits[..., None, :] >> plane) & 1 > 0, planes, -jnp.inf)
