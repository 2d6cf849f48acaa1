"""Losses of generated tokens, computed in float32 from logits of any float type.

The vocabulary axis V is the large one. Only reductions read it, which XLA fuses with the cast or
comparison before them, so that under jit neither a one-hot array nor a float32 copy of the logits
exists. The target's logit is selected by a reduction and not by a gather, so that logits sharded
along V need no more than a sum over devices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the tokens' cross entropy, and the weight to divide it by.

    The smoothed target gives 1 - label_smoothing to the right token and the rest in equal parts to
    the V - 1 others, as in T5 (Raffel et al. 2020; Szegedy et al. 2016). The entropy of that target
    is subtracted, so that the loss of a perfect prediction is 0. z_loss * log(Z)^2 is added for
    every token, where Z is the softmax's normaliser; T5's z_loss is 1e-4.

    Args:
      logits: float [..., V], finite.
      targets: int [...], token ids.
      weights: f32 [...], 0 at padding.
      label_smoothing: in [0, 1).
      z_loss: 0 turns it off.

    Returns:
      (loss_sum f32 [], weight_sum f32 []).
    """
    _check(logits, targets, weights)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing!r}")
    log_z = _log_z(logits)
    loss = log_z - _target_logit(logits, targets)
    if label_smoothing:
        right, other = 1 - label_smoothing, label_smoothing / (logits.shape[-1] - 1)
        all_tokens = jnp.sum(log_z[..., None] - logits.astype(jnp.float32), -1)
        entropy = -right * math.log(right) - label_smoothing * math.log(other)
        loss = (right - other) * loss + other * all_tokens - entropy
    if z_loss:
        loss += z_loss * jnp.square(log_z)
    weights = weights.astype(jnp.float32)
    return jnp.sum(loss * weights), jnp.sum(weights)


def token_log_probs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log p(target) under the softmax over the whole vocabulary.

    Args:
      logits: float [..., T, V].
      targets: int [..., T].

    Returns:
      f32 [..., T].
    """
    _check(logits, targets)
    return _target_logit(logits, targets) - _log_z(logits)


def _target_logit(logits, targets):
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits.astype(jnp.float32), 0.0), -1)


def _log_z(logits):
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def _check(logits, targets, *more):
    shapes = [x.shape for x in (targets, *more)]
    if any(shape != logits.shape[:-1] for shape in shapes):
        raise ValueError(
            f"expected logits [..., V] with targets and weights [...]; got {logits.shape} with "
            + " and ".join(map(str, shapes))
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be token ids; got dtype {targets.dtype}")
