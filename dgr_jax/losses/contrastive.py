"""Losses of a dense retriever whose queries have one or several positives.

Every loss has the signature

    f(scores [B, N], positive_mask bool [B, N], mask bool [B, N], key=None, *, settings) -> f32 [B]

over the N passages that each query is scored against: those of its own list, or all of the batch.
With s = scores / temperature, P the positives of a query (set in both masks) and N the rest of its
passages (set in `mask` alone), LSE the log of the sum of exponentials:

    single_lh    LSE_{N and p}(s) - s_p     p: the query's first positive
    rand1_lh     the same, p drawn from P
    joint_lh     |P| * LSE_{N and P}(s) - sum over P of s
    sum_marg_lh  LSE_{N and P}(s) - LSE_P(s)
    lse_pair     softplus(LSE_N(s) + LSE_P(-s)) = log(1 + sum over n, p of exp(s_n - s_p))

What they do where a query has several positives: joint_lh is least where all of them have equal
scores, and pulls them there; sum_marg_lh is content with one, and lifts most the one that is
strongest already; lse_pair lifts most the weakest, as it asks that every positive stands above
every negative.

For all of them:

- Scores may have any float type and are cast to float32. They must be finite where the mask is set,
  and may be anything, NaN and infinities included, where it is not. The loss and its gradient are
  finite as long as the differences of s fit into float32.
- A masked passage contributes exactly 0 to the loss and to the gradient.
- A query without a positive, or without a negative, gives 0 and a zero gradient.
- The order of the passages decides only which positive is the first.
- Only rand1_lh reads `key`.

Settings are Python numbers, checked at trace time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgr_jax import ranges

_LOWEST = float(jnp.finfo(jnp.float32).min)

SETTINGS = {"temperature": ranges.above(0)}  # the range of every loss's setting, by its name


def single_lh(
    scores: jax.Array,
    positive_mask: jax.Array,
    mask: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Softmax cross entropy of the first positive (as DPR, Karpukhin et al. 2020).

    The query's other positives are left out, as if they were not in the batch.

    Args:
      scores, positive_mask, mask: [B, N], see the module.
      temperature: divides the scores.

    Returns:
      f32 [B].
    """
    s, positive, negative = _clean(scores, positive_mask, mask, temperature)
    return _of_one(s, positive & (jnp.cumsum(positive, -1) == 1), negative)


def rand1_lh(
    scores: jax.Array,
    positive_mask: jax.Array,
    mask: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Softmax cross entropy of one positive, each with the same chance; see `single_lh`.

    Args:
      scores, positive_mask, mask: [B, N], see the module.
      key: a key of jax.random; the same key draws the same positives. Training gives every step
        another key, and a resumed run the same ones, so that each epoch draws anew, reproducibly.
      temperature: divides the scores.

    Returns:
      f32 [B]. Raises ValueError without a key.
    """
    if key is None:
        raise ValueError("rand1_lh draws its positives: got key=None, expected a key of jax.random")
    s, positive, negative = _clean(scores, positive_mask, mask, temperature)
    count = jnp.sum(positive, -1, keepdims=True)
    drawn = jnp.floor(jax.random.uniform(key, count.shape) * count).astype(count.dtype)
    drawn = jnp.minimum(drawn, count - 1)  # the product may be rounded up to the count
    return _of_one(s, positive & (jnp.cumsum(positive, -1) == drawn + 1), negative)


def joint_lh(
    scores: jax.Array,
    positive_mask: jax.Array,
    mask: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    per_positive: bool = False,
) -> jax.Array:
    """-log of the likelihood that |P| draws from the softmax give each positive once.

        |P| * LSE_{N and P}(s) - sum over P of s

    It is least, |P| * log |P|, where all positives have equal scores, far above the negatives.

    Args:
      scores, positive_mask, mask: [B, N], see the module.
      temperature: divides the scores.
      per_positive: divides the loss by |P|, so that queries with many positives weigh no more.

    Returns:
      f32 [B].
    """
    s, positive, negative = _clean(scores, positive_mask, mask, temperature)
    apart = _lse(s, positive | negative)[..., None] - s
    loss = jnp.sum(jnp.where(positive, apart, 0.0), -1)
    if per_positive:
        loss /= jnp.maximum(jnp.sum(positive, -1), 1)
    return _usable(loss, positive, negative)


def sum_marg_lh(
    scores: jax.Array,
    positive_mask: jax.Array,
    mask: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """-log of the probability that a draw from the softmax is any of the positives.

        LSE_{N and P}(s) - LSE_P(s)

    Args:
      scores, positive_mask, mask: [B, N], see the module.
      temperature: divides the scores.

    Returns:
      f32 [B].
    """
    s, positive, negative = _clean(scores, positive_mask, mask, temperature)
    # log(1 + e^(LSE_N - LSE_P)): near 0 the difference of the two sums would be rounding.
    loss = jax.nn.softplus(_lse(s, negative) - _lse(s, positive))
    return _usable(loss, positive, negative)


def lse_pair(
    scores: jax.Array,
    positive_mask: jax.Array,
    mask: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """A smooth maximum of 0 and s_n - s_p, over all pairs of a negative n and a positive p.

        softplus(LSE_N(s) + LSE_P(-s)) = log(1 + sum over n, p of exp(s_n - s_p))

    Args:
      scores, positive_mask, mask: [B, N], see the module.
      temperature: divides the scores.

    Returns:
      f32 [B].
    """
    s, positive, negative = _clean(scores, positive_mask, mask, temperature)
    loss = jax.nn.softplus(_lse(s, negative) + _lse(-s, positive))
    return _usable(loss, positive, negative)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    f.__name__: f for f in (single_lh, rand1_lh, joint_lh, sum_marg_lh, lse_pair)
}


def _clean(scores, positive_mask, mask, temperature):
    """(float32 scores / temperature less the highest, 0 where masked; positives; negatives)."""
    if not scores.shape == positive_mask.shape == mask.shape:
        raise ValueError(
            "scores, positive_mask and mask must have one shape [B, N]; got "
            f"{scores.shape}, {positive_mask.shape} and {mask.shape}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature!r}")
    mask, positive = mask.astype(bool), positive_mask.astype(bool)
    s = jnp.where(mask, scores.astype(jnp.float32), 0.0) / temperature
    # A common shift of all scores changes no loss. Without it, rounding would make the logarithm of
    # a sum of exponentials of large scores useless.
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(mask, s, _LOWEST), -1, keepdims=True))
    return jnp.where(mask, s - highest, 0.0), mask & positive, mask & ~positive


def _of_one(s, chosen, negative):
    """Cross entropy of the chosen passage, in the softmax over it and the negatives."""
    score = jnp.sum(jnp.where(chosen, s, 0.0), -1)
    return _usable(jax.nn.softplus(_lse(s, negative) - score), chosen, negative)


def _lse(s, chosen):
    """Log of the sum of exponentials over the chosen passages; 0 where none is chosen."""
    total = jax.nn.logsumexp(jnp.where(chosen, s, _LOWEST), axis=-1)
    return jnp.where(jnp.any(chosen, -1), total, 0.0)


def _usable(loss, positive, negative):
    """The loss, 0 for a query without a positive or without a negative."""
    return jnp.where(jnp.any(positive, -1) & jnp.any(negative, -1), loss, 0.0)
