"""Slow, obvious twins of dgr_jax.identifiers."""

from __future__ import annotations

import numpy as np


def table(rows, passages):
    """[(tokens, sorted passages)] of an identifier table, in order of the tokens."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for row, passage in zip(rows, passages, strict=True):
        tokens = tuple(int(token) for token in row if token)
        groups.setdefault(tokens, set()).add(int(passage))
    return [(tokens, sorted(groups[tokens])) for tokens in sorted(groups)]


def has_prefix(identifiers):
    """Whether one of the token tuples is a proper prefix of another."""
    return any(
        a != b and b[: len(a)] == a for a in identifiers for b in identifiers if len(a) <= len(b)
    )


def residual_codes(vectors, codebooks):
    """Codes [P, levels]: at each level the nearest entry to what the levels before leave over."""
    codes = []
    for vector in vectors.astype(np.float64):
        row = []
        for codebook in codebooks:
            distances = [((vector - entry) ** 2).sum() for entry in codebook.astype(np.float64)]
            row.append(int(np.argmin(distances)))
            vector = vector - codebook[row[-1]]
        codes.append(row)
    return np.array(codes)


def ties(codes):
    """How many passages before each one have the same codes."""
    seen: dict[tuple[int, ...], int] = {}
    numbers = []
    for row in codes.tolist():
        numbers.append(seen.get(tuple(row), 0))
        seen[tuple(row)] = numbers[-1] + 1
    return np.array(numbers)
