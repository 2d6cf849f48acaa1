"""BM25 by its formula (Robertson; Lucene's inverse document frequency), a passage at a time."""

from __future__ import annotations

import math


def scores(query_words, passages_words, k1, b):
    """One score a passage: sum over words of idf * tf / (tf + k1 * (1 - b + b * length / mean))."""
    count = len(passages_words)
    mean = sum(map(len, passages_words)) / count
    result = []
    for words in passages_words:
        score = 0.0
        for word in query_words:
            tf = words.count(word)
            df = sum(word in other for other in passages_words)
            if tf:
                idf = math.log(1 + (count - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
        result.append(score)
    return result
