"""What beam search asks of a set of legal token sequences.

A state is a pytree of integer arrays with the leading axes of the beams.  -1 in every leaf is the
dead state: nothing continues it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

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
    renormalise: log-probabilities are over the legal tokens; `log_z` is not needed (static).
    """

    max_length: int
    renormalise: bool

    def init(self, batch_size: int) -> State:
        """The state before the first token, leaves [B, ...]."""

    def expand(
        self, state: State, log_probs: jax.Array, *, width: int, log_z: jax.Array | None = None
    ) -> Candidates:
        """The `width` most likely of all legal continuations of each state, exactly.

        state: leaves [N, ...], all at the same depth (dead states aside).
        log_probs: [N, V], any float dtype; or logits, with log_z f32 [N] their log normaliser.
        Any number of leading axes may stand for N.
        """

    def rows(self, state: State) -> jax.Array:
        """int32 [N]: the row id of complete states, -1 elsewhere."""


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """lax.top_k along the last axis, in two rounds when the axis is long; ties as in lax.top_k.

    The k largest values lie in the k blocks with the largest maxima (of equal maxima, the earlier
    block).  [..., n] -> f32 [..., k], int32 [..., k].
    """
    n = values.shape[-1]
    block = 1 << max(0, (n // max(k, 1)).bit_length() // 2)
    if n < 1024 or 4 * k * block > n:
        return lax.top_k(values, k)
    blocks = -(-n // block)
    lead = [(0, 0)] * (values.ndim - 1)
    padded = jnp.pad(values, [*lead, (0, blocks * block - n)], constant_values=-jnp.inf)
    maxima = padded.reshape(*values.shape[:-1], blocks, block).max(-1)
    _, best = lax.top_k(maxima, k)
    index = (jnp.sort(best, -1)[..., None] * block + jnp.arange(block)).reshape(*best.shape[:-1], -1)
    found, place = lax.top_k(jnp.take_along_axis(padded, index, -1), k)
    return found, jnp.take_along_axis(index, place, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """Every sequence is legal: ended by `eos_id`, or after `max_length` tokens without one."""

    max_length: int = dataclasses.field(metadata={"static": True})
    eos_id: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def renormalise(self) -> bool:
        """All tokens are legal: there is nothing to renormalise."""
        return False

    def init(self, batch_size: int) -> jax.Array:
        return jnp.zeros(batch_size, jnp.int32)

    def expand(
        self, state: jax.Array, log_probs: jax.Array, *, width: int, log_z: jax.Array | None = None
    ) -> Candidates:
        best, tokens = top_k(log_probs, min(width, log_probs.shape[-1]))
        best = best.astype(jnp.float32)
        best = best if log_z is None else best - log_z[..., None]
        best = jnp.where(state[..., None] < 0, -jnp.inf, best)
        depth = jnp.broadcast_to(state[..., None] + 1, tokens.shape)
        last = depth >= self.max_length
        complete = last if self.eos_id is None else tokens == self.eos_id
        return Candidates(tokens, best, jnp.where(best > -jnp.inf, depth, -1), complete)

    def rows(self, state: jax.Array) -> jax.Array:
        return jnp.full(state.shape, -1, jnp.int32)
