"""Scores of passages from the identifiers found in them: one function for training and search.

For an identifier k of a passage with log-probability l_k and F_k occurrences in a corpus of N
tokens (SEAL, Bevilacqua et al. 2022; views and pseudo-queries: MINDER, Li et al. 2023):

    c_k = log((F_k + smoothing) / (N + smoothing))
    w_k = max(0, (l_k + log(1 - e^c_k)) - (c_k + log(1 - e^l_k))) ^ exponent
    r_k = 1 - repetition + repetition * |tokens of k not yet covered| / |tokens of k|
    s   = sum of w_k * r_k over the identifiers that count, best first

- l_k of a pseudo-query is first replaced by min(l_k + query_shift, query_cap).
- "Best first" means by w_k descending, then by l_k descending, then in the order given. Pseudo-
  queries that reach the cap often have equal weights, so that the model's own order decides.
- The tokens of an identifier are a set of token ids. A token is covered when a better identifier of
  the same passage, of any view, counts and holds it too.
- A title or pseudo-query always counts. A body span counts when one of its occurrences in the
  passage overlaps no occurrence of a better body span that counts.

Only l_k carries a gradient: order, coverage and overlap are constants of the step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dgr_jax import ranges

VIEWS = ("title", "body", "query")
TITLE, BODY, QUERY = range(3)

_HIGHEST = -1e-6  # higher log-probabilities are lowered to this, as log(1 - e^0) is not finite
_LOWEST = -1e4  # lower ones are raised to this: all weights are 0 there, -inf has no gradient
_NEVER = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Settings of passage scores; the defaults are the published ones.

    exponent: the exponent of the log-odds ratio in w_k, above 0.
    repetition: the share of w_k that is lost when all tokens are covered, 0 to 1.
    smoothing: added to F_k and N, above 0.
    query_shift: added to the log-probability of a pseudo-query.
    query_cap: the highest log-probability of a pseudo-query after the shift, below 0.
    common: an identifier that occurs more often than this nominates no passage.
    max_passages: how many of the passages nominated for a query are scored.

    Raises ValueError for values outside of these ranges.
    """

    exponent: float = 2.0
    repetition: float = 0.8
    smoothing: float = 5.0
    query_shift: float = 14.0
    query_cap: float = -1.0
    common: int = 1500
    max_passages: int = 500

    def __post_init__(self) -> None:
        ranges.check(
            self,
            exponent=ranges.above(0),
            repetition=ranges.between(0, 1),
            smoothing=ranges.above(0),
            query_shift=ranges.FINITE,
            query_cap=ranges.below(0),
            common=ranges.at_least(1),
            max_passages=ranges.at_least(1),
        )


class Identifiers(NamedTuple):
    """The identifiers of passages: each has K identifiers of T tokens, and E occurrences of them.

    log_probs f32 [..., K]: log-probability of all tokens of the identifier, given the query.
    counts int32 [..., K]: occurrences in the corpus; for a title or pseudo-query, the number of
      passages that have it.
    tokens int32 [..., K, T]: below 2^31 / K; 0 is padding, at any place.
    views int [..., K]: TITLE, BODY or QUERY.
    mask bool [..., K]: whether the passage holds the identifier; where it does not, the other
      arrays may hold any value.
    spans int32 [..., E]: the k in 0..K-1 of the body span of each occurrence, -1 at padding.
    starts int32 [..., E]: the position in the passage where this occurrence begins, in tokens.
      Scores are exact when all occurrences of the body spans are listed, in any order. Overlaps
      with occurrences that are left out are not seen, and a span without any overlaps nothing.
    """

    log_probs: jax.Array
    counts: jax.Array
    tokens: jax.Array
    views: jax.Array
    mask: jax.Array
    spans: jax.Array
    starts: jax.Array


def passage_scores(
    identifiers: Identifiers,
    num_tokens: int | float | jax.Array,
    scoring: Scoring | None = None,
    *,
    special_ids: Sequence[int] = (1,),
) -> jax.Array:
    """The score of each passage from the identifiers that it holds; see the module.

    Args:
      identifiers: their leading axes [...] are those of the passages, [B, L] in training.
      num_tokens: N, the number of tokens in the corpus. If it exceeds int32, a jitted function
        needs it as a float.
      scoring: None takes the published settings.
      special_ids: token ids that belong to no text, such as the end of a sequence and view markers.
        They are neither counted nor covered, and no part of the length of a span.

    Returns:
      f32 [...], 0 for a passage without identifiers. Finite, as is its gradient in log_probs, for
      all log-probabilities up to 0, -inf included; those of masked identifiers get exactly 0.

    Time for a passage: a sort of K * T and E steps over E occurrences; memory O(K * T + E).
    Raises ValueError for arrays whose shapes do not belong together.
    """
    scoring = Scoring() if scoring is None else scoring
    _check(identifiers)
    tokens = identifiers.tokens
    for special in special_ids:
        tokens = jnp.where(tokens == special, 0, tokens)
    mask = identifiers.mask & (tokens > 0).any(-1)
    log_probs = jnp.where(mask, identifiers.log_probs, -1.0)
    weights = identifier_weights(
        log_probs, identifiers.counts, identifiers.views, num_tokens, scoring
    )
    shares = functools.partial(_shares, repetition=scoring.repetition)
    for _ in range(weights.ndim - 1):
        shares = jax.vmap(shares)
    constants = map(lax.stop_gradient, (weights, log_probs))
    body = identifiers.views == BODY
    share = shares(*constants, tokens, body, mask, identifiers.spans, identifiers.starts)
    return jnp.sum(jnp.where(mask, weights * share, 0.0), -1)


def identifier_weights(
    log_probs: jax.Array,
    counts: jax.Array,
    views: jax.Array,
    num_tokens: int | float | jax.Array,
    scoring: Scoring | None = None,
) -> jax.Array:
    """w_k of the module's formula: f32, of the common shape of log_probs, counts and views.

    log_probs f32, counts int, views int, num_tokens: see Identifiers and passage_scores. The
    gradient is finite for all log-probabilities up to 0, -inf included; it is 0 where the weight
    is 0, above -1e-6 (log(1 - e^l) ends at 0), and for pseudo-queries that reach the cap.
    """
    scoring = Scoring() if scoring is None else scoring
    log_probs = jnp.asarray(log_probs, jnp.float32)
    total = jnp.asarray(num_tokens, jnp.float32) + scoring.smoothing
    corpus = jnp.log((jnp.asarray(counts, jnp.float32) + scoring.smoothing) / total)
    corpus = jnp.minimum(corpus, _HIGHEST)  # only tiny corpora have more counts than tokens
    shifted = log_probs + scoring.query_shift
    shifted = jnp.where(shifted < scoring.query_cap, shifted, scoring.query_cap)
    model = jnp.where(views == QUERY, shifted, log_probs)
    inside = (model > _LOWEST) & (model < _HIGHEST)
    model = jnp.where(inside, model, lax.stop_gradient(jnp.clip(model, _LOWEST, _HIGHEST)))
    odds = (model + _log1mexp(corpus)) - (corpus + _log1mexp(model))
    return jnp.where(odds > 0, jnp.where(odds > 0, odds, 1.0) ** scoring.exponent, 0.0)


def occurrences(text: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All occurrences of spans in a text, overlapping ones too, found on the host.

    text: int [S]; several passages are separated by 0. spans: int [K, T], each padded on the right
    with 0. Returns (spans int32 [E], starts int32 [E]) as in Identifiers, ordered by span, then
    start; an empty span does not occur.
    """
    places = []
    for span in np.asarray(spans).tolist():
        span = [token for token in span if token > 0]
        ends = len(text) - len(span) + 1
        at = np.flatnonzero(text[: max(ends, 0)] == span[0]) if len(span) else np.zeros(0, int)
        for offset, token in enumerate(span[1:], start=1):
            at = at[text[at + offset] == token]
        places.append(at)
    owners = np.repeat(np.arange(len(places), dtype=np.int32), [len(at) for at in places])
    return owners, np.concatenate([*places, np.zeros(0, int)]).astype(np.int32)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, exact at both ends (Maechler 2012)."""
    near = x > -0.6931472
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, close, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _order(weights: jax.Array, log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """int32 [K]: identifiers of one passage, best first, masked ones last."""
    index = jnp.arange(len(weights), dtype=jnp.int32)
    keys = jnp.where(mask, -weights, 1.0), -log_probs, index
    return lax.sort(keys, num_keys=2, is_stable=True)[-1]


def _shares(weights, log_probs, tokens, body, mask, spans, starts, *, repetition) -> jax.Array:
    """f32 [K]: r_k of the identifiers of one passage that count, 0 of the others."""
    order, counted = _order(weights, log_probs, mask), mask
    if len(spans):
        lengths = (tokens > 0).sum(-1, dtype=jnp.int32)
        counted = _without_overlaps(order, lengths, body, mask, spans, starts)
    ranked = jnp.where(counted[order, None], tokens[order], 0)
    fresh, distinct = _fresh_tokens(ranked)
    share = 1.0 - repetition + repetition * fresh / jnp.maximum(distinct, 1)
    share = jnp.zeros_like(share).at[order].set(share)
    return jnp.where(counted, share, 0.0)


def _without_overlaps(order, lengths, body, mask, spans, starts) -> jax.Array:
    """bool [K]: whether an identifier counts.

    The occurrences are visited in the order of their identifiers, best first. An occurrence that
    overlaps no occurrence of a better identifier that counts makes its own identifier count.
    """
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    owner = jnp.maximum(spans, 0)
    real = (spans >= 0) & (body & mask)[owner]
    ranks, starts, spans = lax.sort(
        (jnp.where(real, rank[owner], _NEVER), starts, jnp.where(real, owner, 0)), num_keys=1
    )
    ends = starts + lengths[spans]

    def count(counted, occurrence):
        rank, start, end = occurrence
        overlaps = (starts < end) & (start < ends) & (ranks < rank)
        free = ~(overlaps & counted).any()
        return counted | (free & (ranks == rank)), None

    counted = jnp.zeros(spans.shape, bool)
    counted, _ = lax.scan(count, counted, (ranks, starts, ends))
    real = ranks < _NEVER
    counts = jnp.zeros(body.shape, bool).at[spans].max(counted & real)
    occurs = jnp.zeros(body.shape, bool).at[spans].max(real)
    return mask & (counts | ~occurs)


def _fresh_tokens(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(how many different tokens of a row no earlier row has, how many it has): int32 [K] each.

    tokens: [K, T]. They are sorted by token, then row, so that the first of equal tokens is new.
    """
    rows = len(tokens)
    row = jnp.arange(rows, dtype=tokens.dtype)[:, None]
    keys = jnp.sort((tokens * rows + row).reshape(-1))  # sorting a single key is quick
    token, row = keys // rows, keys % rows
    new = lambda column: jnp.append(True, column[1:] != column[:-1])
    flags = (token > 0)[:, None] & jnp.stack([new(token), new(keys)], -1)
    total = jnp.zeros((rows, 2), jnp.int32).at[row].add(flags.astype(jnp.int32))
    return total[:, 0], total[:, 1]


def _check(identifiers: Identifiers) -> None:
    shape, occurring = identifiers.log_probs.shape, identifiers.spans.shape
    for name in ("counts", "views", "mask"):
        if (got := getattr(identifiers, name).shape) != shape:
            raise ValueError(
                f"passage_scores: {name} has shape {got}; expected {shape}, that of log_probs"
            )
    if identifiers.tokens.ndim != len(shape) + 1 or identifiers.tokens.shape[:-1] != shape:
        raise ValueError(
            f"passage_scores: tokens have shape {identifiers.tokens.shape}; expected {shape} and a "
            "length: those of log_probs, then the tokens"
        )
    if occurring[:-1] != shape[:-1] or len(occurring) != len(shape):
        raise ValueError(
            f"passage_scores: spans have shape {occurring}; expected {shape[:-1]} and a number of "
            "occurrences"
        )
    if identifiers.starts.shape != occurring:
        raise ValueError(
            f"passage_scores: starts have shape {identifiers.starts.shape}; expected {occurring}, "
            "that of spans"
        )
