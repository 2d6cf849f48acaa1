"""What beam search finds at best where passages share prefixes, whatever a student has learned.

Axis letters: P passages, U identifiers, T identifier length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPREAD = 0.9


def prefix_starts(rows: np.ndarray) -> np.ndarray:
    """bool [U, T]: whether a row is the first with its prefix of t + 1 tokens.

    rows: int [U, T], one or more, sorted, right-padded.
    """
    changed = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
    return np.concatenate([np.ones((1, rows.shape[1]), bool), changed])


class PrefixCeiling:
    """Recall by beam search of a student that ranks a query's positives before all other passages.

    Beam search keeps the prefixes of most probability, and a prefix has that of all passages below
    it. This student gives each of n positives (1 - spread) / n, and every other passage the same
    part of the rest. Scored one by one, all positives come first; by prefixes, a positive that is
    alone below its own is lost where so many other passages share another that these are more
    probable together. That beam search keeps the best and may lose the others, where few are
    relevant, is proved by Wu et al. 2025 (Constrained Auto-Regressive Decoding Constrains
    Generative Retrieval); this number is our own.
    With spread 0 prefixes cost nothing: a beam of W keeps W of the positives, or all.
    """

    def __init__(self, identifiers: np.ndarray) -> None:
        """identifiers: int [P, T], one of each passage, right-padded with 0."""
        rows, row_of = np.unique(np.asarray(identifiers), axis=0, return_inverse=True)
        self._row_of = row_of.ravel()
        self._prefixes = prefix_starts(rows).cumsum(0) - 1  # the number of each, int [rows, T]

    def __call__(
        self, positives: Sequence[int], width: int, k: int, spread: float = SPREAD
    ) -> float:
        """Share of the positives among the best k passages that a beam of `width` finds, 0 .. 1.

        positives: passages, one or more. spread: lowered where a positive would be less than twice
        as probable as another passage. Of equally probable prefixes the smaller one is kept.
        """
        right, passages = np.unique(positives), len(self._row_of)
        number, others = len(right), passages - len(right)
        spread = min(spread, others / (passages + number))
        chances = np.full(passages, spread / max(others, 1))
        chances[right] = (1 - spread) / number
        chances = np.bincount(self._row_of, chances)
        kept = np.arange(len(chances))
        for prefixes in self._prefixes.T:
            mass = np.bincount(prefixes[kept], chances[kept]).round(12)  # sums may tie
            best = np.argsort(-mass, kind="stable")[:width]
            kept = kept[np.isin(prefixes[kept], best)]
        found = np.isin(self._row_of[right], kept).sum()
        return min(int(found), k) / number
