"""Slow, obvious twins of dgr_jax.retrieval.exhaustive."""

from __future__ import annotations

import numpy as np


def log_prob(logits, row, legal_rows=None):
    """log p of the tokens of one identifier, one after another.

    logits [T, V] of its tokens; legal_rows: identifiers, lists without padding, to whose tokens the
    probabilities are restricted; None: to no tokens.
    """
    total = 0.0
    for t, token in enumerate(row):
        legal = np.arange(logits.shape[1])
        if legal_rows is not None:
            legal = sorted({other[t] for other in legal_rows if other[:t] == row[:t]})
        chances = np.exp(logits[t].astype(np.float64))
        total += np.log(chances[token] / chances[legal].sum())
    return total


def lost(exact, found):
    """(share of the passages in exact that found lacks, share of queries that lack the first)."""
    shares = [len(set(a) - set(b)) / len(a) for a, b in zip(exact, found, strict=True)]
    firsts = [a[0] not in b for a, b in zip(exact, found, strict=True)]
    return np.mean(shares), np.mean(firsts)


def prefix_ceiling(identifiers, positives, width, k, spread):
    """Recall@k by beam search with the probabilities of a student that knows the positives.

    identifiers: tuples without padding, one of each passage; equal ones are found together.
    """
    number, others = len(positives), len(identifiers) - len(positives)
    spread = min(spread, others / (len(identifiers) + number))
    chances = [
        (1 - spread) / number if passage in positives else spread / others
        for passage in range(len(identifiers))
    ]
    beam = {()}
    for depth in range(1, max(map(len, identifiers)) + 1):
        mass = {}
        for identifier, chance in zip(identifiers, chances, strict=True):
            if identifier[: depth - 1] in beam:
                prefix = identifier[:depth]
                mass[prefix] = mass.get(prefix, 0.0) + chance
        beam = set(sorted(mass, key=lambda prefix: (-round(mass[prefix], 12), prefix))[:width])
    return min(k, sum(identifiers[passage] in beam for passage in positives)) / number
