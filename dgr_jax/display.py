"""Showing people text that others wrote: titles, passages, queries, names of files.

What is shown moves no cursor, changes no colour, turns no line around and is no markup: characters
that would are written as Python writes them (`\\x1b`, `\\u202e`), and `[bold]` and `:bee:` stay as
they are. Every console, log line, error and label of a plot of this package goes through here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# C0 but for tab and line feed, DEL and C1; marks, embeddings, overrides and isolates of the
# bidirectional algorithm; line and paragraph separators; shapers and annotations that are not seen;
# halves of surrogate pairs, which cannot be written; tags, which spell unseen words.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAKS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]+")
_NARROWEST = 20  # columns; what claims to have fewer, such as COLUMNS=0, does not know


def harmless(text: str) -> str:
    """The text with every character that a terminal would obey, or nobody would see, written out.

    Tabs and line feeds stay.
    """
    return _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def harmless_line(text: str) -> str:
    """The same on one line: tabs and ends of lines are a blank."""
    return harmless(_BREAKS.sub(" ", text))


def cell(value: object, style: str = "") -> Text:
    """A value as one line of a rich table or console, in a style, whatever the value holds."""
    from rich.text import Text

    return Text.assemble((harmless_line(str(value)), style))  # the style of no padding


def wide_console() -> Console:
    """As wide as the terminal; as wide as any table where there is none, such as in a log."""
    made = console()
    return made if made.is_terminal else console(width=200)


def console(**settings: Any) -> Console:
    """A rich console that takes every string for plain text.

    settings: of rich's `Console`.
    """
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(harmless(text), **how | {"markup": False, "emoji": False})

        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 - rich calls it where it has caught BrokenPipeError

    made = Plain(markup=False, emoji=False, **{"highlight": False} | settings)
    if made.width < _NARROWEST:
        made.width = 80
    return made


def listed(counts: Mapping[str, object]) -> str:
    """Names with underscores and their numbers as words: '12 queries, 3 without lists'."""
    shown = (
        f"{value:,}" if isinstance(value, (int, float)) else f"{value}" for value in counts.values()
    )
    names = (name.replace("_", " ") for name in counts)
    return ", ".join(map(" ".join, zip(shown, names, strict=True)))


def plot_label(text: str) -> str:
    """The same in a plot, where matplotlib would read formulas between dollar signs."""
    return harmless_line(text).replace("$", r"\$")


def markdown_cell(value: object) -> str:
    """A value in a Markdown table: a bar or a line break would begin another cell or row."""
    return harmless_line(str(value)).replace("\\", "\\\\").replace("|", "\\|")


class LogFormatter(logging.Formatter):
    """Log lines without harm, whatever their arguments hold."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))
