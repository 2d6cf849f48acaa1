"""Queries that lie side by side in rows of the encoder, and their encodings taken apart again.

Axis letters: B queries, Q query length, D model width, G groups, n queries of a group, R rows of a
group, W tokens of a row. See `training.packed_queries`, which lays them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class QueryRows(NamedTuple):
    """tokens int32 [G, R, W]; segments int32 [G, R, W]: 1 + number among the n of the query that a
    token is of, 0 for none; starts int32 [G, n]: place among R*W of a query's first token."""

    tokens: jax.Array
    segments: jax.Array
    starts: jax.Array

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> QueryRows | None:
        """The rows of a batch; None: its queries are not packed."""
        if "packed_query_tokens" not in batch:
            return None
        tokens, starts = batch["packed_query_tokens"], batch["packed_query_starts"]
        starts = starts.reshape(tokens.shape[0], -1)
        return cls(tokens, batch["packed_query_segments"], starts)

    def apart(self, encoded: jax.Array, valid: jax.Array) -> jax.Array:
        """Encoded rows [G*R, W, D] -> each query by itself [B, Q, D], 0 at padding; valid bool
        [B, Q]: False there."""
        groups, rows, width = self.tokens.shape
        there, length = valid.reshape(groups, -1), valid.shape[-1]
        places = self.starts[..., None] + jnp.arange(length)
        places = jnp.minimum(places.reshape(groups, -1), rows * width - 1)
        segments = self.segments.reshape(groups, -1)
        query = jnp.maximum(segments - 1, 0)
        offsets = jnp.arange(rows * width) - jnp.take_along_axis(self.starts, query, axis=1)
        back = query * length + offsets
        flat = encoded.reshape(groups, -1, encoded.shape[-1])
        taken = _taken(flat, places, there, back, segments > 0)
        return taken.reshape(*valid.shape, -1)


@jax.custom_vjp
def _taken(
    x: jax.Array, places: jax.Array, there: jax.Array, back: jax.Array, used: jax.Array
) -> jax.Array:
    """x [G, N, D] at places int32 [G, M], 0 where `there`, bool [G, M], is False. `back`, int32
    [G, N], are the places turned round for those of N that are used, bool [G, N]: so the gradient
    is taken as well, and not scattered."""
    return jnp.where(there[..., None], jnp.take_along_axis(x, places[..., None], axis=1), 0)


def _taken_forward(x: Any, places: Any, there: Any, back: Any, used: Any) -> Any:
    return _taken(x, places, there, back, used), (back, used)


def _taken_backward(kept: Any, gradient: jax.Array) -> Any:
    back, used = kept
    taken = jnp.take_along_axis(gradient, back[..., None], axis=1)
    return jnp.where(used[..., None], taken, 0), None, None, None, None


_taken.defvjp(_taken_forward, _taken_backward)
