"""Slow, obvious twin of dgr_jax.decoding.passage_scoring: one passage, one identifier at a time.

An identifier is (log_prob, count, tokens, view): tokens a list without padding, view one of
"title", "body", "query".  The occurrences of a body span are looked up in the passage itself.
"""

from __future__ import annotations

import math

NEAREST = -1e-6  # as near to 0 as a log-probability counts


def weight(log_prob, count, view, num_tokens, scoring):
    """w_k in float64."""
    corpus = min(math.log((count + scoring.smoothing) / (num_tokens + scoring.smoothing)), NEAREST)
    if view == "query":
        log_prob = min(log_prob + scoring.query_shift, scoring.query_cap)
    log_prob = min(log_prob, NEAREST)
    if log_prob == -math.inf:
        return 0.0
    model_odds = log_prob - math.log(-math.expm1(log_prob))
    corpus_odds = corpus - math.log(-math.expm1(corpus))
    return max(0.0, model_odds - corpus_odds) ** scoring.exponent


def places(passage, span):
    """One set of positions for each occurrence of a span in a passage."""
    n = len(span)
    return [
        set(range(start, start + n))
        for start in range(len(passage) - n + 1)
        if passage[start : start + n] == span
    ]


def contributions(passage, identifiers, num_tokens, scoring, special_ids=(1,)):
    """[w_k * r_k of each identifier, 0 for those that do not count], in the order given."""
    weights = [weight(i[0], i[1], i[3], num_tokens, scoring) for i in identifiers]
    best_first = sorted(range(len(identifiers)), key=lambda k: (-weights[k], -identifiers[k][0], k))
    parts, covered_tokens, covered_places = [0.0] * len(identifiers), set(), set()
    for k in best_first:
        _, _, tokens, view = identifiers[k]
        tokens = [token for token in tokens if token not in special_ids]
        if not tokens:
            continue
        if view == "body":
            here = places(passage, tokens)
            if here and all(place & covered_places for place in here):
                continue
            covered_places = covered_places.union(*here)
        fresh = len(set(tokens) - covered_tokens) / len(set(tokens))
        covered_tokens |= set(tokens)
        parts[k] = weights[k] * (1 - scoring.repetition + scoring.repetition * fresh)
    return parts


def passage_score(passage, identifiers, num_tokens, scoring, special_ids=(1,)):
    """The score of one passage, a list of tokens."""
    return sum(contributions(passage, identifiers, num_tokens, scoring, special_ids))
