"""Titles as identifiers: several passages of one page share theirs."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora import words
from dgr_jax.corpora.types import Passage
from dgr_jax.identifiers.scheme import (
    TITLE_TOKENS,
    Addition,
    CorpusSize,
    Material,
    Scheme,
    Sizes,
    TableSizes,
)
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.special_tokens import EOS_ID, UNK_ID

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Title(Scheme):
    """The first `max_tokens` tokens of the title, then EOS; of the text where there is no title, or
    one of characters that nobody sees or that have no token."""

    max_tokens: int = 15

    def __post_init__(self) -> None:
        ranges.check(self, max_tokens=ranges.at_least(1))
        ranges.check(self, max_tokens=ranges.identifier_tokens(beside=1))

    def tables(self, material: Material) -> list[IdentifierTable]:
        """Rows int32 [P, <= max_tokens + 1] in the text vocabulary; nothing is drawn.

        A passage whose title and text show nothing has no row: an identifier of no token would be
        found for every query. The report adds without_title (the text stands for it), blank (no
        row) and with_unknown (identifiers with a piece that the vocabulary lacks: those that differ
        in such pieces alone are shared).

        Raises ValueError when no passage has a row.
        """
        store, encode = material.store, material.encode
        if len(store) == 0:
            raise ValueError("the corpus has no passages to take titles from")
        rows, counts = self._rows(store, len(store), encode)
        _warn(counts, len(store))
        named = np.flatnonzero(rows[:, 0])
        if not len(named):
            raise ValueError(
                f"Title: none of {len(store):,} passages has a title or a text of which the "
                "vocabulary has a token; expected one or more: look at the collection, or take "
                "other identifiers (IDENTIFIERS)"
            )
        table = IdentifierTable.from_rows(
            rows[named], view="title", passages=named, num_passages=len(store), counts=counts
        )
        return [table]

    def rows(self, addition: Addition) -> np.ndarray:
        """See Scheme: nothing that was learned limits them."""
        return self._rows(addition.passages, len(addition.passages), addition.encode)[0]

    def _rows(
        self, passages: Iterable[Passage], count: int, encode: Callable[[str], list[int]]
    ) -> tuple[np.ndarray, Counter]:
        """Rows int32 [count, max_tokens + 1], 0 of passages without one, and what was met."""
        tokens_of = lru_cache(maxsize=65_536)(
            lambda text: encode(text)[: self.max_tokens] if words.visible(text) else ()
        )
        rows = np.zeros((count, self.max_tokens + 1), np.int32)
        counts = Counter(without_title=0, blank=0, with_unknown=0)
        for row, passage in zip(rows, passages, strict=True):
            tokens = tokens_of(passage.title.strip())
            if not tokens:
                tokens = tokens_of(self._beginning(passage.text))
                counts["without_title" if tokens else "blank"] += 1
            if tokens:
                row[: len(tokens)] = tokens
                row[len(tokens)] = EOS_ID
            counts["with_unknown"] += UNK_ID in tokens
        return rows, counts

    def sizes(self, corpus: CorpusSize) -> Sizes:
        """A title of its own for every passage, at most."""
        return Sizes((TableSizes.of_text(corpus.passages, self.max_tokens, TITLE_TOKENS),))

    def _beginning(self, text: str) -> str:
        """Words enough for `max_tokens` tokens: one that is seen has at least one."""
        seen = filter(words.visible, text.split())
        return " ".join(itertools.islice(seen, self.max_tokens))


def _warn(counts: Counter, passages: int) -> None:
    reasons = {
        "without_title": "have no title; the first words of the text stand for it",
        "blank": "have neither a title nor a text and cannot be found",
        "with_unknown": "have characters in their identifier that the vocabulary lacks; those that "
        "differ in such characters alone share it",
    }
    for name, reason in reasons.items():
        if counts[name]:
            _log.warning("%d of %d passages %s", counts[name], passages, reason)
