"""Where ids stand in a sequence that they are mostly asked of in its order."""

from __future__ import annotations

from collections.abc import Sequence


class Places:
    """The place of each of different ids. As long as they are asked for in their order, some left
    out or repeated, no table of them is made."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids
        self._last = 0
        self._table: dict[str, int] | None = None

    def of(self, asked: str) -> int:
        """The place of an id; KeyError where it has none."""
        if self._table is None:
            for place in range(self._last, len(self._ids)):
                if self._ids[place] == asked:
                    self._last = place
                    return place
            self._table = {name: place for place, name in enumerate(self._ids)}
        return self._table[asked]
