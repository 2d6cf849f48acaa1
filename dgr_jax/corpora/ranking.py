"""The order of passages: by score, highest first, and equal scores by pid, the lower one first.

This order is the same everywhere: in the results of a search, where a list is cut, in a run in
memory and in its file, and where measures are taken. pids are compared as strings, by their
characters' code points. There are two exceptions: beam search chooses identifiers, not passages,
and knows no pids; and a run made elsewhere may be read in the order of its own ranks (`trec.runs`).

Other tools sort a run by its scores alone, some of them in float32, and break ties in their own
ways: trec_eval by pid, the *higher* one first. So that they arrive at the order of this module, the
scores of a written run fall strictly: `falling` lowers a score that is equal to the one before it
in its last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dgr_jax.corpora.types import ScoredPassage

PidOf = Callable[[int], str]  # passage index -> pid

_SMALLEST = np.float32(2.0**-126)  # some readers cannot hold the numbers between it and 0

_NEAR_ZERO = int(_SMALLEST.view(np.int32)) - 1  # how many float32 numbers lie between it and 0

_HIGHEST = float(np.finfo(np.float32).max)


def best_first(passages: Iterable[ScoredPassage]) -> list[ScoredPassage]:
    """The passages in the order of this module."""
    return sorted(passages, key=lambda passage: (-passage.score, passage.pid))


def falling(scores: Sequence[float]) -> list[float]:
    """Lowers scores, given highest first, until each is less than the one before, also as float32.

    A score that is less already stays as it is; any other becomes the next float32 below the score
    before it (beyond the range of float32, the next float64). At the end of the range, where no
    lower number exists, the scores before it are raised instead. Raises ValueError for a score that
    is no finite number.
    """
    values = np.array(scores, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"found the score {values[~np.isfinite(values)][0]}; expected a finite number"
        )
    too_high, lowered = values[1:] > _below(values[:-1]), False
    if too_high.any() and (limits := _limits(values)) is not None:
        values[1:] = np.minimum(values[1:], limits)
        return values.tolist()
    for place in range(1, len(values)) if too_high.any() else ():
        if lowered or too_high[place - 1]:
            limit = _below(values[place - 1])
            lowered = bool(values[place] > limit)
            values[place] = min(values[place], limit)
    if len(values):
        _lift(values, np.float32 if scores[-1] >= -_HIGHEST else np.float64)
    return values.tolist()


def _lift(values: np.ndarray, kind: type[np.floating]) -> None:
    """Raises the last values, in place, where they fell below the lowest number of a float type.

    That happens where many passages have that lowest number as their score.
    """
    lowest = float(np.finfo(kind).min)
    if values[-1] >= lowest:
        return
    values[-1] = lowest
    for place in range(len(values) - 2, -1, -1):
        values[place] = max(
            values[place], float(np.nextafter(kind(values[place + 1]), kind(np.inf)))
        )


def _limits(values: np.ndarray) -> np.ndarray | None:
    """f64 [n - 1]: the highest value that each score but the first may have, computed at once; None
    where a score is, or would become, one near 0 or out of the range of float32.

    The float32 numbers, those near 0 left out, are counted from the lowest to the highest. A score
    has the number of the highest float32 that is not above it, and each score's number must be
    lower than that of the score before.
    """
    sizes = np.abs(values)
    if not (((sizes == 0) | (sizes >= _SMALLEST)) & (sizes <= _HIGHEST)).all():
        return None
    floor = values.astype(np.float32)
    with np.errstate(over="ignore"):
        floor = np.where(floor > values, np.nextafter(floor, np.float32(-np.inf)), floor)
    place = np.arange(len(values))
    numbers = np.minimum.accumulate(_numbers(floor) + place) - place
    below = numbers[:-1] - 1
    size = np.where(below == 0, 0, np.abs(below) + _NEAR_ZERO).astype(np.int32)
    with np.errstate(invalid="ignore"):
        limits = np.copysign(size.view(np.float32), below).astype(np.float64)
    return limits if np.isfinite(limits).all() else None


def _numbers(values: np.ndarray) -> np.ndarray:
    """int64: the place of each float32 in the order of all of them; the place of 0 is 0."""
    sizes = np.abs(values).view(np.int32).astype(np.int64)
    return np.where(sizes == 0, 0, np.copysign(sizes - _NEAR_ZERO, values)).astype(np.int64)


def groups(query: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """int [n], ascending: a group's number, which neighbours of one query and one score share."""
    new = (query[1:] != query[:-1]) | (scores[1:] != scores[:-1])
    return np.cumsum(np.append(np.zeros(min(1, len(query)), bool), new))


def in_order(group: np.ndarray, passages: np.ndarray, pid_of: PidOf) -> np.ndarray:
    """int [n]: the permutation that sorts neighbours of one group (see `groups`) by their pids.

    passages: int [n], passage indices.
    """
    places = np.arange(len(group))
    same = group[1:] == group[:-1]
    tied = np.flatnonzero(np.append(False, same) | np.append(same, False)) if len(group) else places
    key = lambda place: (group[place], pid_of(int(passages[place])))
    places[tied] = sorted(tied.tolist(), key=key)
    return places


def _below(values: np.ndarray) -> np.ndarray:
    """f64: for each value the highest float32 that is less, whichever way a reader rounds."""
    lowest = np.float32(-np.inf)
    inside = np.abs(values) <= _HIGHEST
    with np.errstate(over="ignore"):
        near = np.where(inside, values, 0).astype(np.float32)
        floor = np.where(near > values, np.nextafter(near, lowest), near)
        below = np.nextafter(floor, lowest)
        beside_zero = np.where(floor > 0, np.float32(0), -_SMALLEST)
        below = np.where(np.abs(below) < _SMALLEST, beside_zero, below).astype(np.float64)
        return np.where(inside & np.isfinite(below), below, np.nextafter(values, -np.inf))
