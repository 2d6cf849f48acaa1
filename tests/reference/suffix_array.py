"""Slow, obvious twins of dgr_jax.decoding.suffix_array: lists of passages, read from end to end."""

from __future__ import annotations

import numpy as np


def occurrences(passages, span):
    """[(passage, place)] where the tuple `span` occurs."""
    n = len(span)
    return [
        (i, at)
        for i, passage in enumerate(passages)
        for at in range(len(passage) - n + 1)
        if tuple(passage[at : at + n]) == tuple(span)
    ]


def next_tokens(passages, span):
    """{token: number of times that it follows `span`}, tokens ascending."""
    found = [
        passages[i][at + len(span)]
        for i, at in occurrences(passages, span)
        if at + len(span) < len(passages[i])
    ]
    return {token: found.count(token) for token in sorted(set(found))}


def passages_of(passages, span):
    """Passages that hold `span`, ascending."""
    return sorted({i for i, _ in occurrences(passages, span)})


def spans(passages, length):
    """All different spans of `length` tokens, sorted."""
    return sorted(
        {tuple(p[at : at + length]) for p in passages for at in range(len(p) - length + 1)}
    )


def sorted_suffixes(passages):
    """Positions in the passages, each followed by a 0, sorted by the text that begins there and
    ends with its passage; equal ones by position."""
    tokens = [token for passage in passages for token in (*passage, 0)]
    text = lambda p: tokens[p : tokens.index(0, p)]
    return sorted((p for p, token in enumerate(tokens) if token), key=text)


def expand(passages, beams, scores, width):
    """The `width` best legal (total, beam, token); ties to the smaller beam, then token.

    beams: [(span, prior) or None].  Totals are rounded to float32, as on the device.
    """
    offers = []
    for m, beam in enumerate(beams):
        if beam is not None and np.isfinite(beam[1]):
            for token in next_tokens(passages, beam[0]):
                total = np.float32(scores[m][token]) + np.float32(beam[1])
                offers.append((float(total), m, token))
    offers = [offer for offer in offers if offer[0] > -np.inf]
    return sorted(offers, key=lambda offer: (-offer[0], *offer[1:]))[:width]
