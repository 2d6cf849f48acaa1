"""Sampling under a constraint, in one lax.while_loop with a decoder cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dgr_jax.decoding.beam_search import BeamResult, StepFn, check_sizes, expanded
from dgr_jax.decoding.constraint import Constraint, State


class _Drawn(NamedTuple):
    position: jax.Array
    last: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    ended: jax.Array
    state: State
    cache: Any
    key: jax.Array


def sample(
    step_fn: StepFn,
    constraint: Constraint,
    cache: Any,
    *,
    key: jax.Array,
    batch_size: int,
    num_samples: int,
    max_length: int | None = None,
    start_id: int = 0,
    temperature: float = 1.0,
    best_tokens: int = 64,
) -> BeamResult:
    """num_samples independent legal sequences a query, in no order.

    temperature: divides the log-probabilities before drawing; log_probs are reported without it.
    best_tokens: the most likely legal tokens that a token is drawn from; all of them when no
      node has more children.
    The other arguments are those of beam_search; M is num_samples. Sequences that have not ended
    after max_length tokens are not valid.

    Raises ValueError for a temperature not above 0 and for sizes below 1.
    """
    length = constraint.max_length if max_length is None else max_length
    check_sizes("sample", num_samples=num_samples, max_length=length, best_tokens=best_tokens)
    if not temperature > 0:
        raise ValueError(f"sample.temperature must be above 0; got {temperature}")
    shape = (batch_size, num_samples)
    state = jax.tree.map(
        lambda leaf: jnp.repeat(leaf[:, None], num_samples, 1), constraint.init(batch_size)
    )
    drawn = _Drawn(
        position=jnp.int32(0),
        last=jnp.full(shape, start_id, jnp.int32),
        tokens=jnp.zeros((*shape, length), jnp.int32),
        log_probs=jnp.zeros(shape, jnp.float32),
        ended=jnp.zeros(shape, bool),
        state=state,
        cache=cache,
        key=key,
    )

    def unfinished(drawn):
        return (drawn.position < length) & ~drawn.ended.all()

    def advance(drawn):
        logits, cache = step_fn(drawn.last, drawn.cache, drawn.position)
        candidates = _expand_alone(constraint, drawn.state, logits, best_tokens)
        return _draw(drawn._replace(cache=cache), candidates, best_tokens, temperature)

    drawn = lax.while_loop(unfinished, advance, drawn)
    valid = drawn.ended & (drawn.log_probs > -jnp.inf)
    log_probs = jnp.where(valid, drawn.log_probs, -jnp.inf)
    tokens = jnp.where(valid[..., None], drawn.tokens, 0)
    return BeamResult(tokens, log_probs, valid, constraint.rows(drawn.state))


def _draw(drawn, candidates, best_tokens, temperature):
    """One more token of every sequence that has not ended, from its candidates [B, M, C]."""
    best, place = lax.top_k(candidates.log_probs, min(best_tokens, candidates.log_probs.shape[-1]))
    key, now = jax.random.split(drawn.key)
    choice = jax.random.categorical(now, best / temperature)[..., None]
    place = jnp.take_along_axis(place, choice, -1)

    def pick(leaf, otherwise):
        index = place.reshape(place.shape + (1,) * (leaf.ndim - 3))
        chosen = jnp.take_along_axis(leaf, index, 2)[:, :, 0]
        ended = drawn.ended.reshape(drawn.ended.shape + (1,) * (chosen.ndim - 2))
        return jnp.where(ended, otherwise, chosen)

    token = pick(candidates.token_ids, 0)
    here = jnp.arange(drawn.tokens.shape[-1]) == drawn.position
    return drawn._replace(
        position=drawn.position + 1,
        last=token,
        tokens=jnp.where(here, token[..., None], drawn.tokens),
        log_probs=drawn.log_probs + pick(candidates.log_probs, 0.0),
        ended=pick(candidates.complete, True),
        state=jax.tree.map(pick, candidates.next_state, drawn.state),
        key=key,
    )


def _expand_alone(constraint, state, logits, width):
    """Candidates [B, M, C] of each sequence for itself."""
    shape = logits.shape[:2]
    alone = lambda leaf: leaf.reshape(-1, 1, *leaf.shape[2:])
    prior = jnp.zeros((shape[0] * shape[1], 1), jnp.float32)
    candidates = expanded(constraint, jax.tree.map(alone, state), prior, alone(logits), width)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), candidates)
