"""Generation examples: what a student reads, and the identifier that it learns to write.

They come from three sources, as in DSI and MINDER: labelled queries, the text of passages, and
pseudo-queries (those of a file, or the sentences of the passage). A source is cut into parts; the
examples of a part can be made without reading the parts before it.
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
INPUTS = ("inputs", "cut", "tokens", "tokens_lost")  # the counts of a source's inputs
PASSAGES_A_PART = 50_000
LINES_A_PART = 500_000


@dataclass(frozen=True)
class Sources:
    """Rates of the sources in the mixture, and how their texts are made.

    labelled, passages, pseudo_queries: relative rates; 0 leaves a source out.
    chunk_words: number of words in a chunk of a passage; each chunk begins with the title.
    max_chunks: the highest number of chunks of a passage (0 for all), from its beginning on;
      neighbouring chunks share half their words. With 1, a passage gives its first words alone
      (DSI).
    random_chunks: if above 0, this many chunks of a passage in place of those of max_chunks, each
      from another random word on, drawn by the pid; fewer where the passage is too short.
    pseudo_query_path: TSV with a pid and a pseudo-query on each line; it may name passages that are
      not in the corpus. If blank, the sentences of a passage are its pseudo-queries.
    max_pseudo_queries: the highest number of pseudo-queries of a passage (0 for all); the first
      ones in the file or text are used.
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
        """The rate of every source that is used."""
        return {name: getattr(self, name) for name in SOURCES if getattr(self, name)}

    def chunks(self, passage: Passage) -> Iterator[str]:
        """Windows of `chunk_words` words, preceded by the title; a window begins half a window
        after the one before, or at a random place."""
        pieces, between = words.windows(passage.text)
        for start in self._starts(passage.pid, max(0, len(pieces) - self.chunk_words)):
            chunk = between.join(pieces[start : start + self.chunk_words]).strip()
            if text := f"{passage.title} {chunk}".strip():
                yield text

    def _starts(self, pid: str, last: int) -> list[int]:
        """The places where chunks begin, all different; `last` is the greatest possible one."""
        if self.random_chunks:
            drawn = np.random.default_rng(zlib.crc32(pid.encode()))
            return sorted(drawn.permutation(last + 1)[: self.random_chunks].tolist())
        step = max(1, self.chunk_words // 2)
        return [*range(0, last, step), last][: self.max_chunks or None]

    def sentences(self, passage: Passage) -> Iterator[str]:
        """The sentences of the text, which serve as pseudo-queries."""
        for sentence in words.sentences(passage.text):
            pieces, between = words.windows(sentence)
            if len(pieces) >= self.min_sentence_words:
                yield between.join(pieces[: self.max_sentence_words]).strip()


@dataclass(frozen=True)
class Part:
    """The items [start, stop) of a source: passages, lines of a file (from byte `offset`) or qrels.

    place: of the part among those of its source.
    """

    source: str
    place: int
    start: int
    stop: int
    offset: int = 0


def parts(source: str, settings: Sources, *, num_passages: int, num_qrels: int = 0) -> list[Part]:
    """The parts of a source in its order: 50,000 passages each, or 500,000 lines or qrels.

    A file of pseudo-queries is a single part where it is packed, and with `max_pseudo_queries`, as
    only all earlier lines tell which pseudo-queries of a passage are its first ones.
    """
    if source == "pseudo_queries" and settings.pseudo_query_path:
        together = sys.maxsize if settings.max_pseudo_queries else LINES_A_PART
        runs = lines.places(settings.pseudo_query_path, together)
        return [
            Part(source, place, start, start + count, offset)
            for place, (start, offset, count) in enumerate(runs)
        ]
    labelled = source == "labelled"
    total, step = (num_qrels, LINES_A_PART) if labelled else (num_passages, PASSAGES_A_PART)
    return [
        Part(source, place, start, min(start + step, total))
        for place, start in enumerate(range(0, total, step))
    ]


def pseudo_queries(
    path: str,
    store: PassageStore,
    part: Part | None = None,
    *,
    test_queries: Container[str] = frozenset(),
    counts: Counter | None = None,
) -> Iterator[tuple[int, str]]:
    """(passage index, text) of each pseudo-query in a file, or in a part of it.

    Pseudo-queries of passages that the store lacks are left out, for it may hold a part of the
    corpus; their number is logged at the end. Copies of `test_queries`, which are `normalised`, are
    left out and counted in counts["copies_of_test_queries"], for otherwise a student would learn
    what it is tested on. Raises ValueError naming file and line of a line that is no pair.
    """
    unknown, total, example_pid = 0, 0, ""
    numbered_lines = lines.read(path)
    if part is not None:
        numbered_lines = lines.read(path, after=part.start, offset=part.offset)
        numbered_lines = islice(numbered_lines, part.stop - part.start)
    for line_number, line in numbered_lines:
        pid, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise ValueError(
                f"{path}:{line_number}: got {line[:60]!r}, expected two tab-separated columns: "
                "pid, text"
            )
        if checks.header(path, line_number, (pid, text), "pseudo-query"):
            continue
        total += 1
        if pid not in store:
            unknown, example_pid = unknown + 1, example_pid or pid
        elif test_queries and normalised(text) in test_queries:
            if counts is not None:
                counts["copies_of_test_queries"] += 1
        else:
            yield store.index_of(pid), text.strip()
    if unknown:
        logger.warning(
            "%s: left out %s of %s pseudo-queries: their passages, such as %r, are not in the "
            "collection (Sources.pseudo_query_path)",
            *(path, f"{unknown:,}", f"{total:,}", example_pid),
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
    """(text, passage index, qid) of a source in corpus order, or for labelled queries in that of
    the qrels.

    The qid is blank except for labelled queries. Judgements below `min_relevance` give no pair; two
    judgements of a query and passage give one pair, by the last of them, as in measures.

    part: the only part to read; the qrels then hold each query and passage once. test_queries,
    counts: see `pseudo_queries`.
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
        given = pseudo_queries(
            settings.pseudo_query_path, store, part, test_queries=test_queries, counts=counts
        )
        for index, text in _first(given, settings.max_pseudo_queries, len(store)):
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
    """The first `most` (passage index, text) pairs of each passage; all of them where it is 0."""
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
    """One example, as those of `of_positives`, for each query with a positive, in the order of the
    qrels. Positives with the highest grades come first. A passage that was judged twice for a query
    counts once, see `pairs`."""
    judged: dict[str, list[tuple[int, int]]] = {}
    for qrel in checks.judged_once(qrels)[0]:
        if qrel.relevance >= min_relevance:
            judged.setdefault(qrel.qid, []).append((qrel.relevance, store.index_of(qrel.pid)))
    for place, (qid, graded) in enumerate(judged.items()):
        grades, passages = zip(*sorted(graded, key=lambda pair: -pair[0]), strict=True)
        yield _positives(queries[qid].text, passages, grades, place, qid)


def of_positives(pairs: Iterable[tuple[str, int, str]]) -> Iterator[dict[str, Any]]:
    """One example for each (text, passage index, qid).

    {inputs: str, positives: int32 [R] (1 + the passage indices), grades: int32 [R], query: int32
    [1] (1 + the place of the example), qid: str}; here R = 1.
    """
    for place, (text, index, qid) in enumerate(pairs):
        yield _positives(text, [index], [1], place, qid)


def _positives(
    text: str, passages: Sequence[int], grades: Sequence[int], place: int, qid: str
) -> dict[str, Any]:
    """One example; passage indices and places begin at 1 here, as SeqIO pads with 0."""
    numbers, query = (1 + np.asarray(values, np.int32) for values in (passages, [place]))
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
    """One example for each (text, passage index, qid) whose passage has an identifier.

    {inputs: str, targets: int32 [T'], qid: str, pid: str}.

    table: IdentifierTable.
    """
    rows = table.rows_of_passages()
    for text, index, qid in pairs:
        if (row := rows[index]) >= 0:
            identifier = table.tokens[row, : table.lengths[row]]
            yield {"inputs": text, "targets": identifier, "qid": qid, "pid": store.pids[index]}


def count_inputs(lengths: Sequence[int] | np.ndarray, longest: int, counts: Counter) -> None:
    """Adds inputs to the four counts of INPUTS: all inputs, those that are cut to `longest` tokens,
    the tokens of all, and the tokens that are lost.

    lengths: int [n], the number of tokens of each input, EOS included.
    """
    lost = np.maximum(0, np.asarray(lengths, np.int64) - longest)
    totals = (len(lost), (lost > 0).sum(), np.sum(lengths), lost.sum())
    counts.update(dict(zip(INPUTS, map(int, totals), strict=True)))


def features(
    examples: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    query_length: int,
    length: int,
    counts: Counter | None = None,
) -> dict[str, np.ndarray]:
    """Model features of E examples, as the SeqIO tasks and GenerationConverter make them.

    encoder_input_tokens int32 [E, query_length], with EOS and the marker of a view;
    decoder_input_tokens and decoder_target_tokens int32 [E, length]; decoder_loss_weights f32
    [E, length]. counts: see `count_inputs`.
    """
    views = bool(vocabulary.views)
    row_of: dict[str, int] = {}  # examples of several views share the row of their text
    rows = [row_of.setdefault(example["inputs"], len(row_of)) for example in examples]
    texts = vocabulary.encode_all(list(row_of))
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
