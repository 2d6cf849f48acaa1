"""Substrings of a corpus on the device: one step of constrained decoding.

A state is the interval of suffixes that begin with the tokens written, and their number.  A token
is legal when a suffix of the interval has it next.  There are two ways to the legal tokens, and
each beam takes one of them:

- enumerated: the next token of every suffix of the interval is read, or of those in its list
  (suffix_array_branches).  The shortest of a query go this way, as many as fit a budget.
- tested: tokens are taken in the order of their log-probabilities, a chunk at a time over all
  tested beams of the query together, and looked up in the interval by binary search.

Why the result is that of reading every interval: let t be the total of the last token tested and
w the `width`-th best total among the legal ones known, enumerated or tested.  Tested beams are
left when w > t, or when no token remains.  Every token not tested has a total of at most t < w:
it is not among the `width` best.  Equal totals are tested in the order of (beam, token), and the
loop goes on while t = w, so they are ordered as if all were known.
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
from dgr_jax.decoding.suffix_array_branches import Branches

_BUDGETS = (128, 1024, 8192)  # suffixes of a query that are read: branches of a switch
_CHUNKS = (128, 512)  # tokens of a query that are tested first, and then at a time
_NEVER = jnp.iinfo(jnp.int32).max

jax.tree_util.register_dataclass(Branches)


class SpanState(NamedTuple):
    """int32 each, of any one shape: the interval [lo, hi) of suffixes and the tokens written."""

    lo: jax.Array
    hi: jax.Array
    depth: jax.Array


class _Ways(NamedTuple):
    """How each beam [B, M] is enumerated: from `listed` on in the list of continuations, or -1;
    number int32: suffixes read, 0 for tested beams."""

    listed: jax.Array
    number: jax.Array


class _Found(NamedTuple):
    """Legal tokens [B, C], best first: total f32, -inf in empty slots; place int32 in the M * V
    entries of the scores; start int32: the first suffix that has the token next."""

    total: jax.Array
    place: jax.Array
    start: jax.Array


class _Tested(NamedTuple):
    """What the loop over chunks holds: the best found, and the last token tested [B]."""

    found: _Found
    total: jax.Array
    place: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubstringConstraint:
    """Spans of exactly `max_length` tokens of one passage, as a Constraint.

    Shorter spans are prefixes: beam_search(record=True) returns all prefixes, and so those that
    the end of a passage cuts short, with their states.  A passage of fewer tokens is found by
    its prefixes alone.

    tokens, suffixes, first, starts, branches: see `suffix_array.SuffixArray`.
    opens bool [V]: tokens a span begins with.
    """

    tokens: jax.Array
    suffixes: jax.Array
    first: jax.Array
    starts: jax.Array
    branches: Branches
    opens: jax.Array
    max_length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def put(
        cls, arrays: Sequence[np.ndarray], branches: Branches, opens: np.ndarray, max_length: int
    ) -> SubstringConstraint:
        """The arrays of an index on the default device: tokens, suffixes, first and starts."""
        filled = lambda array: jnp.asarray(array if len(array) else np.zeros(1, array.dtype))
        branches = jax.tree.map(filled, branches)  # nothing can be read from empty arrays
        tokens, suffixes, first, starts = map(jnp.asarray, arrays)
        return cls(tokens, suffixes, first, starts, branches, jnp.asarray(opens), max_length)

    @property
    def fixed_length(self) -> int:
        return self.max_length

    @property
    def renormalise(self) -> bool:
        """Never: it would need all legal tokens of every beam."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def init(self, batch_size: int) -> SpanState:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return SpanState(zeros, jnp.full_like(zeros, len(self.suffixes)), zeros)

    def rows(self, state: SpanState) -> jax.Array:
        """The first suffix of complete spans: equal spans have equal rows."""
        return jnp.where(state.depth == self.max_length, state.lo, -1)

    def counts(self, state: SpanState) -> jax.Array:
        """Occurrences in the corpus, int32; 0 for dead states."""
        return jnp.maximum(state.hi - state.lo, 0)

    def find(self, spans: jax.Array, lengths: jax.Array) -> SpanState:
        """The states of spans int32 [..., T] of int32 [...] tokens; dead where one does not occur.

        Unlike decoding, this ignores `opens` and `max_length`.
        """
        lo = jnp.zeros(lengths.shape, jnp.int32)
        state = SpanState(lo, jnp.full_like(lo, len(self.suffixes)), lo)

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
        """Passages that hold each span, int32 [..., limit], ascending, then -1.

        Those of the first `limit` occurrences: all of them where counts(state) <= limit.
        """
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
        """See Constraint.expand.  C = width: all candidates are complete, or none."""
        if scores.shape[-1] < len(self.opens):
            raise ValueError(
                f"suffix_array: scores of {scores.shape[-1]} tokens; the index was built for a "
                f"vocabulary of {len(self.opens)}: set suffix_array.build.vocab_size"
            )
        prior = jnp.where(state.depth >= 0, prior, -jnp.inf)
        found = lax.cond(
            jnp.max(state.depth) <= 0,
            lambda: self._first_step(scores, prior, width),
            lambda: self._later_step(state, scores, prior, width),
        )
        found = lax.optimization_barrier(found)
        size, valid = scores.shape[-1], found.total > -jnp.inf
        parent, token = found.place // size, found.place % size
        depth, hi = (jnp.take_along_axis(x, parent, -1) for x in (state.depth, state.hi))
        end = self._search(found.start, hi, depth, token + 1)
        following = SpanState(found.start, end, depth + 1)
        return Candidates(
            parent=parent,
            token_ids=jnp.where(valid, token, 0),
            log_probs=found.total,
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
        """A table says which tokens occur and where."""
        size = scores.shape[-1]
        legal = jnp.pad(self.opens, (0, size - len(self.opens)))
        masked = jnp.where(legal, scores, -jnp.inf)
        total, place = joint_top_k(masked, prior, min(width, scores[0].size))
        return _padded(_Found(total, place, self.first.at[place % size].get(mode="clip")), width)

    def _later_step(self, state, scores, prior, width):
        length = jnp.where(prior > -jnp.inf, state.hi - state.lo, 0)
        listed, length = self._list_of(state, length)
        read = _shortest(length, _BUDGETS[-1])
        ways = _Ways(listed, jnp.where(read, length, 0))
        needed = jnp.max(ways.number.sum(-1))
        which = (needed > jnp.asarray(_BUDGETS[:-1], jnp.int32)).sum()
        branches = [
            lambda budget=budget: self._enumerated(state, ways, scores, prior, width, budget)
            for budget in _BUDGETS
        ]
        found = lax.switch(which, branches)
        prior = jnp.where(read, -jnp.inf, prior)
        return lax.cond(
            (prior > -jnp.inf).any(),
            lambda: self._tested(state, scores, prior, found, width),
            lambda: found,
        )

    def _list_of(self, state, length):
        """(first entry of the beam's list or -1, suffixes to read: the list or all `length`)."""
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
        """The best of the next tokens of the suffixes that each beam reads.

        Those of all beams of a query lie in `budget` slots, beam after beam.
        """
        ends = jnp.cumsum(ways.number, -1)
        slot = jnp.arange(budget, dtype=jnp.int32)
        beam = (slot[:, None] >= ends[:, None]).sum(-1)
        valid, beam = beam < ends.shape[1], jnp.minimum(beam, ends.shape[1] - 1)
        pick = lambda leaf: jnp.take_along_axis(leaf, beam, -1)
        offset, listed = slot - pick(ends - ways.number), pick(ways.listed)
        child = jnp.asarray(self.branches.children).at[listed + offset].get(mode="clip")
        suffix = jnp.where(listed >= 0, child, pick(state.lo) + offset)
        token = self._next(jnp.where(valid, suffix, 0), pick(state.depth))
        before = jnp.pad(token[:, :-1], ((0, 0), (1, 0)))
        valid &= (token > 0) & ((offset == 0) | (token != before))
        place = beam * scores.shape[-1] + token
        total = jnp.take_along_axis(scores.reshape(len(scores), -1), place, -1)
        total = jnp.where(valid, total.astype(jnp.float32) + pick(prior), -jnp.inf)
        # without the barrier each use would read again
        total, place, suffix = lax.optimization_barrier((total, place, suffix))
        total, slot = top_k(total, min(width, budget))
        place, suffix = (jnp.take_along_axis(x, slot, -1) for x in (place, suffix))
        return _padded(_Found(total, place, suffix), width)

    def _tested(self, state, scores, prior, found, width):
        """`found` and the best legal tokens of the beams whose prior is not -inf."""
        _, beams, size = scores.shape
        entry = jnp.arange(beams * size, dtype=jnp.int32).reshape(beams, size)

        def test(found, rest, number):
            number = min(max(number, 2 * width), beams * size)
            total, place = lax.optimization_barrier(joint_top_k(rest, prior, number))
            new = lax.optimization_barrier(self._legal(state, total, place, size))
            return _Tested(_merged(found, new, width), total[:, -1], place[:, -1])

        def unfinished(tested):
            worst = tested.found.total[:, -1]
            return ((tested.total > -jnp.inf) & (tested.total >= worst)).any()

        def advance(tested):
            # the barrier keeps what only this rare loop needs from being computed before it
            tested, logits = lax.optimization_barrier((tested, scores))
            totals = logits.astype(jnp.float32) + prior[..., None]
            last, at = tested.total[:, None, None], tested.place[:, None, None]
            left = (totals < last) | ((totals == last) & (entry > at))
            rest = lax.optimization_barrier(jnp.where(left, logits, -jnp.inf))
            return test(tested.found, rest, _CHUNKS[1])

        return lax.while_loop(unfinished, advance, test(found, scores, _CHUNKS[0])).found

    def _legal(self, state, total, place, size):
        """The tokens at these places, -inf where none of the beam's suffixes has it next."""
        pick = lambda leaf: jnp.take_along_axis(leaf, place // size, -1)
        token, hi, depth = place % size, pick(state.hi), pick(state.depth)
        start = self._search(pick(state.lo), hi, depth, token)
        legal = (token > 0) & (start < hi) & (self._next(start, depth) == token)
        return _Found(jnp.where(legal, total, -jnp.inf), place, start)


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
    """bool [B, M]: the shortest intervals whose lengths [B, M] add up to at most the budget."""
    order = jnp.argsort(length, -1)
    ordered = jnp.minimum(jnp.take_along_axis(length, order, -1), budget + 1)
    fits = jnp.cumsum(ordered, -1) <= budget
    return jnp.take_along_axis(fits, jnp.argsort(order, -1), -1)


def _merged(a, b, width):
    """The `width` best of both; equal ones ordered by place."""
    total, place, start = (jnp.concatenate(pair, -1) for pair in zip(a, b, strict=True))
    negated, place, start = lax.sort((-total, place, start), num_keys=2)
    return _Found(-negated[:, :width], place[:, :width], start[:, :width])


def _padded(found, width):
    """Slots that hold nothing added up to `width`."""
    pad = [(0, 0), (0, width - found.place.shape[-1])]
    total = jnp.pad(found.total, pad, constant_values=-jnp.inf)
    return _Found(total, jnp.pad(found.place, pad), jnp.pad(found.start, pad))
