"""The trie on the device: one step of constrained decoding.

A state is a node and its depth. Complete rows and dead beams are negative nodes: -1 is dead,
-2 - n is the row that ends in node n.

What a step costs follows the widest node that a live beam stands on, not the widest of the level:
only tails, gathers of ever more children (Layout.gathers), and bitmaps over the token range are
the branches of one lax.switch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dgr_jax.decoding.constraint import Candidates, Completions
from dgr_jax.decoding.selection import mask
from dgr_jax.decoding.trie_build import Layout
from dgr_jax.decoding.trie_continuations import (
    Continuations,
    best_of,
    best_of_bits,
    in_order,
    joined,
)

if TYPE_CHECKING:
    from dgr_jax.decoding.trie_arrays import Arrays

_DEAD = -1
_COUNTED_WORDS = 64  # bitmaps of more words are not read to rank one bit


class TrieState(NamedTuple):
    """node int32 [N], depth int32 [N]: tokens written so far, the same for all live beams."""

    node: jax.Array
    depth: jax.Array


class _Step(NamedTuple):
    """What the branches of a step read: scores [B, M, V], level int32 [], and of each beam [B, M]
    its prior and node, and of the node: its internal id, first child, children (0 unless
    internal), and its token if it is a tail."""

    scores: jax.Array
    prior: jax.Array
    level: jax.Array
    node: jax.Array
    inner_id: jax.Array
    first: jax.Array
    children: jax.Array
    is_tail: jax.Array
    tail_token: jax.Array


def _static():
    return dataclasses.field(metadata={"static": True})


def _put(array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)  # every process has it whole
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrieConstraint:
    """A trie as a pytree of device arrays (see `trie_arrays`) and hashable static metadata."""

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
        cls,
        arrays: Arrays,
        layout: Layout,
        vocab_size: int,
        renormalise: bool,
        shardings: Mapping[str, jax.sharding.Sharding] = MappingProxyType({}),
    ) -> TrieConstraint:
        """The (padded) arrays on the default device, or where their shardings say."""
        device = {name: _put(array, shardings.get(name)) for name, array in arrays.items()}
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

    @property
    def completion_width(self) -> int:
        """How many tokens are left at the depth where every beam would stand on a tail if the
        identifiers were spread evenly. Where they differ in length, it is at most 1.5 times what a
        tail has on average. It is 0 for less than 3, which would not pay for compiling it.

        Shapes alone decide, so that indexes of one size class share it.
        """
        span = max(2, 32 * self.layout.bitmap_words or self.layout.gathers[-1])
        spread = math.ceil(math.log(max(2, self.edge_tokens.shape[0]), span)) + 1
        left = self.layout.max_length - spread
        if self.layout.ends != "fixed":
            mean = self.tails.shape[0] / max(1, self.tail_start.shape[0])
            left = min(left, math.ceil(1.5 * mean))
        return left if left > 2 else 0

    def init(self, batch_size: int) -> TrieState:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return TrieState(zeros, zeros)

    def rows(self, state: TrieState) -> jax.Array:
        node = -2 - state.node
        _, internal_before = self._rank(jnp.maximum(node, 0))
        return jnp.where(node >= 0, node - internal_before, -1)

    def expand(
        self, state: TrieState, scores: jax.Array, prior: jax.Array, *, width: int
    ) -> Candidates:
        """See Constraint.expand. C = width ('fixed'), width + M ('token') or 2 * width ('mixed').

        Only where rows end without a closing token at different lengths ('mixed') may a node that
        owns a bitmap hide continuations: its `width` best, complete or not, are offered.
        """
        if scores.shape[-1] < self.vocab_size:
            raise ValueError(
                f"trie: scores of {scores.shape[-1]} tokens; the index was built for a "
                f"vocabulary of {self.vocab_size}: set trie.build.vocab_size"
            )
        step = self._prepare(state, scores, prior)
        branches = [lambda step: self._tails(step, width)]
        for most in self.layout.gathers:
            branches.append(functools.partial(self._gather, width=width, most=most))
        limits = [0, *self.layout.gathers]
        if self.layout.bitmap_words:
            branches.append(lambda step: self._wide(step, width))
        else:
            limits.pop()
        which = (jnp.max(step.children) > jnp.asarray(limits, jnp.int32)).sum()
        return self._finish(state, lax.switch(which, branches, step))

    def completions(self, state: TrieState, width: int) -> Completions:
        """The tails that the states stand on; see Completions."""
        node, live = jnp.maximum(state.node, 0), state.node >= 0
        internal, before = self._rank(node)
        row, level = node - before, jnp.max(state.depth)
        steps = jnp.arange(width, dtype=jnp.int32)
        tokens = self._tail_tokens(node[..., None], row[..., None], level + steps)
        if self.layout.ends == "fixed":
            left = self.ends_at - level
        elif self.layout.ends == "token":
            closes = tokens == self.ends_at
            left = jnp.where(closes.any(-1), closes.argmax(-1) + 1, width + 1)
        else:
            left = self.row_length.at[row].get(mode="clip").astype(jnp.int32) - level
        lengths = jnp.where(live, jnp.where(internal | (left > width), -1, left), 0)
        tokens = jnp.where(steps < lengths[..., None], tokens, 0)
        node = jnp.where(lengths > 0, -2 - node, _DEAD)
        return Completions(tokens, lengths, TrieState(node, state.depth + lengths))

    def _rank(self, node):
        """(is the node internal, internal nodes before it int32)."""
        entry = self.directory.at[node >> 5].get(mode="clip")
        bit = (node & 31).astype(jnp.uint32)
        below = entry[..., 0] & ((jnp.uint32(1) << bit) - jnp.uint32(1))
        before = entry[..., 1] + lax.population_count(below)
        return ((entry[..., 0] >> bit) & 1) > 0, before.astype(jnp.int32)

    def _prepare(self, state, scores, prior):
        node, live = jnp.maximum(state.node, 0), (state.node >= 0) & (prior > -jnp.inf)
        internal, before = self._rank(node)
        first = self.first_child.at[before].get(mode="clip")
        count = self.first_child.at[before + 1].get(mode="clip") - first
        level = jnp.max(state.depth)
        return _Step(
            scores=scores,
            prior=prior,
            level=level,
            node=node,
            inner_id=before,
            first=first,
            children=jnp.where(live & internal, count, 0),
            is_tail=live & ~internal,
            tail_token=self._tail_tokens(node, node - before, level),
        )

    def _tail_tokens(self, node, row, level):
        """The tokens that tails have after `level` tokens; the shapes are broadcast."""
        if self.layout.ends == "fixed":
            depth = (node[..., None] >= self.level_start[1:]).sum(-1)
            start = self.tail_bias[depth] + row * (self.layout.max_length - depth)
        else:
            start = self.tail_start.at[row].get(mode="clip")
        tokens = self.tails.at[start + level].get(mode="clip").astype(jnp.int32)
        return tokens + self.base.at[level].get(mode="clip")

    def _finish(self, state, offers):
        valid = offers.log_probs > -jnp.inf
        depth = jnp.take_along_axis(state.depth, offers.parent, -1) + 1
        complete = valid & self._completes(offers.tokens, offers.child, depth)
        node = jnp.where(complete, -2 - offers.child, offers.child)
        state = TrieState(jnp.where(valid, node, _DEAD), jnp.where(valid, depth, _DEAD))
        tokens = jnp.where(valid, offers.tokens, 0)
        return Candidates(offers.parent, tokens, offers.log_probs, state, complete)

    def _completes(self, tokens, child, depth):
        """Whether the row ends with this token, which leads to `child` at `depth`."""
        if self.layout.ends == "fixed":
            return depth >= self.ends_at
        if self.layout.ends == "token":
            return tokens == self.ends_at
        internal, before = self._rank(child)
        length = self.row_length.at[child - before].get(mode="clip")
        return ~internal & (length.astype(jnp.int32) == depth)

    def _tails(self, step, width):
        tokens, child = step.tail_token[..., None], step.node[..., None]
        return self._choose(step, tokens, step.is_tail[..., None], child, width)

    def _gather(self, step, width, most):
        """All children of nodes that have at most `most`; a tail has its token in slot 0."""
        slot = jnp.arange(most, dtype=jnp.int32)
        child = step.first[..., None] + slot
        tokens = self.edge_tokens.at[child].get(mode="clip").astype(jnp.int32)
        tail = step.is_tail[..., None]
        tokens = jnp.where(tail, step.tail_token[..., None], tokens + self.base[step.level])
        valid = slot < jnp.where(tail, 1, step.children[..., None])
        tokens = jnp.where(valid, tokens, 0)  # no stray reads of the scores
        child = jnp.where(tail, step.node[..., None], child)
        return self._choose(step, tokens, valid, child, width)

    def _choose(self, step, tokens, valid, child, width):
        """The best of tokens [B, M, S], each leading to `child`."""
        scores = jnp.take_along_axis(step.scores, tokens, -1, mode="clip").astype(jnp.float32)
        scores = jnp.where(valid, scores, -jnp.inf)
        prior = step.prior
        if self.renormalise:
            prior -= _finite(jax.nn.logsumexp(scores, -1))
        # gathered once: without the barrier each use would gather again
        tokens, totals = lax.optimization_barrier((tokens, scores + prior[..., None]))
        if self.layout.ends == "fixed":
            return best_of(totals, tokens, child, width)
        complete = self._completes(tokens, child, step.level + 1)
        ends, others = jnp.where(complete, totals, -jnp.inf), jnp.where(complete, -jnp.inf, totals)
        best = best_of(others, tokens, child, width)
        if self.layout.ends == "mixed":
            return joined(best, best_of(ends, tokens, child, width))
        leaf = jnp.where(complete & valid, child, 0).max(-1)
        return joined(best, self._closing(ends.max(-1), leaf))

    def _closing(self, log_probs, leaf):
        """The closing token of each beam [B, M]."""
        beam = jnp.broadcast_to(jnp.arange(leaf.shape[1], dtype=jnp.int32), leaf.shape)
        return Continuations(beam, jnp.broadcast_to(self.ends_at, leaf.shape), log_probs, leaf)

    def _wide(self, step, width):
        """Continuations by the bitmaps of nodes that own one, and by a gather of any others."""
        widest = self.layout.gathers[-1]
        is_wide = step.children > widest
        rest = step._replace(children=jnp.where(is_wide, 0, step.children))
        from_bitmaps = self._bitmapped(step, is_wide, width)

        def with_rest():
            gathered = self._gather(rest, width, widest)
            (a, a_ends), (b, b_ends) = from_bitmaps.split(width), gathered.split(width)
            if self.layout.ends == "token":  # one slot a beam
                ends = (jnp.where(is_wide, x, y) for x, y in zip(a_ends, b_ends, strict=True))
                return joined(in_order(joined(a, b), width), Continuations(*ends))
            return joined(in_order(joined(a, b), width), in_order(joined(a_ends, b_ends), width))

        return lax.cond(((rest.children > 0) | rest.is_tail).any(), with_rest, lambda: from_bitmaps)

    def _bitmapped(self, step, is_wide, width):
        owned = jnp.searchsorted(self.wide, step.inner_id, method="scan_unrolled")
        bits = jnp.where(is_wide[..., None], self.bitmaps.at[owned].get(mode="clip"), 0)
        scores, low = self._covered_scores(step)
        prior = step.prior
        if self.renormalise:
            planes = scores.astype(jnp.float32).reshape(*bits.shape[:-1], 32, -1)
            prior -= _finite(jax.nn.logsumexp(mask(planes, bits), (-2, -1)))
        child_of = lambda parent, place: self._child_of(step, bits, low, parent, place)
        if self.layout.ends == "token":
            closing, rest = self._take_closing(scores, bits, prior, low, child_of)
            return joined(best_of_bits(scores, rest, prior, low, width, child_of), closing)
        if self.layout.ends == "fixed":
            return best_of_bits(scores, bits, prior, low, width, child_of)
        best = best_of_bits(scores, bits, prior, low, 2 * width, child_of)
        complete = self._completes(best.tokens, best.child, step.level + 1)
        others, ends = best.where(~complete), best.where(complete)
        return joined(in_order(others, width), in_order(ends, width))

    def _covered_scores(self, step):
        """Scores [B, M, 32 * bitmap_words] of the tokens that bitmaps cover, and the first one."""
        span, size = 32 * self.layout.bitmap_words, step.scores.shape[-1]
        low = self.bitmap_low[step.level]
        if span <= size:
            return lax.dynamic_slice_in_dim(step.scores, low, span, axis=-1), low
        pad = [(0, 0), (0, 0), (0, span - size)]
        return jnp.pad(step.scores, pad, constant_values=-jnp.inf), low

    def _take_closing(self, scores, bits, prior, low, child_of):
        """(the closing token of each beam, bits without it)."""
        words = self.layout.bitmap_words
        place = self.ends_at - low
        inside = jnp.clip(place, 0, 32 * words - 1)
        flag = jnp.uint32(1) << (inside // words).astype(jnp.uint32)
        flag = jnp.where((place == inside) & (jnp.arange(words) == inside % words), flag, 0)
        legal = ((bits & flag) > 0).any(-1)
        log_probs = jnp.where(legal, scores[..., inside].astype(jnp.float32) + prior, -jnp.inf)
        beam = jnp.broadcast_to(jnp.arange(legal.shape[1]), legal.shape)
        leaf = child_of(beam, jnp.broadcast_to(inside, legal.shape))
        return self._closing(log_probs, leaf), bits & ~flag

    def _child_of(self, step, bits, low, parent, place):
        """The child int32 [B, C] reached by the token of bit `place` of the bitmap of `parent`.

        Its rank is the number of bits before it in a short bitmap, which is at hand; in a long one
        it is found by binary search among the edges.
        """
        first = jnp.take_along_axis(step.first, parent, -1)
        words = self.layout.bitmap_words
        if words <= _COUNTED_WORDS:
            own = jnp.take_along_axis(bits, parent[..., None], 1)
            plane, word = (x[..., None] for x in (place // words, place % words))
            plane = (plane + (jnp.arange(words) < word)).astype(jnp.uint32)
            before = ~jnp.where(plane < 32, jnp.uint32(0xFFFFFFFF) << plane, 0)
            rank = lax.population_count(own & before).sum(-1, dtype=jnp.uint32)
            return first + rank.astype(jnp.int32)
        wanted = place + low - self.base[step.level]
        left = jnp.take_along_axis(step.children, parent, -1)
        for _ in range((32 * words).bit_length()):
            half = left >> 1
            edge = self.edge_tokens.at[first + half].get(mode="clip").astype(jnp.int32)
            right = (edge < wanted) & (left > 0)
            first = jnp.where(right, first + half + 1, first)
            left = jnp.where(right, left - half - 1, half)
        return first


def _finite(log_z):
    """The normaliser, or 0 where nothing was normalised."""
    return jnp.where(log_z > -jnp.inf, log_z, 0.0)
