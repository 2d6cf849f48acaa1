"""The rows of an identifier table, and which of them are those of a passage. NumPy only."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class IdentifierRows(Protocol):
    """The parts of an identifier table that are needed here."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def passages(self) -> np.ndarray: ...
    @property
    def num_passages(self) -> int: ...


class ByPassage:
    """The rows of an identifier table by passage: of p, rows[offsets[p]:offsets[p + 1]]."""

    def __init__(self, table: IdentifierRows) -> None:
        rows = np.repeat(np.arange(len(table.tokens), dtype=np.int32), np.diff(table.offsets))
        self.rows = rows[np.argsort(table.passages, kind="stable")]
        sizes = np.bincount(table.passages, minlength=table.num_passages)
        self.offsets = np.append(0, np.cumsum(sizes))

    def of(self, passages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All rows of each passage: which of the passages, int64 [S], ascending; row int32 [S]."""
        first = self.offsets[passages]
        sizes = self.offsets[passages + 1] - first
        pair = np.repeat(np.arange(len(passages)), sizes)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return pair, self.rows[first[pair] + within]
