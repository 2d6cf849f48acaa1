"""What the prepare stage makes of an identifier scheme: vocabulary, identifiers, their indexes.

A scheme without views leaves one identifier table and its trie; one with views a table and a trie
of titles and of pseudo-queries, and a suffix array of the text.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Query
from dgr_jax.data import examples
from dgr_jax.data import views as view_examples
from dgr_jax.data.views import Body
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import suffix_array, trie
from dgr_jax.experiments.generative import Prepare
from dgr_jax.identifiers import multiview
from dgr_jax.identifiers.kept_models import KEPT
from dgr_jax.identifiers.scheme import Material, Scheme
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.retrieval.multiview.view_indexes import ViewIndexes

_ENOUGH_WORDS = 0.1  # share of tokens that begin a word, below which spans may begin anywhere

Pairs = Iterable[tuple[str, int, str]]


@dataclass(frozen=True)
class Identified:
    """Identifiers as generation examples need them.

    length: tokens of the longest; examples: (text, passage index, qid) pairs of a part of a
    source, and its number -> examples; report: for report.json; drawn: counts of what is drawn,
    filled while examples are read.
    """

    vocabulary: Vocabulary
    length: int
    examples: Callable[..., Iterator[dict[str, Any]]]
    report: dict[str, Any]
    drawn: Counter = field(default_factory=Counter)


def reopened(settings: Prepare, folder: Path, passages: PassageStore) -> Identified:
    """The same from what `build` wrote, without its report."""
    vocabulary = Vocabulary.load(folder)
    if vocabulary.views:
        return _of_views(settings, folder, passages, vocabulary, {})
    return _of_docids(passages, vocabulary, IdentifierTable.load(folder / "identifiers"), {})


def build(
    settings: Prepare, folder: Path, passages: PassageStore, test_queries: Iterable[Query]
) -> Identified:
    """Writes the vocabulary, identifier tables and their tries; of several views also the suffix
    array of their text, and what their indexes need to know.

    test_queries: no pseudo-query may copy them.
    """
    scheme, copies = settings.identifiers, Counter()
    vocabulary = Vocabulary.create(
        folder, extra_ids=settings.vocabulary.extra_ids, views=scheme.views
    )
    material = Material(
        passages,
        vocabulary.encode,
        vocabulary.first_code_id,
        vocabulary.marker,
        lambda: _pseudo_queries(settings, passages, test_queries, copies),
        settings.seed,
        folder / KEPT,
    )
    tables = scheme.tables(material)
    codes = sum(table.num_code_tokens for table in tables)
    vocabulary = replace(vocabulary, num_code_tokens=codes)
    vocabulary.save()
    for table in tables:
        _save(table, folder, table.view if scheme.views else "", vocabulary)
    if not scheme.views:
        (table,) = tables
        return _of_docids(passages, vocabulary, table, table.report())
    report = {table.view: table.report() for table in tables}
    if "query" in report:
        report["query"] |= copies
    report["body"], lengths = _text(scheme, material, folder, vocabulary)
    report["named_passages"] = multiview.coverage(tables, lengths)
    identified = _of_views(settings, folder, passages, vocabulary, report)
    report["drawn"] = identified.drawn
    return identified


def _text(
    scheme: Scheme, material: Material, folder: Path, vocabulary: Vocabulary
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Writes the suffix array of the text whose spans are identifiers, and views.json; -> counts
    for the report, and the tokens of each passage int [P], None without such a view."""
    counts: Counter = Counter()
    stream, lengths, anywhere = scheme.text_tokens(material, counts), None, False
    span_tokens, written = scheme.span_tokens, {}
    if "body" in scheme.views:
        text = suffix_array.build(stream, vocab_size=vocabulary.size, max_length=span_tokens)
        text.save(folder / "text")
        share = float(vocabulary.word_starts()[text.tokens].sum() / max(1, len(text)))
        anywhere = share < _ENOUGH_WORDS
        written = {
            "begin_a_word": round(share, 4), "spans_begin_anywhere": anywhere, "bytes": text.nbytes,
        }  # fmt: skip
        lengths = Body(text.tokens, text.starts).lengths
    else:
        deque(stream, maxlen=0)  # its tokens are counted
    ViewIndexes.describe(
        folder,
        span_tokens=span_tokens,
        spans_begin_anywhere=anywhere,
        num_tokens=counts["tokens"],
    )
    return {**counts, **written}, lengths


def _of_docids(
    passages: PassageStore, vocabulary: Vocabulary, table: IdentifierTable, report: dict[str, Any]
) -> Identified:
    make = lambda pairs, part=0: examples.of_docids(pairs, passages, table)
    return Identified(vocabulary, table.tokens.shape[1], make, report)


def _of_views(
    settings: Prepare,
    folder: Path,
    passages: PassageStore,
    vocabulary: Vocabulary,
    report: dict[str, Any],
) -> Identified:
    indexes, drawn = ViewIndexes.load(folder, vocabulary), Counter()
    drawing = indexes.views

    def make(pairs: Pairs, part: int = 0) -> Iterator[dict[str, Any]]:
        seed = [settings.seed, part] if part else settings.seed
        blocks = view_examples.blocks(pairs, settings.mixture, drawing, seed=seed, counts=drawn)
        return view_examples.examples(blocks, passages.pids)

    return Identified(vocabulary, indexes.length, make, report, drawn)


def _pseudo_queries(
    settings: Prepare, passages: PassageStore, test_queries: Iterable[Query], counts: Counter
) -> Iterator[tuple[int, str]]:
    """(passage index, text) of the file of pseudo-queries; the sentences where there is none."""
    path = settings.sources.pseudo_query_path
    if not path:
        for index, passage in enumerate(passages):
            for text in settings.sources.sentences(passage):
                yield index, text
        return
    copies_of = (query.text for query in test_queries)
    yield from view_examples.pseudo_queries(path, passages, copies_of=copies_of, counts=counts)


def _save(table: IdentifierTable, folder: Path, view: str, vocabulary: Vocabulary) -> None:
    table.save(folder / "identifiers" / view)
    tokens, lengths = np.asarray(table.tokens), np.asarray(table.lengths)
    trie.build(tokens, lengths, vocab_size=vocabulary.size).save(folder / "trie" / view)
