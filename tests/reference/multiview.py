"""Slow, obvious twin of dgr_jax.retrieval.multiview.index, which looks for every identifier
everywhere.

passages: lists of tokens.  tables: view -> one list of token tuples a passage.  An identifier is
(log_prob, tokens, view); a title or pseudo-query is a whole entry of its table.
"""

from __future__ import annotations

from tests.reference import passage_scoring


def times(passages, tables, p, identifier):
    """How often passage p holds an identifier."""
    _, tokens, view = identifier
    if view == "body":
        return len(passage_scoring.places(passages[p], list(tokens)))
    return int(tuple(tokens) in tables[view][p])


def bound(passages, p, rare, weights):
    """The most that the identifiers `rare` of passage p could add."""
    starts, total = {}, 0.0
    for k, (_, tokens, view) in rare:
        if view != "body":
            total += weights[k]
        for place in passage_scoring.places(passages[p], list(tokens)) if view == "body" else ():
            starts[min(place)] = max(starts.get(min(place), 0.0), weights[k])
    return total + sum(starts.values())


def rank(passages, tables, identifiers, scoring, allowed=None):
    """([(passage, score)] best first, bounds of all nominated passages)."""
    everywhere = range(len(passages))
    num_tokens = sum(map(len, passages))
    counts = [sum(times(passages, tables, p, i) for p in everywhere) for i in identifiers]
    weights = [
        passage_scoring.weight(i[0], count, i[2], num_tokens, scoring) if count else 0.0
        for i, count in zip(identifiers, counts, strict=True)
    ]
    bounds = {}
    for p in everywhere:
        rare = [
            (k, i)
            for k, i in enumerate(identifiers)
            if weights[k] > 0 and counts[k] <= scoring.common and times(passages, tables, p, i)
        ]
        if rare and (allowed is None or allowed[p]):
            bounds[p] = bound(passages, p, rare, weights)
    stay = sorted(bounds, key=lambda p: (-bounds[p], p))[: scoring.max_passages]
    scores = {}
    for p in stay:
        found = [
            (log_prob, count, list(tokens), view)
            for (log_prob, tokens, view), count in zip(identifiers, counts, strict=True)
            if count and times(passages, tables, p, (log_prob, tokens, view))
        ]
        scores[p] = passage_scoring.passage_score(passages[p], found, num_tokens, scoring)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0])), bounds
