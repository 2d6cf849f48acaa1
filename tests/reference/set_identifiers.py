"""Set identifiers by counting pieces, one passage after another."""

from __future__ import annotations

import math
from collections import Counter

K1, B = 0.9, 0.4


def sets(passages: list[list[int]], size: int) -> list[list[int]]:
    """The `size` pieces of largest BM25 impact of each passage, of equal ones the smaller first.

    passages: pieces of each, ids above 2 (the others are no text).
    """
    counts = [Counter(piece for piece in passage if piece > 2) for passage in passages]
    containing = Counter(piece for passage in counts for piece in passage)
    mean = sum(sum(passage.values()) for passage in counts) / len(counts)

    def impact(passage: Counter, piece: int) -> float:
        df = containing[piece]
        idf = math.log(1 + (len(counts) - df + 0.5) / (df + 0.5))
        scale = K1 * (1 - B + B * sum(passage.values()) / mean)
        return idf * passage[piece] / (passage[piece] + scale)

    return [
        sorted(passage, key=lambda piece: (-impact(passage, piece), piece))[:size]
        for passage in counts
    ]
