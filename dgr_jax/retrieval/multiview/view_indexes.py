"""The indexes of identifiers of several views, which the prepare stage writes into a folder:

identifiers/title  identifiers/query   tables
trie/title         trie/query          their tries
text                                   the suffix array of all passages
views.json                             the length of spans and where they may begin
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgr_jax.data.views import Body, Views
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import suffix_array, trie
from dgr_jax.decoding.suffix_array import SuffixArray
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept

FILE = "views.json"


@dataclass(frozen=True, eq=False)
class ViewIndexes:
    """Identifiers of several views.

    tables, tries: by view, 'title' and 'query'. text: the suffix array of all passages without
    titles; None without the body view. num_tokens: tokens of the corpus, without titles.
    span_tokens, opening: settings of body spans, see SuffixArray.constraint.
    """

    tables: dict[str, IdentifierTable]
    tries: dict[str, trie.Trie]
    text: SuffixArray | None
    num_tokens: int
    vocabulary: Vocabulary
    span_tokens: int
    opening: np.ndarray | None

    @staticmethod
    def describe(folder: Path, **described: int) -> None:
        """Writes views.json: span_tokens, spans_begin_anywhere and num_tokens."""
        (folder / FILE).write_text(json.dumps(described), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary) -> ViewIndexes:
        """Opens a folder; arrays are memory-mapped."""
        described = kept.read_json(folder / FILE)
        with kept.reading(folder / FILE):
            anywhere = bool(described["spans_begin_anywhere"])
            num_tokens, span_tokens = (int(described[n]) for n in ("num_tokens", "span_tokens"))
        tabled = [view for view in vocabulary.views if view != "body"]
        return cls(
            tables={view: IdentifierTable.load(folder / "identifiers" / view) for view in tabled},
            tries={view: trie.load(folder / "trie" / view) for view in tabled},
            text=suffix_array.load(folder / "text") if "body" in vocabulary.views else None,
            num_tokens=num_tokens,
            vocabulary=vocabulary,
            span_tokens=span_tokens,
            opening=None if anywhere else vocabulary.word_starts(),
        )

    @property
    def markers(self) -> dict[str, int]:
        """The token of every view in use."""
        return {view: self.vocabulary.marker(view) for view in self.vocabulary.views}

    @property
    def views(self) -> Views:
        """The sources from which generation examples are drawn."""
        body = None if self.text is None else Body(self.text.tokens, self.text.starts)
        return Views(
            self.vocabulary,
            title=self.tables.get("title"),
            query=self.tables.get("query"),
            body=body,
            span_tokens=self.span_tokens,
            opening=self.opening,
        )

    @property
    def length(self) -> int:
        """Number of tokens of the longest identifier."""
        spans = [self.span_tokens] * (self.text is not None)
        return max([*spans, *(table.tokens.shape[1] for table in self.tables.values())])
