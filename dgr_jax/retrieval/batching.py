"""Queries in batches of a few padded lengths, and what is found for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dgr_jax.corpora import ranking
from dgr_jax.corpora.types import ScoredPassage

BLOCK = 4096  # queries tokenised, and sorted by length, together

Found = tuple[np.ndarray, np.ndarray]


class Shapes(NamedTuple):
    """Lengths that texts are padded to, EOS counted: `longest`, its half, quarter ... of at least
    `shortest` tokens; of these, one that at least `texts_per_shape` texts need."""

    longest: int
    shortest: int
    texts_per_shape: int

    @property
    def ladder(self) -> tuple[int, ...]:
        """All lengths, ascending."""
        lengths = [self.longest]
        while (shorter := (lengths[0] + 1) // 2) >= self.shortest and shorter < lengths[0]:
            lengths.insert(0, shorter)
        return tuple(lengths)


def batches(lengths: np.ndarray, shapes: Shapes, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(padded length, places of at most `size` texts) of every batch, the longest first.

    lengths: tokens of each text, int [n].
    """
    ladder = shapes.ladder
    rung = np.searchsorted(ladder, lengths)
    for short in range(len(ladder) - 1):
        if (rung == short).sum() < shapes.texts_per_shape:
            rung[rung == short] += 1
    for used in reversed(range(len(ladder))):
        places = np.flatnonzero(rung == used)
        places = places[np.argsort(-lengths[places], kind="stable")]
        for start in range(0, len(places), size):
            yield ladder[used], places[start : start + size]


def _nothing(queries: int, depth: int) -> Found:
    return np.full((queries, depth), -1, np.int32), np.full((queries, depth), -np.inf, np.float32)


def _pairs(passages: np.ndarray, scores: np.ndarray) -> list[tuple[int, float]]:
    return [(int(i), float(s)) for i, s in zip(passages, scores, strict=True) if i >= 0]


def scored_passages(
    qids: Sequence[str], passages: np.ndarray, scores: np.ndarray, pids: Sequence[str]
) -> dict[str, list[ScoredPassage]]:
    """Arrays [n, depth] of `Decoder.passages` as a run in memory: the same as in its file, so that
    scores fall strictly (see `ranking`)."""
    run = {}
    for qid, row, values in zip(qids, passages, scores, strict=True):
        there = row >= 0
        fallen = ranking.falling(values[there])
        run[qid] = [ScoredPassage(pids[i], s) for i, s in zip(row[there], fallen, strict=True)]
    return run
