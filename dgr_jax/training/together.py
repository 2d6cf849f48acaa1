"""Generation examples of one query side by side, so that it is encoded once. NumPy only.

From a pair of a query and a passage, a student of several views learns many identifiers: spans of
the text, pseudo-queries, the title. All of a view are asked for with the same encoder input.

Axis letters: n groups, S examples of a group.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

_INPUTS = "encoder_input_tokens"
_BLOCK = 1 << 16  # examples that are looked at together


@dataclass(frozen=True)
class _Groups:
    """Where the examples of each group lie: those of its query begin at start [n] and are count [n]
    many; its own are S of them from first [n] on, and go round where there are fewer."""

    start: np.ndarray
    count: np.ndarray
    first: np.ndarray
    size: int

    def rows(self, groups: Any) -> np.ndarray:
        """Numbers of the examples of these groups, int [..., S]."""
        places = self.first[groups][..., None] + np.arange(self.size)
        return self.start[groups][..., None] + places % self.count[groups][..., None]


@dataclass(frozen=True)
class _Grouped:
    """A feature [examples, ...] as [n, S, ...], or of each group's first example, [n, ...]. It is
    read as an array is, by the numbers of groups, and nothing is copied before."""

    values: np.ndarray
    groups: _Groups
    first: bool

    def __len__(self) -> int:
        return len(self.groups.start)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        of_group = () if self.first else (self.groups.size,)
        return (len(self), *of_group, *self.values.shape[1:])

    def __getitem__(self, groups: Any) -> np.ndarray:
        return self.values[self.groups.start[groups] if self.first else self.groups.rows(groups)]


def grouped(features: Mapping[str, np.ndarray], size: int) -> dict[str, Any]:
    """The features of generation examples in groups of `size` neighbours with the same input:
    encoder_input_tokens [n, Q], all others [n, size, ...]. Where an input has fewer examples, or a
    number of them that is no multiple, some stand in its groups more than once."""
    groups = _groups(features[_INPUTS], size)
    examples, places = len(features[_INPUTS]), len(groups.start) * size
    logger.info("%s examples in %s places, %d an encoding", f"{examples:,}", f"{places:,}", size)
    return {name: _Grouped(values, groups, name == _INPUTS) for name, values in features.items()}


def _groups(inputs: np.ndarray, size: int) -> _Groups:
    """inputs: int32 [examples, Q], those of a query one after another."""
    starts = [np.zeros(1, np.int64)]
    for block in range(0, len(inputs), _BLOCK):
        held = np.asarray(inputs[block : block + _BLOCK + 1])
        starts.append(block + 1 + np.flatnonzero((held[1:] != held[:-1]).any(-1)))
    start = np.concatenate(starts)
    count = np.diff(start, append=len(inputs))
    repeats = -(-count // size)
    number = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return _Groups(np.repeat(start, repeats), np.repeat(count, repeats), number * size, size)
