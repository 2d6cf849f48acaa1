"""Lists of next tokens for spans that occur often but have few different next tokens.

"the united states of" may occur fifty thousand times with forty different next tokens. Those are
too many suffixes to read, and too few legal tokens to find by trying. For such spans the first
suffix of every continuation is listed when the index is built; other spans need no list.
"""

from __future__ import annotations

import dataclasses

import numpy as np

OFTEN = 256  # spans that occur less often have no list, as all their suffixes can be read
MOST = 1024  # spans with more next tokens have no list, as trying tokens finds legal ones soon
SAVING = 4  # a list is kept when it is this many times shorter than the interval
_CHUNK = 1 << 22  # how many suffixes are read at a time


@dataclasses.dataclass(frozen=True)
class SpanBranches:
    """The lists of all spans that have one. Axis letters: W spans with a list, C continuations.

    lows int32 [W]: the first suffix of each span, ascending within a depth.
    levels int32 [L + 1]: spans of d tokens, 0 <= d < L, are [levels[d], levels[d + 1]).
    ranges int32 [W + 1]: the continuations of span w are [ranges[w], ranges[w + 1]).
    children int32 [C]: the first suffix of each continuation.
    """

    lows: np.ndarray
    levels: np.ndarray
    ranges: np.ndarray
    children: np.ndarray


def find(
    tokens: np.ndarray, suffixes: np.ndarray, first: np.ndarray, max_length: int
) -> SpanBranches:
    """The lists of all spans of 1 to max_length - 1 tokens; see SuffixArray for the arrays."""
    lows, sizes, children, levels = [], [], [], [0, 0]
    bounds = _often(first[:-1].astype(np.int64), first[1:].astype(np.int64))
    for depth in range(1, max_length):
        lists, following = [], []
        for part in _groups(bounds):
            node, start, end = _continuations(tokens, suffixes, depth, *bounds[:, part])
            lists.append(_listed(node, start, bounds[:, part]))
            following.append(_often(start, end))
        lows += [low for low, _, _ in lists]
        sizes += [size for _, size, _ in lists]
        children += [child for _, _, child in lists]
        levels.append(levels[-1] + sum(len(low) for low, _, _ in lists))
        bounds = np.concatenate([np.zeros((2, 0), np.int64), *following], 1)
    joined = [np.concatenate([np.zeros(0, np.int32), *x]) for x in (lows, sizes, children)]
    ranges = np.append(0, np.cumsum(joined[1]))
    arrays = joined[0], np.array(levels), ranges, joined[2]
    return SpanBranches(*(array.astype(np.int32) for array in arrays))


def _often(low, high):
    """[2, W]: the intervals of spans that occur often."""
    keep = high - low >= OFTEN
    return np.stack([low[keep], high[keep]])


def _groups(bounds):
    """Slices of intervals with at most `_CHUNK` suffixes together, or of a single longer one."""
    ends = np.cumsum(bounds[1] - bounds[0])
    at = 0
    while at < len(ends):
        before = ends[at - 1] if at else 0
        stop = max(at + 1, int(np.searchsorted(ends, before + _CHUNK, side="right")))
        yield slice(at, stop)
        at = stop


def _continuations(tokens, suffixes, depth, low, high):
    """(interval, first suffix, end) of every continuation of the intervals, in their order."""
    size = high - low
    heads = np.cumsum(size) - size
    gaps = low - np.append(low[:1], high[:-1])
    inside = np.repeat(np.tile([False, True], len(low)), np.stack([gaps, size], 1).ravel())
    following = tokens[suffixes[low[0] : high[-1]][inside] + np.int32(depth)]
    new = np.append(True, following[1:] != following[:-1])
    new[heads] = True
    at = np.flatnonzero(new)
    run = np.diff(at, append=len(following))
    legal = following[at] > 0  # 0: the passage ends
    node = np.searchsorted(heads, at, side="right") - 1
    start = at + (low - heads)[node]
    return node[legal], start[legal], (start + run)[legal]


def _listed(node, start, bounds):
    """(first suffix, length, continuations) of the lists that are worth keeping."""
    low, high = bounds
    ways = np.bincount(node, minlength=len(low))
    keep = (ways <= MOST) & (ways * SAVING <= high - low)
    return low[keep].astype(np.int32), ways[keep], start[keep[node]].astype(np.int32)
