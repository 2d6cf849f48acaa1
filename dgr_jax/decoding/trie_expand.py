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

from dgr_jax.decoding.constraint import Candidates
from dgr_jax.decoding.selection import mask, masked_top_k, top_k
from dgr_jax.decoding.trie_build import Layout

if TYPE_CHECKING:
    from dgr_jax.decoding.trie import Arrays

_DEAD = -1


class TrieState(NamedTuple):
    """node int32 [N], depth int32 [N]: tokens written so far, the same for all live beams."""

    node: jax.Array
    depth: jax.Array


class _Step(NamedTuple):
    """What the branches of a step read: scores [N, V], log_z f32 [N], level int32 [], and of each
    node [N]: its internal id, first child, children (0 unless internal), token if it is a tail."""

    scores: jax.Array
    log_z: jax.Array
    level: jax.Array
    node: jax.Array
    inner_id: jax.Array
    first: jax.Array
    count: jax.Array
    is_tail: jax.Array
    tail_token: jax.Array


class _Found(NamedTuple):
    """Continuations of each state [N, C]: log_prob -inf where there is none."""

    tokens: jax.Array
    log_probs: jax.Array
    child: jax.Array


def _static():
    return dataclasses.field(metadata={"static": True})


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
    vocab_size: int = _static()
    renormalise: bool = _static()

    @classmethod
    def put(
        cls, arrays: Arrays, layout: Layout, vocab_size: int, renormalise: bool
    ) -> TrieConstraint:
        """The (padded) arrays on the default device."""
        device = {name: jnp.asarray(array) for name, array in arrays.items()}
        return cls(**device, layout=layout, vocab_size=vocab_size, renormalise=renormalise)

    @property
    def max_length(self) -> int:
        return self.layout.max_length

    @property
    def fixed_length(self) -> int | None:
        return self.layout.max_length if self.layout.ends == "fixed" else None

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
        """See Constraint.expand.  C = max(width, narrow), or more to hold the closing token.

        Where rows end without a closing token at different lengths ('mixed'), a node of more than
        `narrow` children may leave out complete rows that are not among its `width` best.
        """
        if log_probs.shape[-1] < self.vocab_size:
            raise ValueError(
                f"trie: log_probs over {log_probs.shape[-1]} tokens; the index was built for a "
                f"vocabulary of {self.vocab_size}: set trie.build.vocab_size"
            )
        step = self._prepare(state, log_probs, log_z)
        branches, limits = [self._only_tails, self._narrow], [0]
        if self.layout.bitmap_words:
            branches, limits = [*branches, self._wide], [0, self.layout.middle]
        if self.layout.middle > self.layout.narrow:
            branches.insert(2, self._middle)
            limits.insert(1, self.layout.narrow)
        slots = max(self._wanted(width) + self._closes, self.layout.narrow)
        which = (jnp.max(step.count) > jnp.asarray(limits, jnp.int32)).sum()
        branches = [_of_width(branch, width, slots) for branch in branches]
        return self._finish(state, lax.switch(which, branches, step))

    @property
    def _closes(self) -> bool:
        return self.layout.ends == "token"

    def _wanted(self, width: int) -> int:
        """One more than asked for where the closing token is taken out of the best."""
        return width + self._closes

    def _rank(self, node):
        """(is the node internal, internal nodes before it int32)."""
        entry = self.directory.at[node >> 5].get(mode="clip")
        bit = (node & 31).astype(jnp.uint32)
        below = entry[..., 0] & ((jnp.uint32(1) << bit) - jnp.uint32(1))
        before = entry[..., 1] + lax.population_count(below)
        return ((entry[..., 0] >> bit) & 1) > 0, before.astype(jnp.int32)

    def _prepare(self, state, scores, log_z):
        node, live = jnp.maximum(state.node, 0), state.node >= 0
        level = jnp.max(state.depth)
        internal, before = self._rank(node)
        first = self.first_child.at[before].get(mode="clip")
        count = self.first_child.at[before + 1].get(mode="clip") - first
        return _Step(
            scores=scores,
            log_z=jnp.zeros(node.shape, jnp.float32) if log_z is None else log_z,
            level=level,
            node=node,
            inner_id=before,
            first=first,
            count=jnp.where(live & internal, count, 0),
            is_tail=live & ~internal,
            tail_token=self._tail_token(node, node - before, level),
        )

    def _tail_token(self, node, row, level):
        if self.layout.ends == "fixed":
            depth = (node[..., None] >= self.level_start[1:]).sum(-1)
            start = self.tail_bias[depth] + row * (self.layout.max_length - depth)
        else:
            start = self.tail_start.at[row].get(mode="clip")
        return self.tails.at[start + level].get(mode="clip").astype(jnp.int32) + self.base[level]

    def _finish(self, state, found):
        valid = found.log_probs > -jnp.inf
        depth = state.depth[..., None] + 1
        if self.layout.ends == "fixed":
            complete = depth >= self.ends_at
        elif self.layout.ends == "token":
            complete = found.tokens == self.ends_at
        else:
            internal, before = self._rank(found.child)
            length = self.row_length.at[found.child - before].get(mode="clip")
            complete = ~internal & (length.astype(jnp.int32) == depth)
        complete &= valid
        node = jnp.where(complete, -2 - found.child, found.child)
        state = TrieState(jnp.where(valid, node, _DEAD), jnp.where(valid, depth, _DEAD))
        return Candidates(jnp.where(valid, found.tokens, 0), found.log_probs, state, complete)

    def _only_tails(self, step, width):
        tokens = step.tail_token[..., None]
        return self._scored(step, tokens, step.is_tail[..., None], step.node[..., None])

    def _narrow(self, step, width):
        return self._children(step, self.layout.narrow)

    def _middle(self, step, width):
        found = self._children(step, self.layout.middle)
        best, place = top_k(found.log_probs, min(self._wanted(width), self.layout.middle))
        if self._closes:
            closes = (found.tokens == self.ends_at) & (found.log_probs > -jnp.inf)
            score = jnp.where(closes, found.log_probs, -jnp.inf).max(-1)
            best, place = _offer_too(
                best, place, score, jnp.where(closes.any(-1), jnp.argmax(closes, -1), -1)
            )
        tokens = jnp.take_along_axis(found.tokens, place, -1, mode="clip")
        return _Found(tokens, best, jnp.take_along_axis(found.child, place, -1, mode="clip"))

    def _wide(self, step, width):
        """Bitmaps for the nodes that own one, a gather for the others."""
        is_wide = (step.count > self.layout.middle)[..., None]
        owned = jnp.searchsorted(self.wide, step.inner_id, method="scan_unrolled")
        bits = jnp.where(is_wide, self.bitmaps.at[owned].get(mode="clip"), 0)
        scores, low = self._covered_scores(step)
        best, place = masked_top_k(scores, bits, self._wanted(width))
        if self._closes:
            best, place = _offer_too(best, place, *self._closing_bit(scores, bits, low))
        log_z = step.log_z
        if self.renormalise:
            planes = scores.astype(jnp.float32).reshape(*bits.shape[:-1], 32, -1)
            log_z = _finite(jax.nn.logsumexp(mask(planes, bits), (-2, -1)))
        tokens = place + low
        log_probs = best.astype(jnp.float32) - log_z[..., None]
        found = _Found(tokens, log_probs, self._child_of(step, tokens))
        others = self._not_wide(
            step._replace(count=jnp.where(is_wide[..., 0], 0, step.count)), width
        )
        slots = max(tokens.shape[-1], others.tokens.shape[-1])
        pairs = zip(_widen(found, slots), _widen(others, slots), strict=True)
        return _Found(*(jnp.where(is_wide, a, b) for a, b in pairs))

    def _not_wide(self, step, width):
        if self.layout.middle == self.layout.narrow:
            return self._narrow(step, width)
        slots = max(self.layout.narrow, self._wanted(width) + self._closes)
        branches = [_of_width(f, width, slots) for f in (self._narrow, self._middle)]
        return lax.cond((step.count > self.layout.narrow).any(), *branches[::-1], step)

    def _covered_scores(self, step):
        """Scores [N, 32 * bitmap_words] of the tokens that bitmaps cover, and the first token."""
        span, size = 32 * self.layout.bitmap_words, step.scores.shape[-1]
        low = self.bitmap_low[step.level]
        if span <= size:
            return lax.dynamic_slice_in_dim(step.scores, low, span, axis=-1), low
        pad = [(0, 0)] * (step.scores.ndim - 1) + [(0, span - size)]
        return jnp.pad(step.scores, pad, constant_values=-jnp.inf), low

    def _closing_bit(self, scores, bits, low):
        """Score, -inf where illegal, and place of the closing token."""
        words = self.layout.bitmap_words
        place = self.ends_at - low
        inside = jnp.clip(place, 0, 32 * words - 1)
        bit = (bits[..., inside % words] >> (inside // words).astype(jnp.uint32)) & 1
        legal = (bit > 0) & (place == inside)
        return jnp.where(legal, scores[..., inside], -jnp.inf), jnp.full(legal.shape, place)

    def _children(self, step, most):
        """All children of nodes that have at most `most`; a tail has its token in slot 0."""
        slot = jnp.arange(most, dtype=jnp.int32)
        child = step.first[..., None] + slot
        tokens = self.edge_tokens.at[child].get(mode="clip").astype(jnp.int32)
        tail = step.is_tail[..., None]
        tokens = jnp.where(tail, step.tail_token[..., None], tokens + self.base[step.level])
        valid = slot < jnp.where(tail, 1, step.count[..., None])
        tokens = jnp.where(valid, tokens, 0)  # no stray reads of the scores
        return self._scored(step, tokens, valid, jnp.where(tail, step.node[..., None], child))

    def _scored(self, step, tokens, valid, child):
        scores = jnp.take_along_axis(step.scores, tokens, -1, mode="clip").astype(jnp.float32)
        scores = jnp.where(valid, scores, -jnp.inf)
        log_z = _finite(jax.nn.logsumexp(scores, -1)) if self.renormalise else step.log_z
        return _Found(tokens, scores - log_z[..., None], child)

    def _child_of(self, step, tokens):
        """The child reached by each legal token: a binary search among the edges of the node."""
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


def _finite(log_z):
    """0 for the normaliser of nothing."""
    return jnp.where(log_z > -jnp.inf, log_z, 0.0)


def _offer_too(best, place, score, where):
    """Gives the entry at `where` [N] (-1: none) a slot of its own, and only that."""
    best = jnp.where(place == where[..., None], -jnp.inf, best)
    return jnp.append(best, score[..., None], -1), jnp.append(place, where[..., None], -1)


def _widen(found, slots):
    """Slots that hold nothing added up to `slots`."""
    pad = [(0, 0)] * (found.tokens.ndim - 1) + [(0, slots - found.tokens.shape[-1])]
    log_probs = jnp.pad(found.log_probs, pad, constant_values=-jnp.inf)
    return _Found(jnp.pad(found.tokens, pad), log_probs, jnp.pad(found.child, pad))


def _of_width(branch, width, slots):
    """`branch` with its answer widened to the slots that all branches of a step share."""
    return lambda step: _widen(branch(step, width), slots)
