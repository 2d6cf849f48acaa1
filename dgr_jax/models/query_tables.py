"""What one pass of a student says of all passages: a table of a query, to be summed up.

A passage has members, places of the table; its score is the sum of the table there. Place 0 is
padding, and counts 0.

- `token_table` [V], of sets of tokens: place v is token v (Zeng et al. 2024).
- `code_table` [T, V], of identifiers: place t * V + v is token v at position t of the identifier;
  these log-probabilities do not depend on the tokens before.

Axis letters: see `t5`; T identifier length, P passages, M members of a passage.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax.models.t5 import Reading


def token_table(
    apply: Any, encoded: jax.Array, tokens: jax.Array, **dropout: Any
) -> tuple[jax.Array, Reading]:
    """f32 [B, V], see `Transformer.token_weights`, and what the decoder has read of the query.

    apply: of a Transformer with its parameters bound; encoded [B, Q, D], tokens int32 [B, Q].
    """
    reading = apply(encoded, tokens, method="read", **dropout)
    return apply(reading, method="token_weights"), reading


def code_table(
    apply: Any,
    encoded: jax.Array,
    tokens: jax.Array,
    length: int,
    vocab_size: int,
    **dropout: Any,
) -> jax.Array:
    """log p(token at position t | query) f32 [B, T, V], from one pass over T = `length` positions.

    In place of a code the decoder reads the t-th last token of the vocabulary at position t. Where
    codes differ by position it reads these nowhere else: they are unused, or end an identifier.
    """
    levels = vocab_size - 1 - jnp.arange(length, dtype=jnp.int32)
    levels = jnp.broadcast_to(levels, (tokens.shape[0], 1, length))
    x = apply(encoded, tokens, levels, method="decode", **dropout)
    log_probs = jax.nn.log_softmax(apply(x[:, 0], method="logits").astype(jnp.float32))
    return log_probs.at[..., 0].set(0.0)


def code_members(identifiers: jax.Array | np.ndarray, vocab_size: int) -> jax.Array:
    """Identifiers int32 [..., T] -> their members, the same shape; padding stays 0."""
    places = jnp.arange(identifiers.shape[-1], dtype=jnp.int32) * vocab_size
    return jnp.where(identifiers > 0, identifiers + places, 0)


def sums(table: jax.Array, members: jax.Array) -> jax.Array:
    """Scores of passages: table f32 [B, ...], members int [P, M], or [B, L, M] those of each query
    -> f32 [B, P] or [B, L]."""
    table, members = table.reshape(len(table), -1), members.astype(jnp.int32)
    if members.ndim == 2:
        return table[:, members].sum(-1)
    flat = jnp.take_along_axis(table, members.reshape(len(members), -1), axis=1)
    return flat.reshape(members.shape).sum(-1)
