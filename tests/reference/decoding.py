"""Slow, obvious twins of dgr_jax.decoding: sets of tuples, dictionaries and sorting.

A model is a function (query index, prefix tuple) -> logits [V] as float64.
"""

from __future__ import annotations

import numpy as np


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def unique_rows(rows, lengths=None, eos_id=None):
    """The identifiers as a sorted list of tuples."""
    lengths = [len(row) for row in rows] if lengths is None else lengths
    end = () if eos_id is None else (eos_id,)
    return sorted({tuple(map(int, row[:n])) + end for row, n in zip(rows, lengths, strict=True)})


def legal_tokens(rows, prefix):
    """Tokens that continue `prefix` towards one of `rows`, ascending."""
    n = len(prefix)
    return sorted({row[n] for row in rows if len(row) > n and row[:n] == prefix})


def token_log_probs(model, query, rows, prefix, renormalise=False):
    """{legal token: log-probability}."""
    logits = np.asarray(model(query, prefix), np.float64)
    legal = legal_tokens(rows, prefix)
    if not legal:
        return {}
    scores = log_softmax(logits[legal]) if renormalise else log_softmax(logits)[legal]
    return dict(zip(legal, scores, strict=True))


def exhaustive(model, query, rows, renormalise=False, length_penalty=0.0):
    """All rows with their log-probabilities, best (penalised) first; ties by row."""
    found = []
    for row in rows:
        log_prob = sum(
            token_log_probs(model, query, rows, row[:t], renormalise)[row[t]]
            for t in range(len(row))
        )
        found.append((row, log_prob))
    return sorted(found, key=lambda item: (-item[1] / len(item[0]) ** length_penalty, item[0]))


def beam_search(model, query, rows, num_beams, renormalise=False, length_penalty=0.0):
    """[(row, log_prob)], best first: every legal continuation of every live beam competes."""
    live, finished = [((), 0.0)], []
    is_row = set(rows)
    while live:
        offers = []
        for prefix, log_prob in live:
            steps = token_log_probs(model, query, rows, prefix, renormalise)
            offers += [((*prefix, token), log_prob + step) for token, step in steps.items()]
        offers.sort(key=lambda offer: -offer[1])
        finished += [offer for offer in offers if offer[0] in is_row]
        finished.sort(key=lambda item: -item[1] / len(item[0]) ** length_penalty)
        finished = finished[:num_beams]
        live = [offer for offer in offers if offer[0] not in is_row][:num_beams]
    return finished
