"""Tables for people, which show themselves as HTML in a notebook or a page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgr_jax import display

_CELL = "padding: 0.3em 0.8em; vertical-align: top; text-align: "


@dataclass(frozen=True, repr=False)
class Table:
    """Rows under named columns. Cells are text, whole numbers, floats (shown with three decimals)
    or None (shown as a dash); `bold` holds the (row, column) places to stand out."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    bold: frozenset[tuple[int, int]] = field(default=frozenset())

    def __repr__(self) -> str:
        return f"Table({self.caption!r}: {len(self.rows)} rows of {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        caption = f"<p><b>{html.escape(display.harmless(self.caption))}</b></p>"
        if not self.rows:
            return f"{caption}<p>none</p>"
        sides = [_side(row[i] for row in self.rows) for i in range(len(self.columns))]
        lines = [_line("th", [html.escape(display.harmless(name)) for name in self.columns], sides)]
        for place, row in enumerate(self.rows):
            cells = [html.escape(_shown(value)) for value in row]
            for i, cell in enumerate(cells):
                cells[i] = f"<b>{cell}</b>" if (place, i) in self.bold else cell
            lines.append(_line("td", cells, sides))
        return f"{caption}<table>{''.join(lines)}</table>"


def _side(column: Iterable[Any]) -> str:
    """Numbers stand to the right, text to the left."""
    return "left" if any(isinstance(value, str) for value in column) else "right"


def _line(tag: str, cells: Iterable[str], sides: Sequence[str]) -> str:
    style = _CELL if tag == "td" else f"white-space: nowrap; {_CELL}"
    shown = (
        f'<{tag} style="{style}{side}">{cell}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(shown)}</tr>"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return display.harmless(value)
    # + 0.0: no minus before a zero.
    return f"{round(value, 3) + 0.0:.3f}" if isinstance(value, float) else f"{value:,}"
