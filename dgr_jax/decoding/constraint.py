"""A set of legal token sequences, as beam search needs it.

A state is a pytree of integer arrays with the leading axes of the beams. The dead state has -1 in
every leaf, and no token continues it.

The beams of a query are expanded together. Only the best of all their continuations are needed, so
no beam is ranked by itself, and the scores are read once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dgr_jax.decoding.selection import joint_top_k

State = Any


class Candidates(NamedTuple):
    """Legal continuations of the beams of each query, in no special order.

    parent: int32 [B, C], the beam that is continued.
    token_ids: int32 [B, C].
    log_probs: f32 [B, C], prior + score, -inf in slots without a legal continuation.
    next_state: leaves [B, C, ...].
    complete: bool [B, C], whether the sequence ends with this token.
    Complete continuations of equal log_prob are ordered by parent, then token; so are the others.
    """

    parent: jax.Array
    token_ids: jax.Array
    log_probs: jax.Array
    next_state: State
    complete: jax.Array


class Completions(NamedTuple):
    """The remaining tokens after states that can be completed in a single way.

    tokens: int32 [B, M, W], 0 after the end.
    lengths: int32 [B, M], how many tokens remain; 0 for dead states, and -1 where there are other
      continuations or more than W tokens remain.
    state: leaves [B, M, ...], the state after the last token; dead where lengths is not above 0.
    """

    tokens: jax.Array
    lengths: jax.Array
    state: State


class Constraint(Protocol):
    """A set of legal sequences; a pytree, so that jitted functions take it as an argument.

    A constraint that knows where nothing is left to choose may also have `completion_width`
    (static): the W for which its method `completions(state, W) -> Completions` is worth calling.
    beam_search then scores the rest of all beams at once.
    """

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, or a bound (static)."""

    @property
    def fixed_length(self) -> int | None:
        """Tokens of every sequence when all have the same number, else None (static)."""

    @property
    def renormalise(self) -> bool:
        """Whether log-probabilities are over the legal tokens (static)."""

    def init(self, batch_size: int) -> State:
        """The state before the first token, leaves [B, ...]."""

    def expand(
        self, state: State, scores: jax.Array, prior: jax.Array, *, width: int
    ) -> Candidates:
        """At least the `width` best complete and the `width` best other legal continuations.

        state: leaves [B, M, ...], all at the same depth (dead states aside).
        scores: [B, M, V], any float dtype: logits or log-probabilities.
        prior: f32 [B, M], added to the scores: the log-probability of the beam, less the log
          normaliser of its logits unless they are normalised already or `renormalise` is set.
        """

    def rows(self, state: State) -> jax.Array:
        """The row id of complete states, -1 elsewhere; int32, shape of a leaf of the state."""


def filled(offers: Candidates, width: int) -> Candidates:
    """Candidates with slots that hold nothing, where there are fewer than `width`."""
    missing = width - offers.log_probs.shape[1]
    if missing <= 0:
        return offers

    def fill(leaf, value):
        return jnp.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2),
                       constant_values=value)  # fmt: skip

    return Candidates(
        parent=fill(offers.parent, 0),
        token_ids=fill(offers.token_ids, 0),
        log_probs=fill(offers.log_probs, -jnp.inf),
        next_state=jax.tree.map(lambda leaf: fill(leaf, -1), offers.next_state),
        complete=fill(offers.complete, False),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """Every sequence is legal: ended by `eos_id`, or after `max_length` tokens without one."""

    max_length: int = dataclasses.field(metadata={"static": True})
    eos_id: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def fixed_length(self) -> int | None:
        """max_length, or None where a closing token may end a sequence earlier."""
        return self.max_length if self.eos_id is None else None

    @property
    def renormalise(self) -> bool:
        """False: all tokens are legal, so that there is nothing to renormalise."""
        return False

    def init(self, batch_size: int) -> jax.Array:
        return jnp.zeros(batch_size, jnp.int32)

    def expand(
        self, state: jax.Array, scores: jax.Array, prior: jax.Array, *, width: int
    ) -> Candidates:
        batch, beams, size = scores.shape
        prior = jnp.where(state < 0, -jnp.inf, prior)
        closes = beams if self.eos_id is not None else 0
        best, place = joint_top_k(scores, prior, min(width + closes, beams * size))
        parent, tokens = place // size, place % size
        if self.eos_id is not None:
            best = jnp.where(tokens == self.eos_id, -jnp.inf, best)
            closing = scores[..., self.eos_id].astype(jnp.float32) + prior
            best = jnp.append(best, closing, -1)
            beam = jnp.broadcast_to(jnp.arange(beams), closing.shape)
            parent = jnp.append(parent, beam, -1)
            tokens = jnp.append(tokens, jnp.full_like(beam, self.eos_id), -1)
        depth = jnp.take_along_axis(state, parent, -1) + 1
        complete = depth >= self.max_length if self.eos_id is None else tokens == self.eos_id
        return Candidates(parent, tokens, best, jnp.where(best > -jnp.inf, depth, -1), complete)

    def rows(self, state: jax.Array) -> jax.Array:
        return jnp.full(state.shape, -1, jnp.int32)
