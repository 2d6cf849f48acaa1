"""What beam search asks of a set of legal token sequences.

A state is a pytree of integer arrays with the leading axes of the beams.  -1 in every leaf is the
dead state: nothing continues it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dgr_jax.decoding.selection import top_k

State = Any


class Candidates(NamedTuple):
    """Legal continuations of each state, C at least the `width` asked for, in no special order.

    token_ids int32 [N, C]; log_probs f32 [N, C], -inf in slots that hold nothing legal;
    next_state: leaves [N, C, ...]; complete bool [N, C]: the sequence ends with this token.
    Of equally likely continuations of a state the smaller token comes first.
    """

    token_ids: jax.Array
    log_probs: jax.Array
    next_state: State
    complete: jax.Array


class Constraint(Protocol):
    """A set of legal sequences; a pytree, so that jitted functions take it as an argument.

    max_length: tokens of the longest sequence, or a bound (static).
    fixed_length: tokens of every sequence when all have the same number, else None (static).
    renormalise: log-probabilities are over the legal tokens; `log_z` is not needed (static).
    """

    max_length: int
    fixed_length: int | None
    renormalise: bool

    def init(self, batch_size: int) -> State:
        """The state before the first token, leaves [B, ...]."""

    def expand(
        self, state: State, log_probs: jax.Array, *, width: int, log_z: jax.Array | None = None
    ) -> Candidates:
        """The `width` most likely of all legal continuations of each state, exactly, and the
        closing token (where the constraint has one and it is legal) however unlikely.

        state: leaves [N, ...], all at the same depth (dead states aside).
        log_probs: [N, V], any float dtype; or logits, with log_z f32 [N] their log normaliser.
        Any number of leading axes may stand for N.
        """

    def rows(self, state: State) -> jax.Array:
        """int32 [N]: the row id of complete states, -1 elsewhere."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """Every sequence is legal: ended by `eos_id`, or after `max_length` tokens without one."""

    max_length: int = dataclasses.field(metadata={"static": True})
    eos_id: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def fixed_length(self) -> int | None:
        """max_length, unless a closing token may end a sequence earlier."""
        return self.max_length if self.eos_id is None else None

    @property
    def renormalise(self) -> bool:
        """All tokens are legal: there is nothing to renormalise."""
        return False

    def init(self, batch_size: int) -> jax.Array:
        return jnp.zeros(batch_size, jnp.int32)

    def expand(
        self, state: jax.Array, log_probs: jax.Array, *, width: int, log_z: jax.Array | None = None
    ) -> Candidates:
        best, tokens = top_k(log_probs, min(width + 1, log_probs.shape[-1]))
        if self.eos_id is not None:
            best = jnp.append(
                jnp.where(tokens == self.eos_id, -jnp.inf, best),
                log_probs[..., self.eos_id, None],
                -1,
            )
            tokens = jnp.append(tokens, jnp.full_like(tokens[..., :1], self.eos_id), -1)
        best = best.astype(jnp.float32)
        best = best if log_z is None else best - log_z[..., None]
        best = jnp.where(state[..., None] < 0, -jnp.inf, best)
        depth = jnp.broadcast_to(state[..., None] + 1, tokens.shape)
        last = depth >= self.max_length
        complete = last if self.eos_id is None else tokens == self.eos_id
        return Candidates(tokens, best, jnp.where(best > -jnp.inf, depth, -1), complete)

    def rows(self, state: jax.Array) -> jax.Array:
        return jnp.full(state.shape, -1, jnp.int32)
