"""Identifiers of several views: tables and tries, and the suffix array of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from dgr_jax.data.examples import Sources
from dgr_jax.identifiers.scheme import Material
from dgr_jax.retrieval.living import docids
from dgr_jax.retrieval.living.change import Change
from dgr_jax.retrieval.multiview.view_indexes import FILE, ViewIndexes
from dgr_jax.settings import from_described


def write(change: Change) -> None:
    """Writes the indexes of a version; nothing where passages have one identifier, or none.

    The pseudo-queries of passages that come later are their sentences, where the others have these
    too; where they came from a file, there are none. Raises ValueError where a passage has no
    identifier in any view.
    """
    if not (change.old / FILE).is_file():
        return
    vocabulary, old = change.vocabulary, ViewIndexes.load(change.old, change.vocabulary)
    passages: Any = change.added  # of a store, only what a sequence has is read
    material = Material(
        passages, vocabulary.encode, vocabulary.first_code_id, vocabulary.marker,
        lambda: _pseudo_queries(change),
    )  # fmt: skip
    counts: Counter[str] = Counter()
    text = list(change.scheme.text_tokens(material, counts)) if change.added else []
    added = change.scheme.view_tables(material) if change.added else {}
    named = np.array([len(tokens) > 0 and old.text is not None for tokens in text], bool)
    for table in filter(None, added.values()):
        named[table.passages] = True
    for place in np.flatnonzero(~named)[:1]:
        raise ValueError(
            f"passages: {change.added[place].pid!r} has no identifier in any view "
            f"({', '.join(vocabulary.views)}); nothing was changed"
        )
    for view, table in old.tables.items():
        more = added.get(view)
        rows, owners = (None, None) if more is None else _entries(more)
        changed = docids.changed(table, change.stay, change.num_passages, rows, owners)
        docids.save(change, changed, view)
    tokens = old.num_tokens + counts["tokens"]
    if old.text is not None:
        index = old.text.changed(change.stay, text, max_length=old.span_tokens)
        index.like(old.text).save(change.new / "text")
        tokens = len(index)
    ViewIndexes.describe(
        change.new,
        span_tokens=old.span_tokens,
        spans_begin_anywhere=old.opening is None,
        num_tokens=tokens,
    )


def _entries(table: docids.IdentifierTable) -> tuple[np.ndarray, np.ndarray]:
    """A row of each pair of an identifier and a passage, int32 [N, T], and the passages int [N]."""
    return table.tokens[np.repeat(np.arange(len(table)), np.diff(table.offsets))], table.passages


def _pseudo_queries(change: Change) -> Iterator[tuple[int, str]]:
    """(number among those that are added, sentence)."""
    sources = from_described(Sources, change.settings.get("sources"), str(change.prepared))
    if not sources.pseudo_query_path:
        for number, passage in enumerate(change.added):
            for sentence in sources.sentences(passage):
                yield number, sentence
