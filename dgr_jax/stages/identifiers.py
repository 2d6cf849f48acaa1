"""What the prepare stage makes of an identifier scheme: vocabulary, identifiers, their indexes.

Two kinds: docids, one identifier table and its trie; and identifiers of several views (Multiview),
a table and a trie of titles and of pseudo-queries, and a suffix array of the text.
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
from dgr_jax.identifiers.multiview import Multiview
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
    """The same from what `docids` or `views` wrote, without its report."""
    vocabulary = Vocabulary.load(folder)
    if vocabulary.views:
        return _of_views(settings, folder, passages, vocabulary, {})
    return _of_docids(passages, vocabulary, IdentifierTable.load(folder / "identifiers"), {})


def docids(settings: Prepare, folder: Path, passages: PassageStore) -> Identified:
    """Identifier table and trie of one identifier a passage."""
    vocabulary = Vocabulary.create(folder, extra_ids=settings.vocabulary.extra_ids)
    table = settings.identifiers.build(
        passages,
        encode=vocabulary.encode,
        first_code_id=vocabulary.first_code_id,
        seed=settings.seed,
    )
    vocabulary = replace(vocabulary, num_code_tokens=table.num_code_tokens)
    vocabulary.save()
    _save(table, folder, "", vocabulary)
    return _of_docids(passages, vocabulary, table, table.report())


def _of_docids(
    passages: PassageStore, vocabulary: Vocabulary, table: IdentifierTable, report: dict[str, Any]
) -> Identified:
    make = lambda pairs, part=0: examples.of_docids(pairs, passages, table)
    return Identified(vocabulary, table.tokens.shape[1], make, report)


def views(
    settings: Prepare, folder: Path, passages: PassageStore, test_queries: Iterable[Query]
) -> Identified:
    """Tables, tries and suffix array of identifiers of several views."""
    scheme: Multiview = settings.identifiers
    vocabulary = Vocabulary.create(
        folder, extra_ids=settings.vocabulary.extra_ids, views=scheme.views
    )
    vocabulary.save()
    encode, tables, report = vocabulary.encode, [], {}
    if "title" in scheme.views:
        marker = vocabulary.marker("title")
        table, report["title"] = scheme.title_table(passages, encode=encode, marker=marker)
        tables.append(table)
    if "query" in scheme.views:
        counts: Counter = Counter()
        written = _pseudo_queries(settings, passages, test_queries, counts)
        table, found = scheme.query_table(
            written, num_passages=len(passages), encode=encode, marker=vocabulary.marker("query")
        )
        tables.append(table)
        report["query"] = found | counts
    for table in tables:
        _save(table, folder, table.view, vocabulary)
    counts = Counter()
    stream = scheme.body_tokens(passages, encode=encode, counts=counts)
    body, anywhere, written = None, False, {}
    if "body" in scheme.views:
        text = suffix_array.build(stream, vocab_size=vocabulary.size, max_length=scheme.span_tokens)
        text.save(folder / "text")
        share = float(vocabulary.word_starts()[text.tokens].sum() / max(1, len(text)))
        anywhere = share < _ENOUGH_WORDS
        written = {
            "begin_a_word": round(share, 4), "spans_begin_anywhere": anywhere, "bytes": text.nbytes,
        }  # fmt: skip
        body = Body(text.tokens, text.starts).lengths
    else:
        deque(stream, maxlen=0)  # its tokens are counted
    report["body"] = {**counts, **written}
    report["named_passages"] = multiview.coverage(tables, body)
    ViewIndexes.describe(
        folder,
        span_tokens=scheme.span_tokens,
        spans_begin_anywhere=anywhere,
        num_tokens=counts["tokens"],
    )
    made = _of_views(settings, folder, passages, vocabulary, report)
    report["drawn"] = made.drawn
    return made


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
