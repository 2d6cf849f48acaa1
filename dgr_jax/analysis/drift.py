"""Drift: how far what a retriever ranks by is from what is relevant, over the whole corpus.

Of a query q, r(d | q) is the relevance distribution over passages d, p(d | q) the retriever's own:

    generative   p(d | q) ~ sum over the identifiers i of d of p(i | q) / (passages of i)
    dense        p(d | q) ~ exp(score of d): the softmax of the contrastive losses, over the corpus

each normalised over all passages, none left out, so that corpora of some ten thousand passages are
the most to ask for. The drift is the divergence

    KL(r || p) = sum_d r(d | q) log(r(d | q) / p(d | q))    in nats

0 where both agree. A retriever that knows nothing has log P less the entropy of r: the drift of a
fixed retriever grows with the corpus, and how fast is what tells two apart.

Axis letters: n queries, Q query length, P passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp

from dgr_jax.retrieval.system import System

Relevance = tuple[np.ndarray, np.ndarray]  # passage indices int [k], their shares f64 [k]


def of_grades(graded: Mapping[int, int], least: int = 1) -> Relevance:
    """r of judged passages, index -> grade: proportional to the grade where it is `least` or more.

    Raises ValueError where there is none.
    """
    relevant = {index: grade for index, grade in graded.items() if grade >= max(least, 1)}
    if not relevant:
        raise ValueError(f"relevance: got no grade of {max(least, 1)} or more, expected one")
    shares = np.array([*relevant.values()], np.float64)
    return np.array([*relevant], np.int64), shares / shares.sum()


def of_scores(scored: Mapping[int, float]) -> Relevance:
    """r of a teacher's scores, index -> score: their softmax. ValueError where there is none."""
    if not scored:
        raise ValueError("relevance: got no scores, expected one or more")
    scores = np.array([*scored.values()], np.float64)
    return np.array([*scored], np.int64), np.exp(scores - logsumexp(scores))


def divergence(log_probs: np.ndarray, relevance: Sequence[Relevance]) -> np.ndarray:
    """KL(r || p) in nats, f64 [n], from log p f64 [n, P] and r of each query."""
    nats = np.zeros(len(log_probs))
    for query, (passages, shares) in enumerate(relevance):
        some = shares > 0
        r = shares[some]
        nats[query] = (r * (np.log(r) - log_probs[query, passages[some]])).sum()
    return nats


def measure(system: System, queries: Any, relevance: Sequence[Relevance]) -> np.ndarray:
    """The drift of each query, f64 [n]. queries: as `System.encode` makes them."""
    drifts, start = [], 0
    for log_probs in system.log_probs(queries):
        end = start + len(log_probs)
        drifts.append(divergence(log_probs, relevance[start:end]))
        start = end
    return np.concatenate(drifts)
