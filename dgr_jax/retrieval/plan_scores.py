"""Scores of planned passages: those of the plan and log-probabilities of identifiers, put together.

Axis letters: B queries, n planned passages, M other passages of a query.
"""

from __future__ import annotations

import numpy as np

from dgr_jax.corpora.ranking import PidOf
from dgr_jax.retrieval.batching import Found
from dgr_jax.retrieval.generative import cut


def joined(
    passages: np.ndarray, log_probs: np.ndarray, more: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of planned passages [B, n], with those that another search has written of
    them; and those of its other passages [B, M], -inf for planned ones.

    more, values: passages and log-probabilities of the other search [B, M], -1 and -inf: none.
    """
    same = more[:, :, None] == passages[:, None, :]
    written = np.where(same, values[:, :, None], -np.inf).max(1).astype(np.float32)
    new = np.where(same.any(2), -np.inf, values).astype(np.float32)
    return np.where(log_probs > -np.inf, log_probs, written), new


def summed(scores: np.ndarray, log_probs: np.ndarray, weight: float) -> np.ndarray:
    """Plan score + weight * log-probability of planned passages, f32 [B, n] each.

    Those without a log-probability (-inf), which no beam wrote, come after all others: their plan
    scores are shifted, so that the best is as much below the last of the others as one less in
    log-probability would be.
    """
    totals = scores + np.float32(weight) * log_probs
    written, planned = log_probs > -np.inf, scores > -np.inf
    last = np.min(totals, axis=1, where=written, initial=np.inf, keepdims=True)
    best = np.max(scores, axis=1, where=planned & ~written, initial=-np.inf, keepdims=True)
    shift = np.where(np.isfinite(last) & np.isfinite(best), last - best - np.float32(weight), 0)
    return np.where(written, totals, scores + shift.astype(np.float32))


def ranked(passages: np.ndarray, scores: np.ndarray, depth: int, pid_of: PidOf | None) -> Found:
    """The best of the passages int32 [B, n] (-1: none) by scores f32 [B, n], as `cut` orders
    them."""
    scores = np.where(passages >= 0, scores, -np.inf).astype(np.float32)
    order = np.lexsort((passages, -scores))
    passages, scores = (np.take_along_axis(part, order, 1) for part in (passages, scores))
    query, place = np.nonzero(scores > -np.inf)
    return cut(query, passages[query, place], scores[query, place], (len(passages), depth), pid_of)
