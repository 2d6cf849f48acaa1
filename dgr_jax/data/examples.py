"""Generation examples: what a student reads, and the identifier that it learns to write.

Three sources, as in DSI and MINDER: labelled queries, the text of passages, and pseudo-queries
(given in a file, or the sentences of the passage).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dgr_jax.corpora import lines
from dgr_jax.corpora.types import Passage, Qrel, Query

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

SOURCES = ("labelled", "passages", "pseudo_queries")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Sources:
    """Rates of the sources in the mixture, and how their texts are made.

    labelled, passages, pseudo_queries: relative rates; 0 leaves a source out.
    chunk_words: words of a passage chunk; the title stands before each chunk.
    max_chunks: chunks of a passage at most (0: all); neighbours share half their words.
    pseudo_query_path: TSV of pid and text, one pseudo-query a line; blank: sentences.
    min_sentence_words, max_sentence_words: shorter sentences are left out, longer ones cut.
    """

    labelled: float = 1.0
    passages: float = 0.5
    pseudo_queries: float = 0.5
    chunk_words: int = 48
    max_chunks: int = 0
    pseudo_query_path: str = ""
    min_sentence_words: int = 4
    max_sentence_words: int = 40

    def __post_init__(self) -> None:
        rates = self.rates()
        if not rates:
            raise ValueError(
                "Sources: every rate is 0; give a positive rate to Sources.labelled, "
                "Sources.passages or Sources.pseudo_queries"
            )
        if min(getattr(self, name) for name in SOURCES) < 0:
            raise ValueError(f"Sources: rates must not be negative, got {rates}")
        if self.chunk_words < 2:
            raise ValueError(f"Sources.chunk_words: got {self.chunk_words}, expected at least 2")

    def rates(self) -> dict[str, float]:
        """Rate of every source that is used."""
        return {name: getattr(self, name) for name in SOURCES if getattr(self, name)}

    def chunks(self, passage: Passage) -> Iterator[str]:
        """Windows of `chunk_words` words, each half a window further, with the title before."""
        words = passage.text.split()
        step = max(1, self.chunk_words // 2)
        last = max(0, len(words) - self.chunk_words)
        starts = [*range(0, last, step), last] if last else [0]
        for start in starts[: self.max_chunks or None]:
            chunk = " ".join(words[start : start + self.chunk_words])
            if text := f"{passage.title} {chunk}".strip():
                yield text

    def sentences(self, passage: Passage) -> Iterator[str]:
        """Sentences of the text, as pseudo-queries."""
        for sentence in _SENTENCE.split(passage.text):
            words = sentence.split()
            if len(words) >= self.min_sentence_words:
                yield " ".join(words[: self.max_sentence_words])


def pseudo_queries(path: str, store: PassageStore) -> Iterator[tuple[int, str]]:
    """(passage index, text) of a pseudo-query file.

    Raises ValueError naming file and line of a line that is no pair, or a pid not in the store.
    """
    for number, line in lines.read(path):
        pid, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise ValueError(
                f"{path}:{number}: got {line[:60]!r}, expected two tab-separated columns: pid, text"
            )
        if pid not in store:
            raise ValueError(
                f"{path}:{number}: got the pid {pid!r}, expected that of a passage of the "
                "collection"
            )
        yield store.index_of(pid), text.strip()


def pairs(
    source: str,
    settings: Sources,
    *,
    store: PassageStore,
    query_texts: dict[str, str] | None = None,
    qrels: Iterable[Qrel] = (),
    min_relevance: int = 1,
) -> Iterator[tuple[str, int, str]]:
    """(text, passage index, qid) of a source, in corpus order (labelled: of the qrels).

    qid is blank but for labelled queries. Judgements below `min_relevance` give none.
    """
    if source == "labelled":
        for qrel in qrels:
            if qrel.relevance >= min_relevance:
                yield query_texts[qrel.qid], store.index_of(qrel.pid), qrel.qid
    elif source == "passages":
        for index, passage in enumerate(store):
            for text in settings.chunks(passage):
                yield text, index, ""
    elif source == "pseudo_queries" and settings.pseudo_query_path:
        for index, text in pseudo_queries(settings.pseudo_query_path, store):
            yield text, index, ""
    elif source == "pseudo_queries":
        for index, passage in enumerate(store):
            for text in settings.sentences(passage):
                yield text, index, ""
    else:
        raise ValueError(f"unknown source {source!r}, expected one of {SOURCES}")


def of_judged(
    queries: Mapping[str, Query], qrels: Iterable[Qrel], store: PassageStore, min_relevance: int
) -> Iterator[dict[str, Any]]:
    """One example a query with a positive, in the order of the qrels, as `of_positives`; the
    highest grades come first."""
    judged: dict[str, list[tuple[int, int]]] = {}
    for qrel in qrels:
        if qrel.relevance >= min_relevance:
            judged.setdefault(qrel.qid, []).append((qrel.relevance, store.index_of(qrel.pid)))
    for number, (qid, found) in enumerate(judged.items()):
        grades, passages = zip(*sorted(found, key=lambda one: -one[0]), strict=True)
        yield _positives(queries[qid].text, passages, grades, number, qid)


def of_positives(pairs: Iterable[tuple[str, int, str]]) -> Iterator[dict[str, Any]]:
    """One example a (text, passage index, qid) pair: {inputs: str, positives: int32 [R] (1 + the
    passage indices), grades: int32 [R], query: int32 [1] (1 + the example's number), qid: str};
    here R = 1."""
    for number, (text, index, qid) in enumerate(pairs):
        yield _positives(text, [index], [1], number, qid)


def _positives(
    text: str, passages: Sequence[int], grades: Sequence[int], number: int, qid: str
) -> dict[str, Any]:
    """Numbers begin at 1, as SeqIO pads with 0."""
    numbers, query = (1 + np.asarray(found, np.int32) for found in (passages, [number]))
    return {
        "inputs": text,
        "positives": numbers,
        "grades": np.asarray(grades, np.int32),
        "query": query,
        "qid": qid,
    }


def of_docids(
    pairs: Iterable[tuple[str, int, str]], store: PassageStore, table
) -> Iterator[dict[str, Any]]:
    """One example a (text, passage index, qid) pair: {inputs: str, targets: int32 [T'], qid: str,
    pid: str}. Passages without an identifier give none.

    table: IdentifierTable.
    """
    rows = table.rows_of_passages()
    for text, index, qid in pairs:
        if (row := rows[index]) >= 0:
            identifier = table.tokens[row, : table.lengths[row]]
            yield {"inputs": text, "targets": identifier, "qid": qid, "pid": store.pids[index]}
