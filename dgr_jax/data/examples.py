"""Generation examples: what a student reads, and the identifier that it learns to write.

Three sources, as in DSI and MINDER: labelled queries, the text of passages, and pseudo-queries
(given in a file, or the sentences of the passage). A source is cut into parts, of which each can
be read, and its examples be made, without those before it.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora import checks, lines, words
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data.same_text import normalised

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore
    from dgr_jax.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SOURCES = ("labelled", "passages", "pseudo_queries")
INPUTS = ("inputs", "cut", "tokens", "tokens_lost")  # what is counted of a source
PASSAGES_A_PART = 50_000
LINES_A_PART = 500_000


@dataclass(frozen=True)
class Sources:
    """Rates of the sources in the mixture, and how their texts are made.

    labelled, passages, pseudo_queries: relative rates; 0 leaves a source out.
    chunk_words: words of a passage chunk; the title stands before each chunk.
    max_chunks: chunks of a passage at most (0: all), from its beginning on; neighbours share half
      their words. 1: the first words alone (DSI).
    random_chunks: instead, so many chunks of a passage, each from a random word on, as long as
      there are as many places; drawn by the pid. 0: those of max_chunks.
    pseudo_query_path: TSV of pid and text, one pseudo-query a line, of these passages or of more;
      blank: sentences.
    max_pseudo_queries: of a passage at most (0: all), the first of the file or of the text.
    min_sentence_words, max_sentence_words: shorter sentences are left out, longer ones cut.

    In scripts without spaces between words, two characters count as a word: `corpora.words`.
    """

    labelled: float = 1.0
    passages: float = 0.5
    pseudo_queries: float = 0.5
    chunk_words: int = 48
    max_chunks: int = 0
    pseudo_query_path: str = ""
    min_sentence_words: int = 4
    max_sentence_words: int = 40
    random_chunks: int = field(default=0, metadata={"fingerprint": "unless default"})
    max_pseudo_queries: int = field(default=0, metadata={"fingerprint": "unless default"})

    def __post_init__(self) -> None:
        rates = self.rates()
        if not rates:
            raise ValueError(
                "Sources: every rate is 0; give a positive rate to Sources.labelled, "
                "Sources.passages or Sources.pseudo_queries"
            )
        counts = ("max_chunks", "random_chunks", "max_pseudo_queries", "min_sentence_words")
        ranges.check(
            self,
            **dict.fromkeys((*SOURCES, *counts), ranges.at_least(0)),
            chunk_words=ranges.at_least(2),
            max_sentence_words=ranges.at_least(1),
        )
        if self.max_chunks and self.random_chunks:
            raise ValueError(
                f"Sources.random_chunks: got {self.random_chunks} with "
                f"Sources.max_chunks={self.max_chunks}, expected one of them"
            )

    def rates(self) -> dict[str, float]:
        """Rate of every source that is used."""
        return {name: getattr(self, name) for name in SOURCES if getattr(self, name)}

    def chunks(self, passage: Passage) -> Iterator[str]:
        """Windows of `chunk_words` words, each half a window further or at random places, with the
        title before."""
        pieces, between = words.windows(passage.text)
        for start in self._starts(passage.pid, max(0, len(pieces) - self.chunk_words)):
            chunk = between.join(pieces[start : start + self.chunk_words]).strip()
            if text := f"{passage.title} {chunk}".strip():
                yield text

    def _starts(self, pid: str, last: int) -> list[int]:
        """First words of the chunks, each once; the last chunk starts at `last`."""
        if self.random_chunks:
            drawn = np.random.default_rng(zlib.crc32(pid.encode()))
            return sorted(drawn.permutation(last + 1)[: self.random_chunks].tolist())
        step = max(1, self.chunk_words // 2)
        return [*range(0, last, step), last][: self.max_chunks or None]

    def sentences(self, passage: Passage) -> Iterator[str]:
        """Sentences of the text, as pseudo-queries."""
        for sentence in words.sentences(passage.text):
            pieces, between = words.windows(sentence)
            if len(pieces) >= self.min_sentence_words:
                yield between.join(pieces[: self.max_sentence_words]).strip()


@dataclass(frozen=True)
class Part:
    """Things [start, stop) of a source: passages, lines of a file (from byte `offset`) or qrels.

    number: of the part in its source.
    """

    source: str
    number: int
    start: int
    stop: int
    offset: int = 0


def parts(source: str, settings: Sources, *, num_passages: int, num_qrels: int = 0) -> list[Part]:
    """The parts of a source in its order: 50,000 passages each, or 500,000 lines or qrels.

    A file of pseudo-queries is one part where it is packed, and with `max_pseudo_queries`: which
    are the first of a passage is known from all lines before.
    """
    if source == "pseudo_queries" and settings.pseudo_query_path:
        together = sys.maxsize if settings.max_pseudo_queries else LINES_A_PART
        runs = lines.places(settings.pseudo_query_path, together)
        return [
            Part(source, number, start, start + count, offset)
            for number, (start, offset, count) in enumerate(runs)
        ]
    labelled = source == "labelled"
    total, step = (num_qrels, LINES_A_PART) if labelled else (num_passages, PASSAGES_A_PART)
    return [
        Part(source, number, start, min(start + step, total))
        for number, start in enumerate(range(0, total, step))
    ]


def pseudo_queries(
    path: str,
    store: PassageStore,
    part: Part | None = None,
    *,
    test_queries: Container[str] = frozenset(),
    counts: Counter | None = None,
) -> Iterator[tuple[int, str]]:
    """(passage index, text) of a pseudo-query file, or of a part of it.

    Those of passages that the store lacks, of which it may hold a part, are left out; at the end
    their number is logged. Copies of `test_queries`, which are `normalised`, are left out too, and
    added to counts["copies_of_test_queries"]: a student would learn what it is tested on.
    Raises ValueError naming file and line of a line that is no pair.
    """
    unknown, total, one = 0, 0, ""
    found = lines.read(path)
    if part is not None:
        found = lines.read(path, after=part.start, offset=part.offset)
        found = islice(found, part.stop - part.start)
    for number, line in found:
        pid, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise ValueError(
                f"{path}:{number}: got {line[:60]!r}, expected two tab-separated columns: pid, text"
            )
        total += 1
        if pid not in store:
            unknown, one = unknown + 1, one or pid
        elif test_queries and normalised(text) in test_queries:
            if counts is not None:
                counts["copies_of_test_queries"] += 1
        else:
            yield store.index_of(pid), text.strip()
    if unknown:
        logger.warning(
            "%s: left out %s of %s pseudo-queries: their passages, such as %r, are not in the "
            "collection (Sources.pseudo_query_path)",
            *(path, f"{unknown:,}", f"{total:,}", one),
        )


def pairs(
    source: str,
    settings: Sources,
    *,
    store: PassageStore,
    query_texts: Mapping[str, str] = MappingProxyType({}),
    qrels: Sequence[Qrel] = (),
    min_relevance: int = 1,
    part: Part | None = None,
    test_queries: Container[str] = frozenset(),
    counts: Counter | None = None,
) -> Iterator[tuple[str, int, str]]:
    """(text, passage index, qid) of a source, in corpus order (labelled: of the qrels).

    part: only of this part, of qrels that hold each pair once. qid is blank but for labelled
    queries. Judgements below `min_relevance` give none; a pair judged twice gives one, by its last
    judgement, as in measures. test_queries, counts: see `pseudo_queries`.
    """
    if source == "labelled":
        for qrel in qrels[part.start : part.stop] if part else checks.judged_once(qrels)[0]:
            if qrel.relevance >= min_relevance:
                yield query_texts[qrel.qid], store.index_of(qrel.pid), qrel.qid
    elif source == "passages":
        for index, passage in _passages(store, part):
            for text in settings.chunks(passage):
                yield text, index, ""
    elif source == "pseudo_queries" and settings.pseudo_query_path:
        found = pseudo_queries(
            settings.pseudo_query_path, store, part, test_queries=test_queries, counts=counts
        )
        for index, text in _first(found, settings.max_pseudo_queries, len(store)):
            yield text, index, ""
    elif source == "pseudo_queries":
        for index, passage in _passages(store, part):
            most = settings.max_pseudo_queries or None
            for text in islice(settings.sentences(passage), most):
                yield text, index, ""
    else:
        raise ValueError(f"unknown source {source!r}, expected one of {SOURCES}")


def _first(
    pairs: Iterable[tuple[int, str]], most: int, num_passages: int
) -> Iterator[tuple[int, str]]:
    """The first `most` (passage index, text) pairs of each passage; 0: all."""
    counts = np.zeros(num_passages if most else 0, np.int32)
    for index, text in pairs:
        if most and counts[index] == most:
            continue
        if most:
            counts[index] += 1
        yield index, text


def _passages(store: PassageStore, part: Part | None) -> Iterator[tuple[int, Passage]]:
    if part is None:
        yield from enumerate(store)
    else:
        for index in range(part.start, part.stop):
            yield index, store[index]


def of_judged(
    queries: Mapping[str, Query], qrels: Iterable[Qrel], store: PassageStore, min_relevance: int
) -> Iterator[dict[str, Any]]:
    """One example a query with a positive, in the order of the qrels, as `of_positives`; the
    highest grades come first. A pair judged twice counts once, see `pairs`."""
    judged: dict[str, list[tuple[int, int]]] = {}
    for qrel in checks.judged_once(qrels)[0]:
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


def count_inputs(lengths: Sequence[int] | np.ndarray, longest: int, counts: Counter) -> None:
    """Adds to INPUTS of counts: inputs of so many tokens int [n], EOS counted; those cut to
    `longest`; their tokens; and those that are lost."""
    lost = np.maximum(0, np.asarray(lengths, np.int64) - longest)
    found = (len(lost), (lost > 0).sum(), np.sum(lengths), lost.sum())
    counts.update(dict(zip(INPUTS, map(int, found), strict=True)))


def features(
    examples: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    query_length: int,
    length: int,
    counts: Counter | None = None,
) -> dict[str, np.ndarray]:
    """Model features of E examples: as the SeqIO tasks and GenerationConverter make them.

    encoder_input_tokens int32 [E, query_length], EOS and the marker of a view counted;
    decoder_input_tokens and decoder_target_tokens int32 [E, length]; decoder_loss_weights f32
    [E, length]. counts: see `count_inputs`.
    """
    views = bool(vocabulary.views)
    number: dict[str, int] = {}  # of each text: examples of several views share theirs
    rows = [number.setdefault(example["inputs"], len(number)) for example in examples]
    texts = vocabulary.encode_all(list(number))
    inputs = vocabulary.inputs(texts, query_length - views)[rows]
    if counts is not None:
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
        count_inputs(lengths[rows], query_length - views, counts)
    if views:
        first = np.array([[vocabulary.marker(e["view"])] for e in examples], np.int32)
        inputs = np.hstack([first, inputs])
    targets = np.zeros((len(examples), length), np.int32)
    for row, example in zip(targets, examples, strict=True):
        row[: len(example["targets"])] = example["targets"]
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }
