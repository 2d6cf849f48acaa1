"""Titles, body spans and pseudo-queries as identifiers (MINDER, Li et al. 2023).

A passage has up to three kinds of identifiers, its views. The view is named twice: by a marker
before the query, and by what the decoder writes first. Titles and pseudo-queries begin with
their marker and close with the end of sequence; a body span has neither, and begins with a text
piece. No text is ever encoded as a marker or as the end of sequence: so no identifier of one
view is a prefix of one of another, and nothing that began as a title goes on as a body span.

With the markers <title> 1024, <body> 1025, <query> 1026 (dgr_jax.data.vocabulary), the query "how
do bees make honey" (tokens 60 61 40 41 42), and a passage titled "Bees" (40), of the text "Bees
make honey in the hive ." (40 41 42 43 44 45 9), with the pseudo-query "who makes honey" (50 51 42):

    view   encoder input                     identifier, the decoder's target
    title  [1024, 60, 61, 40, 41, 42, 1]     [1024, 40, 1]
    body   [1025, 60, 61, 40, 41, 42, 1]     [41, 42, 43, 44]    (span_tokens = 4)
    query  [1026, 60, 61, 40, 41, 42, 1]     [1026, 50, 51, 42, 1]

The decoder starts from token 0 in every view. Identifier tables, and the tries made from them,
hold the rows of titles and of pseudo-queries as they are written here. The suffix array holds the
text of each passage, [40, 41, 42, 43, 44, 45, 9], without marker, title or end of sequence: every
prefix of a span is a span, and what it counts are occurrences in the text.

    scheme, counts = Multiview(), Counter()
    tables = scheme.tables(Material(store, encode, marker=..., pseudo_queries=...))
    index = suffix_array.build(scheme.text_tokens(material, counts), ...)
    coverage(tables, body_lengths)
"""

from __future__ import annotations

import functools
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora import words
from dgr_jax.identifiers.scheme import (
    QUERY_TOKENS,
    TITLE_TOKENS,
    TOKENS_A_WORD,
    CorpusSize,
    Material,
    Scheme,
    Sizes,
    TableSizes,
)
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.special_tokens import EOS_ID, UNK_ID

_log = logging.getLogger(__name__)

VIEWS = ("title", "body", "query")


@dataclass(frozen=True)
class Multiview(Scheme):
    """Which views name the passages, and how long their identifiers are.

    views: some of 'title', 'body' and 'query'.
    title_tokens, query_tokens: titles and pseudo-queries are cut to so many tokens, marker and end
      of sequence not counted. span_tokens: tokens of a body span; shorter passages are one span.
    The numbers are those of SEAL (Bevilacqua et al. 2022) and MINDER.
    """

    views: tuple[str, ...] = VIEWS
    title_tokens: int = 15
    span_tokens: int = 10
    query_tokens: int = 30

    def __post_init__(self) -> None:
        if not self.views or not set(self.views) <= set(VIEWS):
            raise ValueError(f"Multiview.views: got {self.views}, expected some of {VIEWS}")
        if len(set(self.views)) < len(self.views):
            raise ValueError(f"Multiview.views: got {self.views}, expected each view once")
        lengths = ("title_tokens", "span_tokens", "query_tokens")
        ranges.check(self, **dict.fromkeys(lengths, ranges.at_least(1)))
        of_tries = ranges.identifier_tokens(beside=2)  # marker and EOS
        ranges.check(self, title_tokens=of_tries, query_tokens=of_tries)

    def tables(self, material: Material) -> list[IdentifierTable]:
        """The tables of titles and of pseudo-queries, where these are views."""
        make = {"title": self._titles, "query": self._queries}
        return [table(material) for view, table in make.items() if view in self.views]

    def view_tables(self, material: Material) -> dict[str, IdentifierTable | None]:
        """See Scheme: nothing that was learned limits them."""
        titles = ((index, passage.title) for index, passage in enumerate(material.store))
        named = {
            "title": lambda: _table(material, "title", titles, self.title_tokens),
            "query": lambda: _table(
                material, "query", material.pseudo_queries(), self.query_tokens
            ),
        }
        return {view: make() for view, make in named.items() if view in self.views}

    def sizes(self, corpus: CorpusSize) -> Sizes:
        """A title of its own for every passage, and all of its pseudo-queries, at most."""
        rows, tables = corpus.passages, []
        if "title" in self.views:
            tables.append(TableSizes.of_text(rows, self.title_tokens, TITLE_TOKENS, "title"))
        if "query" in self.views:
            rows *= corpus.pseudo_queries
            tables.append(TableSizes.of_text(rows, self.query_tokens, QUERY_TOKENS, "query"))
        if "body" not in self.views:
            return Sizes(tuple(tables))
        tokens = round(corpus.passages * corpus.words * TOKENS_A_WORD)
        return Sizes(tuple(tables), text_tokens=tokens, span_tokens=self.span_tokens)

    def _titles(self, material: Material) -> IdentifierTable:
        """Rows int32 [U, <= title_tokens + 2]: marker, tokens of the title, EOS.

        Passages of equal titles share a row, also where titles differ after the cut. A passage
        whose title has no token has no row: see `_table` for what is reported.

        Raises ValueError when no passage has a title.
        """
        store = material.store
        encode = functools.lru_cache(maxsize=65_536)(material.encode)
        titles = ((index, passage.title) for index, passage in enumerate(store))
        table = _table(material._replace(encode=encode), "title", titles, self.title_tokens)
        if table is None:
            raise ValueError(
                f"Multiview.views: got {self.views}, but none of {len(store):,} passages has a "
                "title; expected one or more: leave 'title' out"
            )
        return table

    def _queries(self, material: Material) -> IdentifierTable:
        """Rows int32 [U, <= query_tokens + 2]: marker, tokens of the query, EOS.

        Pseudo-queries come in any order, any number of a passage; repeated ones of a passage count
        once. Passages without one have no row. Memory: rows of at most 4 * (query_tokens + 2) bytes
        a pseudo-query, about three times over while they are sorted.

        Raises ValueError when there is no pseudo-query, or a passage index is not one of the store.
        """
        table = _table(material, "query", material.pseudo_queries(), self.query_tokens)
        if table is None:
            raise ValueError(
                f"Multiview.views: got {self.views}, but no passage has a pseudo-query; expected "
                "one or more: give a file of them (Sources.pseudo_query_path), or leave 'query' out"
            )
        return table

    def text_tokens(self, material: Material, counts: Counter) -> Iterator[np.ndarray]:
        """The tokens of each passage's text, int32 [n], in corpus order; n is 0 for a text that
        shows nothing.

        A stream for suffix_array.build. Titles are not part of it: they are a view of their own.
        counts, filled while the stream is read: tokens, unknown_tokens, passages_without_body,
        passages_shorter_than_a_span, longest.
        """
        for passage in material.store:
            seen = words.visible(passage.text)
            tokens = np.asarray(material.encode(passage.text) if seen else (), np.int32)
            counts["tokens"] += len(tokens)
            counts["unknown_tokens"] += int(np.count_nonzero(tokens == UNK_ID))
            counts["passages_without_body"] += not len(tokens)
            counts["passages_shorter_than_a_span"] += 0 < len(tokens) < self.span_tokens
            counts["longest"] = max(counts["longest"], len(tokens))
            yield tokens


def coverage(
    tables: Iterable[IdentifierTable], body_lengths: np.ndarray | None = None
) -> dict[str, int]:
    """Passages that each view names, and `none`: those that no view names; these are warned of.

    body_lengths: int [P], tokens of the text of each passage; None: no body view.
    """
    named: dict[str, np.ndarray] = {}
    for table in tables:
        named[table.view] = np.zeros(table.num_passages, bool)
        named[table.view][table.passages] = True
    if body_lengths is not None:
        named["body"] = np.asarray(body_lengths) > 0
    sizes = {view: len(mask) for view, mask in named.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"coverage: got views of {sizes} passages, expected one and the same size")
    none = int((~np.any(list(named.values()), axis=0)).sum())
    if none:
        _log.warning(
            "%d of %d passages have no identifier in any view (%s) and cannot be found",
            none,
            next(iter(sizes.values())),
            ", ".join(named),
        )
    return {view: int(mask.sum()) for view, mask in named.items()} | {"none": none}


def _table(
    material: Material, view: str, named: Iterable[tuple[int, str]], limit: int
) -> IdentifierTable | None:
    """The table of (passage index, text); None where no text has a token.

    Its counts: blank (texts without a token, or of characters that nobody sees, left out), cut
    (texts longer than `limit` tokens), with_unknown (texts that hold a piece the vocabulary lacks:
    they are kept, but texts that differ in such pieces alone share a row).
    """
    tokens, lengths, owners = array("i"), array("i"), array("i")
    counts = dict.fromkeys(("blank", "cut", "with_unknown"), 0)
    for passage, text in named:
        ids = material.encode(text.strip()) if words.visible(text) else ()
        if not len(ids):
            counts["blank"] += 1
            continue
        counts["cut"] += len(ids) > limit
        ids = ids[:limit]
        counts["with_unknown"] += UNK_ID in ids
        tokens.extend(ids)
        lengths.append(len(ids))
        owners.append(passage)
    if not lengths:
        return None
    marker, num_passages = material.marker(view), len(material.store)
    table = IdentifierTable.from_rows(
        _rows(np.frombuffer(tokens, np.int32), np.frombuffer(lengths, np.int32), marker),
        view=view,
        passages=np.frombuffer(owners, np.int32),
        num_passages=num_passages,
        counts=counts,
    )
    if without := table.report()["passages_without_identifier"]:
        _log.warning("%d of %d passages have no %s", without, num_passages, view)
    if unknown := counts["with_unknown"]:
        _log.warning(
            "%d of %d texts of the view %r have characters that the vocabulary lacks; those that "
            "differ in such characters alone share an identifier",
            *(unknown, len(lengths), view),
        )
    return table


def _rows(tokens: np.ndarray, lengths: np.ndarray, marker: int) -> np.ndarray:
    """int32 [N, T]: the marker, lengths[i] of the tokens, EOS, then 0."""
    longest = int(lengths.max())
    rows = np.zeros((len(lengths), longest + 2), np.int32)
    rows[:, 0] = marker
    rows[:, 1:-1][np.arange(longest) < lengths[:, None]] = tokens
    rows[np.arange(len(lengths)), lengths + 1] = EOS_ID
    return rows
