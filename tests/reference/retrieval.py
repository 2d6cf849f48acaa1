"""Slow, obvious twin of dgr_jax.retrieval.generative.rank_passages."""

from __future__ import annotations


def rank_passages(rows, log_probs, owners, depth, allowed=None):
    """[(passage, score)] of each query, best first.

    rows, log_probs: lists [B][M]; owners: passages of each identifier, ascending.
    """
    ranked = []
    for found, scores in zip(rows, log_probs, strict=True):
        listed = {}
        for row, score in zip(found, scores, strict=True):
            for passage in owners[row] if row >= 0 else ():
                if allowed is None or allowed[passage]:
                    listed.setdefault(passage, score)
        ranked.append(list(listed.items())[:depth])
    return ranked
