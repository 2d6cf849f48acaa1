"""Slow, obvious twins of dgr_jax.identifiers.multiview and dgr_jax.data.views."""

from __future__ import annotations

import math


def row(marker, tokens, limit):
    """A title or pseudo-query as an identifier."""
    return (marker, *tokens[:limit], 1)


def spans(passage, length):
    """Every place in a passage where a span of the training data begins, and the span."""
    if len(passage) <= length:
        return [(0, tuple(passage))] if passage else []
    return [(at, tuple(passage[at : at + length])) for at in range(len(passage) - length + 1)]


def rarity(passages, vocab_size):
    """log(1 + P / passages that hold a token), at least one."""
    held = [sum(token in passage for passage in passages) for token in range(vocab_size)]
    return [math.log(1 + len(passages) / max(1, count)) for count in held]


def shares(passage, length, written, forms, weights):
    """{begin of a span: share of the query that it holds}.

    written: tokens of the query as it is written; forms: those of all its forms.
    """
    known = {token for token in written if token > 2}
    total = sum(weights[token] for token in known) if known else 1.0
    found = {}
    for at, span in spans(passage, length):
        held = {token for token in span if token in forms and token > 2}
        found[at] = min(1.0, sum(weights[token] for token in held) / total)
    return found


def is_prefix(a, b):
    """Whether a begins b."""
    return tuple(b[: len(a)]) == tuple(a)
