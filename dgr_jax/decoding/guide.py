"""Planned identifiers: only a few may be written for each query, and the best prefixes come first.

A plan scores all passages before a token is written, and names the n best of each query. In the
order of the trie, a prefix is an interval of their identifiers, and its children are intervals
within it: all that a step needs is which row begins the interval of each row, n numbers a query.
The bonus of a prefix is the largest plan score in its interval (Zeng et al. 2024, "Planning Ahead
in Generative Retrieval"; there it is added to scores without a softmax, here to log-probabilities).

Axis letters: B queries, n planned passages, T identifier length, M beams, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.decoding.constraint import Candidates, Completions

_DEAD = -1


class PlannedState(NamedTuple):
    """A prefix: the first row of its interval, or -2 - that row for a complete identifier; and the
    tokens written so far, the same for all live beams. int32, both -1 where it is dead."""

    start: jax.Array
    depth: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlannedRows:
    """Planned identifiers of each query: a Constraint and a Guide.

    tokens int32 [B, n, T]: sorted, 0 after the end, blank where fewer are planned; passages that
      share an identifier have one row each.
    starts int32 [B, T + 1, n]: the first row with the same t tokens as row i.
    best f32 [B, T + 1, n]: largest bonus in the interval that row i begins.
    fixed: whether all identifiers have T tokens (static).

    A beam is offered all of its continuations. Of equal ones the smaller identifier comes first.
    """

    tokens: jax.Array
    starts: jax.Array
    best: jax.Array
    fixed: bool = dataclasses.field(metadata={"static": True})

    renormalise = False  # log-probabilities over planned tokens alone would tell nothing

    @classmethod
    def of(cls, tokens: jax.Array, bonus: jax.Array, *, fixed: bool) -> PlannedRows:
        """tokens: as above; bonus: f32 [B, n], what the plan says of each row; -inf where blank."""
        batch, count, length = tokens.shape
        same = jnp.cumprod(tokens[:, 1:] == tokens[:, :-1], -1).sum(-1)
        shared = jnp.pad(same, ((0, 0), (1, 0)), constant_values=-1)  # of the row before
        opens = shared[:, None] < jnp.arange(length + 1)[:, None]
        row = jnp.arange(count, dtype=jnp.int32)
        starts = lax.cummax(jnp.where(opens, row, 0), axis=2)
        at = (jnp.arange(batch)[:, None, None], jnp.arange(length + 1)[:, None], starts)
        best = jnp.full(starts.shape, -jnp.inf, jnp.float32).at[at].max(bonus[:, None])
        return cls(tokens, starts, best, fixed)

    @property
    def max_length(self) -> int:
        return self.tokens.shape[-1]

    @property
    def fixed_length(self) -> int | None:
        return self.max_length if self.fixed else None

    @property
    def completion_width(self) -> int:
        """How many tokens are left after two, as few planned identifiers share more. It is 0 where
        scoring them at once would not pay for compiling it."""
        left = self.max_length - 2
        return left if left > 2 else 0

    def init(self, batch_size: int) -> PlannedState:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return PlannedState(zeros, zeros)

    def rows(self, state: PlannedState) -> jax.Array:
        """Rows of `tokens`; of equal ones the first."""
        return jnp.where(state.start < _DEAD, -2 - state.start, -1)

    def bonus(self, state: PlannedState) -> jax.Array:
        """See beam_search.Guide."""
        row = jnp.where(state.start < _DEAD, -2 - state.start, jnp.maximum(state.start, 0))
        query = jnp.arange(row.shape[0])[:, None]
        return self.best.at[query, jnp.maximum(state.depth, 0), row].get(mode="clip")

    def expand(
        self, state: PlannedState, scores: jax.Array, prior: jax.Array, *, width: int
    ) -> Candidates:
        """See Constraint.expand. C = n: one for every row that begins a child of a live beam."""
        batch, count, _ = self.tokens.shape
        query, row = jnp.arange(batch)[:, None], jnp.arange(count, dtype=jnp.int32)
        live = (state.start >= 0) & (prior > -jnp.inf)
        depth = jnp.max(jnp.where(live, state.depth, 0))
        tokens, here, below = self._at(depth)
        beam = jnp.arange(state.start.shape[1], dtype=jnp.int32)
        stands = jnp.full((batch, count), _DEAD, jnp.int32)
        stands = stands.at[query, jnp.where(live, state.start, count)].set(beam, mode="drop")
        parent = jnp.take_along_axis(stands, here, -1)
        legal = (parent >= 0) & (tokens > 0) & (below == row)
        parent = jnp.maximum(parent, 0)
        gained = scores.at[query, parent, tokens].get(mode="clip").astype(jnp.float32)
        total = jnp.take_along_axis(prior, parent, -1) + gained
        complete = legal & (self._lengths() == depth + 1)
        start = jnp.where(legal, jnp.where(complete, -2 - row, row), _DEAD)
        depths = jnp.where(legal, depth + 1, _DEAD)
        log_probs = jnp.where(legal, total, -jnp.inf)
        state = PlannedState(start, depths)
        return Candidates(parent, jnp.where(legal, tokens, 0), log_probs, state, complete)

    def completions(self, state: PlannedState, width: int) -> Completions:
        """The rest of identifiers that are alone in their interval; see Completions."""
        batch, count, length = self.tokens.shape
        live, start = state.start >= 0, jnp.maximum(state.start, 0)
        depth = jnp.max(jnp.where(live, state.depth, 0))
        query, row = jnp.arange(batch)[:, None], jnp.arange(count, dtype=jnp.int32)
        _, here, _ = self._at(depth)
        last = jnp.zeros_like(here).at[query, here].max(self.starts[:, length])
        alone = jnp.take_along_axis(last == row, start, -1)
        left = jnp.take_along_axis(self._lengths(), start, -1) - depth
        lengths = jnp.where(live, jnp.where(alone & (left <= width), left, -1), 0)
        at = depth + jnp.arange(width, dtype=jnp.int32)
        tokens = self.tokens.at[query[..., None], start[..., None], at].get(mode="clip")
        tokens = jnp.where(at - depth < lengths[..., None], tokens, 0)
        ended = lengths > 0
        state = PlannedState(
            jnp.where(ended, -2 - start, _DEAD), jnp.where(ended, state.depth + lengths, _DEAD)
        )
        return Completions(tokens, lengths, state)

    def log_probs(self, result: BeamResult) -> jax.Array:
        """f32 [B, n]: of the identifier of each row, -inf where no beam wrote it."""
        batch, count, length = self.tokens.shape
        query = jnp.arange(batch)[:, None]
        there = jnp.where(result.valid, result.rows, count)
        written = jnp.full((batch, count), -jnp.inf, jnp.float32)
        written = written.at[query, there].set(result.log_probs, mode="drop")
        of_row = jnp.take_along_axis(written, self.starts[:, length], -1)
        return jnp.where(self.tokens[..., 0] > 0, of_row, -jnp.inf)

    def _lengths(self) -> jax.Array:
        return (self.tokens > 0).sum(-1, dtype=jnp.int32)

    def _at(self, depth: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, n] each: the token of every row after `depth` tokens, where its interval starts, and
        where the interval of the child that it lies in does."""
        take = lambda leaf, index, axis: lax.dynamic_index_in_dim(leaf, index, axis, keepdims=False)
        return (
            take(self.tokens, depth, 2),
            take(self.starts, depth, 1),
            take(self.starts, depth + 1, 1),
        )
