"""Continuations of the live beams of a trie: their best, in order, side by side.

Axis letters: B queries, M beams, C continuations of a query, S slots of a beam.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dgr_jax.decoding.selection import masked_top_k, top_k


class Continuations(NamedTuple):
    """What beams may continue with, [B, C]: log_prob -inf where there is nothing."""

    parent: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    child: jax.Array

    def split(self, at: int) -> tuple[Continuations, Continuations]:
        """The first ones, and the others."""
        return Continuations(*(x[:, :at] for x in self)), Continuations(*(x[:, at:] for x in self))

    def where(self, valid: jax.Array) -> Continuations:
        """The same, in which those that are not valid, bool [B, C], are nothing."""
        return self._replace(log_probs=jnp.where(valid, self.log_probs, -jnp.inf))


def best_of_bits(scores, bits, prior, low, width, child_of):
    """The best continuations by the tokens whose bit is set; bit 0 stands for token `low`."""
    span = scores.shape[-1]
    best, place = masked_top_k(scores, bits, prior, min(width, span * bits.shape[1]))
    parent, place = place // span, place % span
    return _padded(Continuations(parent, place + low, best, child_of(parent, place)), width)


def best_of(totals, tokens, child, width):
    """The `width` best of [B, M, S]."""
    batch, slots = totals.shape[0], totals.shape[-1]
    best, place = top_k(totals.reshape(batch, -1), min(width, totals[0].size))
    tokens, child = (jnp.take_along_axis(x.reshape(batch, -1), place, -1) for x in (tokens, child))
    return _padded(Continuations(place // slots, tokens, best, child), width)


def in_order(offers, width):
    """The `width` best, equal ones ordered by parent, then token."""
    index = jnp.broadcast_to(jnp.arange(offers.tokens.shape[-1]), offers.tokens.shape)
    _, _, _, index = lax.sort((-offers.log_probs, offers.parent, offers.tokens, index), num_keys=3)
    return Continuations(*(jnp.take_along_axis(x, index[..., :width], -1) for x in offers))


def joined(a, b):
    """Both, side by side."""
    return Continuations(*(jnp.concatenate(pair, -1) for pair in zip(a, b, strict=True)))


def _padded(offers, width):
    """Slots that hold nothing added up to `width`."""
    pad = [(0, 0), (0, width - offers.tokens.shape[-1])]
    parent, tokens, child = (jnp.pad(x, pad) for x in (offers.parent, offers.tokens, offers.child))
    return Continuations(
        parent, tokens, jnp.pad(offers.log_probs, pad, constant_values=-jnp.inf), child
    )
