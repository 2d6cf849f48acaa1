"""Substrings of a corpus on the device: one step of constrained decoding.

A state is the interval of suffixes that begin with the written tokens, and the number of these
tokens. A token is legal when it comes next in a suffix of the interval. Legal tokens are found in
one of two ways, for each beam:

- enumerated: the next token of every suffix in the interval is read, or of every suffix in its list
  (suffix_array_branches). This is done for the shortest intervals of a query, as many as a budget
  allows.
- tested: tokens are looked up in the interval by binary search, in the order of their
  log-probabilities, a chunk at a time over all tested beams of the query together.

The result is the same as if every interval were read. Let t be the total of the last tested token,
and w the `width`-th best total of the legal tokens known so far. Testing ends when w > t, or when
no token remains. A token that was not tested then has a total of at most t < w and is not among
the `width` best. Equal totals are tested in the order of (beam, token), and the loop goes on while
t = w, so that they are ordered as if all were known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dgr_jax.decoding import suffix_array_branches
from dgr_jax.decoding.constraint import Candidates
from dgr_jax.decoding.selection import joint_top_k, top_k
from dgr_jax.decoding.suffix_array_branches import SpanBranches

_BUDGETS = (128, 1024, 8192)  # how many suffixes of a query may be read, by branch of a switch
_CHUNKS = (128, 512)  # how many tokens of a query are tested first, and in each later round
_NEVER = jnp.iinfo(jnp.int32).max

jax.tree_util.register_dataclass(SpanBranches)


class SpanState(NamedTuple):
    """int32, all of one shape: the interval [lo, hi) of suffixes, and the number of tokens written
    (depth)."""

    lo: jax.Array
    hi: jax.Array
    depth: jax.Array


class _Ways(NamedTuple):
    """How each beam is enumerated, int32 [B, M].

    listed: where its list of continuations begins, -1 where it has none. reads: how many suffixes
    are read, 0 for tested beams.
    """

    listed: jax.Array
    reads: jax.Array


class _NextTokens(NamedTuple):
    """Legal tokens [B, C], best first.

    total: f32, -inf in empty slots. place: int32, the place among the M * V entries of the scores.
    start: int32, the first suffix that has the token next.
    """

    total: jax.Array
    place: jax.Array
    start: jax.Array


class _Tested(NamedTuple):
    """The state of the loop over chunks: the best tokens so far, and the total and the place of the
    last tested token, [B]."""

    best: _NextTokens
    total: jax.Array
    place: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubstringConstraint:
    """Spans of exactly `max_length` tokens of one passage, as a Constraint.

    Shorter spans are prefixes of these: beam_search(record=True) returns all prefixes with their
    states, also those that the end of a passage cuts short. A passage with fewer tokens is found by
    such prefixes alone.

    tokens, suffixes, first, starts, branches: see `suffix_array.SuffixArray`; they may be padded.
    opens: bool [V], the tokens with which a span may begin.
    """

    tokens: jax.Array
    suffixes: jax.Array
    first: jax.Array
    starts: jax.Array
    branches: SpanBranches
    opens: jax.Array
    max_length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def put(
        cls,
        arrays: Sequence[np.ndarray],
        branches: SpanBranches,
        opens: np.ndarray,
        max_length: int,
    ) -> SubstringConstraint:
        """The arrays of an index on the default device: tokens, suffixes, first and starts."""
        filled = lambda array: jnp.asarray(array if len(array) else np.zeros(1, array.dtype))
        branches = jax.tree.map(filled, branches)  # JAX cannot index an empty array
        tokens, suffixes, first, starts = map(jnp.asarray, arrays)
        return cls(tokens, suffixes, first, starts, branches, jnp.asarray(opens), max_length)

    @property
    def fixed_length(self) -> int:
        return self.max_length

    @property
    def renormalise(self) -> bool:
        """False, as it would need all legal tokens of every beam."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def init(self, batch_size: int) -> SpanState:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return SpanState(zeros, jnp.full_like(zeros, self.first[-1]), zeros)

    def rows(self, state: SpanState) -> jax.Array:
        """The first suffix of each complete span, so that equal spans have equal rows."""
        return jnp.where(state.depth == self.max_length, state.lo, -1)

    def counts(self, state: SpanState) -> jax.Array:
        """Occurrences in the corpus, int32; 0 for dead states."""
        return jnp.maximum(state.hi - state.lo, 0)

    def find(self, spans: jax.Array, lengths: jax.Array) -> SpanState:
        """The states of spans int32 [..., T] with lengths int32 [...]; dead where one does not
        occur. Unlike decoding, this ignores `opens` and `max_length`."""
        lo = jnp.zeros(lengths.shape, jnp.int32)
        state = SpanState(lo, jnp.full_like(lo, self.first[-1]), lo)

        def advance(depth, state):
            token = lax.dynamic_index_in_dim(spans, depth, -1, keepdims=False)
            more = (depth < lengths) & (state.lo < state.hi)
            known = (token > 0) & (token < len(self.opens))
            lo = self._search(state.lo, state.hi, state.depth, token)
            hi = self._search(lo, jnp.where(known, state.hi, lo), state.depth, token + 1)
            step = SpanState(lo, hi, state.depth + 1)
            return jax.tree.map(lambda new, old: jnp.where(more, new, old), step, state)

        state = lax.fori_loop(0, spans.shape[-1], advance, state)
        dead = (state.lo >= state.hi) | (state.depth < lengths)
        return jax.tree.map(lambda leaf: jnp.where(dead, -1, leaf), state)

    def locate(self, state: SpanState, *, limit: int) -> jax.Array:
        """The passages of each span's first `limit` occurrences, int32 [..., limit], ascending,
        then -1. These are all its passages where counts(state) <= limit."""
        offset = jnp.arange(limit, dtype=jnp.int32)
        position = self.suffixes.at[state.lo[..., None] + offset].get(mode="clip")
        passage = jnp.searchsorted(self.starts, position, side="right").astype(jnp.int32) - 1
        passage = jnp.where(offset < (state.hi - state.lo)[..., None], passage, _NEVER)
        passage = jnp.sort(passage, -1)
        repeats = passage[..., 1:] == passage[..., :-1]
        passage = passage.at[..., 1:].set(jnp.where(repeats, _NEVER, passage[..., 1:]))
        passage = jnp.sort(passage, -1)
        return jnp.where(passage == _NEVER, -1, passage)

    def expand(
        self, state: SpanState, scores: jax.Array, prior: jax.Array, *, width: int
    ) -> Candidates:
        """See Constraint.expand. C = width; either all candidates are complete, or none."""
        if scores.shape[-1] < len(self.opens):
            raise ValueError(
                f"suffix_array: scores of {scores.shape[-1]} tokens; the index was built for a "
                f"vocabulary of {len(self.opens)}: set suffix_array.build.vocab_size"
            )
        prior = jnp.where(state.depth >= 0, prior, -jnp.inf)
        best = lax.cond(
            jnp.max(state.depth) <= 0,
            lambda: self._first_step(scores, prior, width),
            lambda: self._later_step(state, scores, prior, width),
        )
        best = lax.optimization_barrier(best)
        size, valid = scores.shape[-1], best.total > -jnp.inf
        parent, token = best.place // size, best.place % size
        depth, hi = (jnp.take_along_axis(x, parent, -1) for x in (state.depth, state.hi))
        end = self._search(best.start, hi, depth, token + 1)
        following = SpanState(best.start, end, depth + 1)
        return Candidates(
            parent=parent,
            token_ids=jnp.where(valid, token, 0),
            log_probs=best.total,
            next_state=jax.tree.map(lambda leaf: jnp.where(valid, leaf, -1), following),
            complete=valid & (depth + 1 == self.max_length),
        )

    def _next(self, suffix, depth):
        """The token at `depth` of each suffix; 0 where the passage ends."""
        position = self.suffixes.at[suffix].get(mode="clip") + depth
        return self.tokens.at[position].get(mode="clip").astype(jnp.int32)

    def _search(self, lo, hi, depth, token):
        """The first suffix in [lo, hi) whose token at `depth` is at least `token`, or hi."""
        value = lambda suffix: self._next(suffix, depth)
        return _lower_bound(lo, hi, token, value)

    def _first_step(self, scores, prior, width):
        """The first tokens, for which the array `first` tells which occur and where."""
        size = scores.shape[-1]
        legal = jnp.pad(self.opens, (0, size - len(self.opens)))
        masked = jnp.where(legal, scores, -jnp.inf)
        total, place = joint_top_k(masked, prior, min(width, scores[0].size))
        return _padded(
            _NextTokens(total, place, self.first.at[place % size].get(mode="clip")), width
        )

    def _later_step(self, state, scores, prior, width):
        length = jnp.where(prior > -jnp.inf, state.hi - state.lo, 0)
        listed, length = self._list_of(state, length)
        read = _shortest(length, _BUDGETS[-1])
        ways = _Ways(listed, jnp.where(read, length, 0))
        needed = jnp.max(ways.reads.sum(-1))
        which = (needed > jnp.asarray(_BUDGETS[:-1], jnp.int32)).sum()
        branches = [
            lambda budget=budget: self._enumerated(state, ways, scores, prior, width, budget)
            for budget in _BUDGETS
        ]
        best = lax.switch(which, branches)
        prior = jnp.where(read, -jnp.inf, prior)
        return lax.cond(
            (prior > -jnp.inf).any(),
            lambda: self._tested(state, scores, prior, best, width),
            lambda: best,
        )

    def _list_of(self, state, length):
        """(first entry of the beam's list, or -1; how many suffixes to read: those of the list, or
        all `length`)."""
        arrays = self.branches
        lows, levels, ranges = map(jnp.asarray, (arrays.lows, arrays.levels, arrays.ranges))
        at, end = (
            levels.at[state.depth + i].get(mode="fill", fill_value=len(lows)) for i in (0, 1)
        )
        end = jnp.where(length >= suffix_array_branches.OFTEN, end, at)
        value = lambda place: lows.at[place].get(mode="clip")
        at = _lower_bound(at, end, state.lo, value)
        has = (at < end) & (value(at) == state.lo)
        start, stop = (ranges.at[at + i].get(mode="clip") for i in (0, 1))
        return jnp.where(has, start, -1), jnp.where(has, stop - start, length)

    def _enumerated(self, state, ways, scores, prior, width, budget):
        """The best next tokens of the suffixes that the beams read.

        The suffixes of all beams of a query fill `budget` slots, beam after beam.
        """
        ends = jnp.cumsum(ways.reads, -1)
        slot = jnp.arange(budget, dtype=jnp.int32)
        beam = (slot[:, None] >= ends[:, None]).sum(-1)
        valid, beam = beam < ends.shape[1], jnp.minimum(beam, ends.shape[1] - 1)
        pick = lambda leaf: jnp.take_along_axis(leaf, beam, -1)
        offset, listed = slot - pick(ends - ways.reads), pick(ways.listed)
        child = jnp.asarray(self.branches.children).at[listed + offset].get(mode="clip")
        suffix = jnp.where(listed >= 0, child, pick(state.lo) + offset)
        token = self._next(jnp.where(valid, suffix, 0), pick(state.depth))
        before = jnp.pad(token[:, :-1], ((0, 0), (1, 0)))
        valid &= (token > 0) & ((offset == 0) | (token != before))
        place = beam * scores.shape[-1] + token
        total = jnp.take_along_axis(scores.reshape(len(scores), -1), place, -1)
        total = jnp.where(valid, total.astype(jnp.float32) + pick(prior), -jnp.inf)
        # Without the barrier XLA would read the arrays again for each use.
        total, place, suffix = lax.optimization_barrier((total, place, suffix))
        total, slot = top_k(total, min(width, budget))
        place, suffix = (jnp.take_along_axis(x, slot, -1) for x in (place, suffix))
        return _padded(_NextTokens(total, place, suffix), width)

    def _tested(self, state, scores, prior, best, width):
        """The best of the tokens `best` and the legal tokens of beams whose prior is not -inf."""
        _, beams, size = scores.shape
        entry = jnp.arange(beams * size, dtype=jnp.int32).reshape(beams, size)

        def test(best, rest, count):
            count = min(max(count, 2 * width), beams * size)
            total, place = lax.optimization_barrier(joint_top_k(rest, prior, count))
            new = lax.optimization_barrier(self._legal(state, total, place, size))
            return _Tested(_merged(best, new, width), total[:, -1], place[:, -1])

        def unfinished(tested):
            worst = tested.best.total[:, -1]
            return ((tested.total > -jnp.inf) & (tested.total >= worst)).any()

        def advance(tested):
            # Without the barrier XLA would compute what only this rare loop needs before the loop.
            tested, logits = lax.optimization_barrier((tested, scores))
            totals = logits.astype(jnp.float32) + prior[..., None]
            last, at = tested.total[:, None, None], tested.place[:, None, None]
            left = (totals < last) | ((totals == last) & (entry > at))
            rest = lax.optimization_barrier(jnp.where(left, logits, -jnp.inf))
            return test(tested.best, rest, _CHUNKS[1])

        return lax.while_loop(unfinished, advance, test(best, scores, _CHUNKS[0])).best

    def _legal(self, state, total, place, size):
        """The tokens at these places, with -inf where no suffix of the beam has the token next."""
        pick = lambda leaf: jnp.take_along_axis(leaf, place // size, -1)
        token, hi, depth = place % size, pick(state.hi), pick(state.depth)
        start = self._search(pick(state.lo), hi, depth, token)
        legal = (token > 0) & (start < hi) & (self._next(start, depth) == token)
        return _NextTokens(jnp.where(legal, total, -jnp.inf), place, start)


def _lower_bound(lo, hi, wanted, value):
    """The first place in [lo, hi) whose value is at least `wanted`, or hi."""

    def halve(_, bounds):
        lo, hi = bounds
        middle = lo + (hi - lo) // 2
        right = (value(middle) < wanted) & (lo < hi)
        return jnp.where(right, middle + 1, lo), jnp.where(right, hi, middle)

    hi = jnp.maximum(lo, hi)
    steps = 32 - lax.clz(jnp.max(hi - lo))
    return lax.fori_loop(0, steps, halve, (lo, hi))[0]


def _shortest(length, budget):
    """bool [B, M]: whether an interval is among the shortest ones that fit the budget together."""
    order = jnp.argsort(length, -1)
    ordered = jnp.minimum(jnp.take_along_axis(length, order, -1), budget + 1)
    fits = jnp.cumsum(ordered, -1) <= budget
    return jnp.take_along_axis(fits, jnp.argsort(order, -1), -1)


def _merged(a, b, width):
    """The `width` best tokens of both; equal ones are ordered by place."""
    total, place, start = (jnp.concatenate(pair, -1) for pair in zip(a, b, strict=True))
    negated, place, start = lax.sort((-total, place, start), num_keys=2)
    return _NextTokens(-negated[:, :width], place[:, :width], start[:, :width])


def _padded(tokens, width):
    """The tokens with empty slots added up to `width`."""
    pad = [(0, 0), (0, width - tokens.place.shape[-1])]
    total = jnp.pad(tokens.total, pad, constant_values=-jnp.inf)
    return _NextTokens(total, jnp.pad(tokens.place, pad), jnp.pad(tokens.start, pad))
