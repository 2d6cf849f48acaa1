"""The trie on the device: one step of constrained decoding.

A state is a node and its depth.  Complete rows and dead beams are negative nodes: -1 is dead,
-2 - n is the row that ends in node n.

What a step costs follows the widest node that a live beam stands on, not the widest of the level:
only tails, nodes of at most `narrow` children, of at most `middle`, and bitmaps over the token
range are four branches of one lax.switch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dgr_jax.decoding.constraint import Candidates, top_k
from dgr_jax.decoding.trie_build import Layout

if TYPE_CHECKING:
    from dgr_jax.decoding.trie import Arrays

_DEAD = -1


class TrieState(NamedTuple):
    """node int32 [N], depth int32 [N]: tokens written so far, the same for all live beams."""

    node: jax.Array
    depth: jax.Array


class _Step(NamedTuple):
    """What the branches of a step read, leading axes [N] (scores: [N, V], level: scalar)."""

    scores: jax.Array
    log_z: jax.Array
    node: jax.Array
    internal: jax.Array
    inner_id: jax.Array
    first: jax.Array
    count: jax.Array
    tail_token: jax.Array
    is_tail: jax.Array
    level: jax.Array


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrieConstraint:
    """A trie as a pytree of device arrays (see trie.Arrays) and hashable static metadata."""

    edge_tokens: jax.Array
    directory: jax.Array
    first_child: jax.Array
    tails: jax.Array
    tail_start: jax.Array
    row_length: jax.Array
    wide: jax.Array
    bitmaps: jax.Array
    base: jax.Array
    bitmap_low: jax.Array
    level_start: jax.Array
    tail_bias: jax.Array
    ends_at: jax.Array
    layout: Layout = _static()
    vocab_class: int = _static()
    renormalise: bool = _static()

    @classmethod
    def put(
        cls, arrays: Arrays, layout: Layout, vocab_size: int, renormalise: bool
    ) -> TrieConstraint:
        """The (padded) arrays on the default device."""
        device = {name: jnp.asarray(array) for name, array in arrays.items()}
        return cls(**device, layout=layout, vocab_class=vocab_size, renormalise=renormalise)

    @property
    def max_length(self) -> int:
        return self.layout.max_length

    @property
    def nbytes(self) -> int:
        """Bytes on the device, padding included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def init(self, batch_size: int) -> TrieState:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return TrieState(zeros, zeros)

    def rows(self, state: TrieState) -> jax.Array:
        node = -2 - state.node
        _, internal_before = self._rank(jnp.maximum(node, 0))
        return jnp.where(node >= 0, node - internal_before, -1)

    def expand(
        self,
        state: TrieState,
        log_probs: jax.Array,
        *,
        width: int,
        log_z: jax.Array | None = None,
    ) -> Candidates:
        """See Constraint.expand.  C = max(width, layout.narrow)."""
        if log_probs.shape[-1] < self.vocab_class:
            raise ValueError(
                f"trie: log_probs over {log_probs.shape[-1]} tokens; the index was built for a "
                f"vocabulary of {self.vocab_class}: set trie.build.vocab_size"
            )
        step = self._prepare(state, log_probs, log_z)
        widest = jnp.max(step.count)
        limits = [0, self.layout.narrow, self.layout.middle]
        branches = [self._only_tails, self._narrow, self._middle, self._wide]
        if self.layout.middle == self.layout.narrow:
            limits.pop()
            branches.pop(2)
        if self.bitmaps.shape[0] == 0:
            limits.pop()
            branches.pop()
        which = sum((widest > limit).astype(jnp.int32) for limit in limits)
        found = lax.switch(which, [_fixed_width(f, width, self.layout) for f in branches], step)
        return self._finish(state, found)

    def _rank(self, node):
        """(is the node internal, internal nodes before it); int32."""
        entry = self.directory.at[node >> 5].get(mode="clip")
        bit = (node & 31).astype(jnp.uint32)
        below = entry[..., 0] & ((jnp.uint32(1) << bit) - jnp.uint32(1))
        before = entry[..., 1] + lax.population_count(below)
        return ((entry[..., 0] >> bit) & 1) > 0, before.astype(jnp.int32)

    def _prepare(self, state, scores, log_z):
        node, live = jnp.maximum(state.node, 0), state.node >= 0
        level = jnp.max(state.depth)
        internal, before = self._rank(node)
        internal &= live
        first = self.first_child.at[before].get(mode="clip")
        count = self.first_child.at[before + 1].get(mode="clip") - first
        row = node - before
        if self.layout.ends == "fixed":
            depth = (node[..., None] >= self.level_start[1:]).sum(-1)
            start = self.tail_bias[depth] + row * (self.layout.max_length - depth)
        else:
            start = self.tail_start.at[row].get(mode="clip")
        token = self.tails.at[start + level].get(mode="clip").astype(jnp.int32) + self.base[level]
        return _Step(
            scores=scores,
            log_z=jnp.zeros(node.shape, jnp.float32) if log_z is None else log_z,
            node=node,
            internal=internal,
            inner_id=before,
            first=first,
            count=jnp.where(internal, count, 0),
            tail_token=token,
            is_tail=live & ~internal,
            level=level,
        )

    def _finish(self, state, found):
        tokens, log_probs, child = found
        valid = log_probs > -jnp.inf
        depth = state.depth[..., None] + 1
        if self.layout.ends == "fixed":
            complete = jnp.broadcast_to(depth >= self.ends_at, tokens.shape)
        elif self.layout.ends == "token":
            complete = tokens == self.ends_at
        else:
            internal, before = self._rank(child)
            length = self.row_length.at[child - before].get(mode="clip")
            complete = ~internal & (length.astype(jnp.int32) == depth)
        complete &= valid
        node = jnp.where(valid, jnp.where(complete, -2 - child, child), _DEAD)
        depth = jnp.where(valid, depth, -1)
        return Candidates(jnp.where(valid, tokens, 0), log_probs, TrieState(node, depth), complete)

    def _only_tails(self, step, width):
        tokens, valid = step.tail_token[..., None], step.is_tail[..., None]
        return tokens, self._score(step, tokens, valid), step.node[..., None]

    def _narrow(self, step, width):
        return self._gather(step, self.layout.narrow)

    def _middle(self, step, width):
        return _best(self._gather(step, self.layout.middle), width)

    def _gather(self, step, children):
        """All children of nodes of at most `children`; a tail has its token in slot 0."""
        slot = jnp.arange(children, dtype=jnp.int32)
        child = step.first[..., None] + slot
        tokens = self.edge_tokens.at[child].get(mode="clip").astype(jnp.int32)
        tail = step.is_tail[..., None]
        tokens = jnp.where(tail, step.tail_token[..., None], tokens + self.base[step.level])
        valid = slot < jnp.where(tail, 1, step.count[..., None])
        child = jnp.where(tail, step.node[..., None], child)
        return tokens, self._score(step, tokens, valid), child

    def _score(self, step, tokens, valid):
        """f32 log-probabilities of `tokens`, -inf where not valid."""
        scores = jnp.take_along_axis(step.scores, tokens, -1, mode="clip").astype(jnp.float32)
        scores = jnp.where(valid, scores, -jnp.inf)
        return scores - self._normaliser(step, scores)[..., None]

    def _normaliser(self, step, scores):
        if not self.renormalise:
            return step.log_z
        log_z = jax.nn.logsumexp(scores, -1)
        return jnp.where(log_z > -jnp.inf, log_z, 0.0)

    def _wide(self, step, width):
        """Bitmaps for the nodes that own one, a gather for the others."""
        others = _best(self._gather(step, self.layout.middle), width)
        low = self.bitmap_low[step.level]
        span, size = 32 * self.layout.bitmap_words, step.scores.shape[-1]
        scores = step.scores
        if span < size:
            scores = lax.dynamic_slice_in_dim(scores, low, span, axis=-1)
        bits = self.bitmaps.at[jnp.searchsorted(self.wide, step.inner_id)].get(mode="clip")
        lanes = (bits[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        legal = lanes.reshape(*bits.shape[:-1], span)[..., : scores.shape[-1]] > 0
        scores = jnp.where(legal, scores.astype(jnp.float32), -jnp.inf)
        log_z = self._normaliser(step, scores)
        best, place = top_k(scores, min(width, scores.shape[-1]))
        tokens = place.astype(jnp.int32) + low
        child = self._child_of(step, tokens)
        is_wide = (step.count > self.layout.middle)[..., None]
        found = _widen((tokens, best - log_z[..., None], child), others[0].shape[-1])
        return tuple(jnp.where(is_wide, a, b) for a, b in zip(found, others, strict=True))

    def _child_of(self, step, tokens):
        """The child reached by each token, by binary search among the sorted edges of the node."""
        wanted = tokens - self.base[step.level]
        low = jnp.broadcast_to(step.first[..., None], tokens.shape)
        left = jnp.broadcast_to(step.count[..., None], tokens.shape)
        for _ in range((32 * self.layout.bitmap_words).bit_length()):
            half = left // 2
            edge = self.edge_tokens.at[low + half].get(mode="clip").astype(jnp.int32)
            right = (edge < wanted) & (left > 0)
            low = jnp.where(right, low + half + 1, low)
            left = jnp.where(right, left - half - 1, half)
        return low


def _best(found, width):
    """The `width` most likely of each state, unless there are no more anyway."""
    tokens, log_probs, child = found
    if tokens.shape[-1] <= width:
        return found
    best, place = top_k(log_probs, width)
    pick = lambda x: jnp.take_along_axis(x, place, -1)  # noqa: E731
    return pick(tokens), best, pick(child)


def _widen(found, slots):
    """Illegal slots added up to `slots`."""
    tokens, log_probs, child = found
    lead = [(0, 0)] * (tokens.ndim - 1)
    pad = [*lead, (0, slots - tokens.shape[-1])]
    return jnp.pad(tokens, pad), jnp.pad(log_probs, pad, constant_values=-jnp.inf), jnp.pad(child, pad)


def _fixed_width(branch, width, layout):
    """`branch` with its answer widened to the slots that all branches of a step share."""
    return lambda step: _widen(branch(step, width), max(width, layout.narrow))
