"""Losses over the codes of a level: the tokens that identifiers have at one position.

Axis letters: T identifier length, C codes of a level, V vocabulary. Levels are token ids int
[..., T, C], filled up with padding; a level has its target among its codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dgr_jax.special_tokens import PAD_ID


def level_log_probs(logits: jax.Array, levels: jax.Array) -> jax.Array:
    """log p of each code under the softmax over the codes of its level alone.

    logits: float [..., T, V]; levels: int [..., T, C]. Returns f32 [..., T, C], -inf at padding; of
    a level of padding alone, -inf everywhere, with a gradient of 0.
    """
    there = levels != PAD_ID
    scores = jnp.take_along_axis(logits, levels, axis=-1).astype(jnp.float32)
    blank = ~jnp.any(there, axis=-1, keepdims=True)
    log_probs = jax.nn.log_softmax(jnp.where(there | blank, scores, -jnp.inf), axis=-1)
    return jnp.where(there, log_probs, -jnp.inf)


def cross_entropy(log_probs: jax.Array, levels: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) f32 [..., T], 0 at padding; log_probs: of `level_log_probs`; targets: int
    [..., T]."""
    is_target = (levels == targets[..., None]) & (levels != PAD_ID)
    return -jnp.sum(jnp.where(is_target, log_probs, 0.0), axis=-1)


def divergence(old: jax.Array, new: jax.Array) -> jax.Array:
    """KL(old || new) of each level, f32 [..., T]: sum over codes c of p_old(c) * (log p_old(c) -
    log p_new(c)). Both are log-probabilities [..., T, C], -inf at padding, which counts 0."""
    there = jnp.isfinite(old)
    apart = jnp.where(there, old, 0.0) - jnp.where(there, new, 0.0)
    return jnp.sum(jnp.where(there, jnp.exp(old) * apart, 0.0), axis=-1)
