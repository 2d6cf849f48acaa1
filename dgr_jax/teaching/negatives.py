"""Negatives for training, from a run (that of BM25, or the retriever's own last one) or random.

Axis letters: n queries, R positives of a query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mine(
    candidates: np.ndarray,
    positives: np.ndarray,
    *,
    count: int,
    num_passages: int,
    skip: int = 0,
    seed: int | Sequence[int] = 0,
) -> np.ndarray:
    """Draws `count` negatives for each query, without repeats, each candidate with the same chance.

    Where a query has fewer candidates that are not positive, random passages of the corpus are
    added. So candidates of width 0 give random negatives, and exactly `count` usable candidates are
    all taken.

    Args:
      candidates: int [n, depth], passage indices of a run, best first, -1 at padding. A deep run
        gives easy negatives, a shallow one hard and sometimes false ones.
      positives: int [n, R], all passages known to be relevant, none of which is drawn; -1 at
        padding.
      num_passages: size of the corpus.
      skip: how many of the best candidates that are not positive to leave out, as they are often
        unjudged answers.
      seed: another seed gives another draw; a query's draw depends on its row too.

    Returns int32 [n, count]: negatives from the run first, in its order; -1 where the corpus has no
    more. Raises ValueError for a passage index that the corpus does not have.
    """
    candidates, positives = _checked(candidates, positives, num_passages)
    if count < 0 or skip < 0:
        raise ValueError(f"mine: got count={count}, skip={skip}, expected 0 or more")
    rng = np.random.default_rng(seed)
    usable = candidates >= 0
    for column in positives.T:
        usable &= candidates != column[:, None]
    usable &= np.cumsum(usable, axis=1) > skip
    draws = np.where(usable, rng.random(candidates.shape), 1.0)
    chosen = usable & (draws.argsort(axis=1).argsort(axis=1) < count)  # those with the lowest draws
    negatives = np.full((len(candidates), count), -1, np.int32)
    rows, columns = np.nonzero(chosen)
    places = (np.cumsum(chosen, axis=1) - 1)[rows, columns]
    negatives[rows, places] = candidates[rows, columns]
    for row in np.flatnonzero((negatives < 0).any(axis=1)):
        from_run = int(chosen[row].sum())
        taken = {*positives[row].tolist(), *negatives[row, :from_run].tolist()}
        more = _others(taken, count - from_run, num_passages, rng)
        negatives[row, from_run : from_run + len(more)] = more
    return negatives


def _others(taken: set[int], count: int, num_passages: int, rng: np.random.Generator) -> list[int]:
    """At most `count` random passages that are not taken."""
    taken = taken - {-1}
    if num_passages < 4 * (len(taken) + count):
        return [p for p in rng.permutation(num_passages).tolist() if p not in taken][:count]
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        passage = int(rng.integers(num_passages))
        if passage not in taken:
            drawn[passage] = None
    return list(drawn)


def _checked(
    candidates: np.ndarray, positives: np.ndarray, num_passages: int
) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.asarray(candidates), np.asarray(positives)
    for name, array in zip(("candidates", "positives"), arrays, strict=True):
        if array.ndim != 2 or len(array) != len(arrays[0]):
            raise ValueError(
                f"mine: {name}: got shape {list(array.shape)}, expected [n, ...] for the same n "
                "queries as candidates"
            )
        if array.max(initial=-1) >= num_passages:
            raise ValueError(
                f"mine: {name}: got passage index {array.max()}, expected less than "
                f"{num_passages}, the passages of the corpus"
            )
    return arrays
