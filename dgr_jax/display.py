"""Showing people text that others wrote: titles, passages, queries, names of files.

Such text must not move the cursor, change colours, reverse a line or be read as markup. Characters
with such effects are written as Python writes them (`\\x1b`, `\\u202e`), and `[bold]` and `:bee:`
stay as they are. Every console, log line, error and plot label of this package goes through here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Control characters (C0 except tab and line feed, DEL and C1); marks, embeddings, overrides and
# isolates of the bidirectional algorithm; line and paragraph separators; invisible shapers and
# annotations; halves of surrogate pairs, which cannot be written; tags, which spell hidden words.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAKS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]+")
_NARROWEST = (
    20  # columns; a terminal that reports fewer, such as COLUMNS=0, does not know its width
)


def harmless(text: str) -> str:
    """The text with every character that would control a terminal, or be invisible, written out.

    Tabs and line feeds stay.
    """
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def harmless_line(text: str) -> str:
    """The text as `harmless` gives it, on one line: tabs and line ends become blanks."""
    return harmless(_BREAKS.sub(" ", text))


def cell(value: object, style: str = "") -> Text:
    """A value, whatever it holds, as one line of a rich table or console, in a style."""
    from rich.text import Text

    return Text.assemble((harmless_line(str(value)), style))  # so that padding has no style


def wide_console() -> Console:
    """A console as wide as the terminal or, where there is none, such as in a log, any table."""
    default = console()
    return default if default.is_terminal else console(width=200)


def console(**settings: Any) -> Console:
    """A rich console that takes every string for plain text.

    settings: those of rich's `Console`.
    """
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(harmless(text), **how | {"markup": False, "emoji": False})

        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 - rich calls this method after it has caught BrokenPipeError

    plain = Plain(markup=False, emoji=False, **{"highlight": False} | settings)
    if plain.width < _NARROWEST:
        plain.width = 80
    return plain


def listed(counts: Mapping[str, object]) -> str:
    """The counts as words, underscores of their names as blanks: '12 queries, 3 without lists'."""
    shown = (
        f"{value:,}" if isinstance(value, (int, float)) else f"{value}" for value in counts.values()
    )
    names = (name.replace("_", " ") for name in counts)
    return ", ".join(map(" ".join, zip(shown, names, strict=True)))


def plot_label(text: str) -> str:
    """The text for a plot, where matplotlib would read formulas between dollar signs."""
    return harmless_line(text).replace("$", r"\$")


def markdown_cell(value: object) -> str:
    """A value for a Markdown table, where a bar or a line break would begin another cell or row."""
    return harmless_line(str(value)).replace("\\", "\\\\").replace("|", "\\|")


class LogFormatter(logging.Formatter):
    """Log lines as `harmless` writes them, whatever their arguments hold."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))
