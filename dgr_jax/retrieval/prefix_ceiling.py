"""The best recall of beam search where passages share prefixes, even for a perfect student.

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

    Beam search keeps the most probable prefixes, and a prefix has the probability of all passages
    below it. This student gives each of n positives the probability (1 - spread) / n, and divides
    the rest equally among the other passages. Scored one by one, all positives come first. Scored
    by prefixes, a positive that is alone below its prefix is lost when many other passages share
    another prefix and are more probable together. Wu et al. 2025 (Constrained Auto-Regressive
    Decoding Constrains Generative Retrieval) prove that beam search keeps the best positive and may
    lose the others where few are relevant; this number is our own.
    With spread 0 no positive is lost to prefixes: a beam of W keeps W positives, or all.
    """

    def __init__(self, identifiers: np.ndarray) -> None:
        """identifiers: int [P, T], one for each passage, right-padded with 0."""
        rows, row_of = np.unique(np.asarray(identifiers), axis=0, return_inverse=True)
        self._row_of = row_of.ravel()
        self._prefixes = prefix_starts(rows).cumsum(0) - 1  # int [U, T]: numbers of the prefixes

    def __call__(
        self, positives: Sequence[int], width: int, k: int, spread: float = SPREAD
    ) -> float:
        """The share of the positives, 0 to 1, that are among the best k passages of a beam of
        `width`. Of equally probable prefixes the smaller one is kept.

        positives: one or more passages. spread: lowered where a positive would be less than twice
        as probable as another passage.
        """
        right, passages = np.unique(positives), len(self._row_of)
        relevant, others = len(right), passages - len(right)
        spread = min(spread, others / (passages + relevant))
        chances = np.full(passages, spread / max(others, 1))
        chances[right] = (1 - spread) / relevant
        chances = np.bincount(self._row_of, chances)
        kept = np.arange(len(chances))
        for prefixes in self._prefixes.T:
            mass = np.bincount(prefixes[kept], chances[kept]).round(12)  # sums may tie
            best = np.argsort(-mass, kind="stable")[:width]
            kept = kept[np.isin(prefixes[kept], best)]
        survivors = np.isin(self._row_of[right], kept).sum()
        return min(int(survivors), k) / relevant
