"""Slow, obvious twins of dgr_jax.analysis.drift."""

from __future__ import annotations

import math


def of_identifiers(log_probs, owners, passages):
    """p(d | q) of one query, a list of `passages`: every identifier's chance, in equal parts to
    the passages that it names, over the sum of all.

    log_probs: of each identifier; owners: the passages of each.
    """
    chances = [0.0] * passages
    for log_prob, named in zip(log_probs, owners, strict=True):
        for passage in named:
            chances[passage] += math.exp(log_prob) / len(named)
    return [chance / sum(chances) for chance in chances]


def divergence(relevance, chances):
    """KL(r || p) in nats; relevance: passage -> share."""
    return sum(r * math.log(r / chances[d]) for d, r in relevance.items() if r > 0)
