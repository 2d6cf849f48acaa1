"""Generation examples of several views. No TensorFlow here.

From every pair of a query and a passage, a student of multiview identifiers learns to write the
passage's title, spans of its text and its pseudo-queries. A marker before the query tells which of
the three it has to write; see dgr_jax.identifiers.multiview for the tokens.

    pairs = [(text, passage index, qid), ...]
    views = Views(vocabulary, title=titles, query=queries, body=Body(index.tokens, index.starts))
    drawn = blocks(pairs, ViewMixture(), views, seed=0, counts=counts)
    examples(drawn, store.pids)                 # dicts, for a SeqIO task
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dgr_jax import ranges
from dgr_jax.data import examples as texts_of
from dgr_jax.data.identifier_rows import ByPassage, IdentifierRows
from dgr_jax.data.same_text import normalised
from dgr_jax.data.vocabulary import VIEWS, Vocabulary
from dgr_jax.special_tokens import UNK_ID

_BLOCK = 256  # pairs that are drawn for together; another size draws other identifiers
_SAMPLE = 1 << 23  # the number of tokens from which rarities are computed


@dataclass(frozen=True)
class ViewMixture:
    """How many examples one (query, passage) pair gives, by view (MINDER, Li et al. 2023).

    titles: how many times the passage's title is repeated; 0 leaves titles out.
    spans, pseudo_queries: how many different ones are drawn, or all where there are fewer; 0 leaves
      the view out.
    preference: a span that holds all of the query is e**preference times as likely as one that
      shares nothing with it; with 0 all are equally likely. See `SpanSampler`.
    """

    titles: int = 3
    spans: int = 10
    pseudo_queries: int = 5
    preference: float = 8.0

    def __post_init__(self) -> None:
        settings = ("titles", "spans", "pseudo_queries", "preference")
        ranges.check(self, **dict.fromkeys(settings, ranges.at_least(0)))
        if not (self.titles or self.spans or self.pseudo_queries):
            raise ValueError(
                "ViewMixture: got 0 titles, spans and pseudo_queries, expected one of them above 0"
            )

    def of(self, view: str) -> int:
        """The number of examples of a view."""
        return dict(zip(VIEWS, (self.titles, self.spans, self.pseudo_queries), strict=True))[view]


@dataclass(frozen=True)
class Body:
    """The tokens of all passages, in the form in which a suffix array holds them.

    tokens: int [N + P], the passages one after another, each followed by a 0.
    starts: int [P], the position in `tokens` where each passage begins.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [P]: number of tokens of each passage."""
        return np.diff(self.starts, append=len(self.tokens)).astype(np.int64) - 1

    def gather(self, passages: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens of passages int [n], one after another, as three arrays int64 [S].

        They hold, for each token, which of the n passages it belongs to, its position in the
        passage, and the token itself.
        """
        lengths = self.lengths[passages]
        owner = np.repeat(np.arange(len(passages)), lengths)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens = self.tokens[np.asarray(self.starts)[passages].astype(np.int64)[owner] + offset]
        return owner, offset, tokens.astype(np.int64)

    def rarity(self, vocab_size: int) -> np.ndarray:
        """f64 [V]: log(1 + P / number of passages with a token), a form of inverse document
        frequency (Sparck Jones 1972). A token in no passage counts as one in a single passage.

        It is computed from passages with about 8M tokens, evenly spread over the corpus.
        """
        step = -(-len(self.tokens) // _SAMPLE)
        chosen = np.arange(0, len(self.starts), step)
        owner, _, tokens = self.gather(chosen)
        held = np.sort(owner * vocab_size + tokens)  # np.unique takes thirty times as long
        held = held[np.diff(held, prepend=-1) > 0]
        holders = np.bincount(held % vocab_size, minlength=vocab_size)
        return np.log1p(len(chosen) / np.maximum(holders, 1))


@dataclass(frozen=True)
class SpanSampler:
    """Draws spans of a passage's text; spans that share words with the query are more likely.

    The chance of a span is proportional to exp(preference * share). share is the part of the query
    that the span holds: the sum of the rarities of the different query tokens in the span, divided
    by the sum over all tokens of the query, at most 1. Words are compared as tokens, so that it
    works for scripts without spaces too; the tokens of the query in lower case and with capital
    initials count as query tokens. Unknown pieces count as shared with nothing. To prefer spans
    near the query is MINDER's idea (Li et al. 2023, after SEAL, Bevilacqua et al. 2022); this
    weight is ours.

    span_tokens: the number of tokens of a span; a shorter passage is a single span.
    count: how many different spans to draw from a passage; it gives fewer where it has fewer, and
      none where its text is blank.
    rarity: f64 [V], see Body.rarity.
    opening: bool [V], the tokens with which a span may begin, the same as for
      SuffixArray.constraint; None allows all.
    """

    body: Body
    encode: Callable[[str], Sequence[int]]
    span_tokens: int
    count: int
    preference: float
    rarity: np.ndarray
    opening: np.ndarray | None = None

    def __call__(
        self, texts: Sequence[str], passages: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws spans for n queries and their passages int [n].

        Returns which of the n a span belongs to, int64 [S], ascending; and its tokens, int32
        [S, span_tokens], padded with 0 where the passage is shorter.
        """
        pair, offset, log_weights = self.log_weights(texts, passages)
        drawn = draw(pair, log_weights, self.count, rng)
        pair, offset = pair[drawn], offset[drawn]
        within = offset[:, None] + np.arange(self.span_tokens)
        inside = within < self.body.lengths[passages[pair]][:, None]
        first = np.asarray(self.body.starts)[passages[pair]].astype(np.int64)
        tokens = self.body.tokens[np.where(inside, first[:, None] + within, 0)]
        return pair, np.where(inside, tokens, 0).astype(np.int32)

    def log_weights(
        self, texts: Sequence[str], passages: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All spans that may be drawn: which pair each belongs to, int64 [S], ascending; the
        position of its first token, int64 [S]; preference * share, f64 [S]."""
        pair, offset, tokens = self.body.gather(passages)
        share = self._shares(texts, pair, offset, tokens)
        last = np.maximum(self.body.lengths[passages] - self.span_tokens, 0)
        legal = offset <= last[pair]
        if self.opening is not None:
            legal &= self.opening[tokens]
        return pair[legal], offset[legal], self.preference * share[legal]

    def _shares(self, texts, pair, offset, tokens):
        """f64 [S]: for the span that begins at each token, the share of the query that it holds.

        A query token at j counts in the spans that begin in (j - span_tokens, j], but only in those
        after the previous place of the same token, so that no span counts a token twice.
        """
        size = len(self.rarity)
        keys, totals = self._query_keys(texts)
        here = pair * size + tokens
        at = np.minimum(np.searchsorted(keys, here), max(0, len(keys) - 1))
        places = np.flatnonzero(keys[at] == here) if len(keys) else np.zeros(0, np.int64)
        places = places[np.argsort(here[places], kind="stable")]
        begins = np.maximum(places - self.span_tokens + 1, places - offset[places])
        again = np.flatnonzero(here[places[1:]] == here[places[:-1]])
        begins[again + 1] = np.maximum(begins[again + 1], places[again] + 1)
        values = self.rarity[tokens[places]]
        changes = np.bincount(begins, values, len(tokens) + 1)
        changes -= np.bincount(places + 1, values, len(tokens) + 1)
        return np.clip(np.cumsum(changes)[:-1] / totals[pair], 0.0, 1.0)

    def _query_keys(self, texts):
        """(query * V + token, int64 [.], sorted, for the tokens of all forms of each query; the
        summed rarity of the query's tokens as it is written, f64 [n], 1 where it has none)."""
        keys, totals = [], np.ones(len(texts))
        for query, text in enumerate(texts):
            written = {token for token in self.encode(text) if token > UNK_ID}
            forms = {text.lower(), string.capwords(text)} - {text}
            shared = written.union(*map(self.encode, forms)) - set(range(UNK_ID + 1))
            keys.extend(query * len(self.rarity) + token for token in shared)
            if written:
                totals[query] = self.rarity[list(written)].sum()
        return np.sort(np.array(keys, np.int64)), totals


def draw(
    group: np.ndarray, log_weights: np.ndarray, most: int, rng: np.random.Generator
) -> np.ndarray:
    """The ascending places of at most `most` entries of every group, drawn without replacement.

    group: int [S], ascending. log_weights: f64 [S]; the chance of an entry is proportional to its
    exponential (Gumbel top-k, Kool et al. 2019; Efraimidis and Spirakis 2006).
    """
    order = np.lexsort((-(log_weights + rng.gumbel(size=len(group))), group))
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    return np.sort(order[rank < most])


_Maker = Callable[[Sequence[str], np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class ExampleBlock(NamedTuple):
    """The E examples of n pairs; examples of the same pair are neighbours.

    Of each pair: texts, qids, and passages int64 [n]. Of each example: pair int64 [E], view int64
    [E] (a place in VIEWS), and targets int32 [E, T], padded with 0.
    """

    texts: Sequence[str]
    qids: Sequence[str]
    passages: np.ndarray
    pair: np.ndarray
    view: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Views:
    """The sources of the identifiers of examples; a view whose source is None gives no example.

    title, query: identifier tables. body: the tokens of the passages. span_tokens, opening: see
    SpanSampler.
    """

    vocabulary: Vocabulary
    title: IdentifierRows | None = None
    query: IdentifierRows | None = None
    body: Body | None = None
    span_tokens: int = 10
    opening: np.ndarray | None = None

    def _makers(self, mixture: ViewMixture) -> dict[str, _Maker]:
        makers: dict[str, _Maker] = {}
        if self.title is not None and mixture.titles:
            makers["title"] = _Titles(self.title, mixture.titles)
        if self.body is not None and mixture.spans:
            makers["body"] = SpanSampler(
                self.body, self.vocabulary.encode, self.span_tokens, mixture.spans,
                mixture.preference, self._rarity, self.opening,
            )  # fmt: skip
        if self.query is not None and mixture.pseudo_queries:
            makers["query"] = _PseudoQueries(self.query, mixture.pseudo_queries)
        if not makers:
            raise ValueError(
                f"{mixture}: got no view that it asks for, expected a table of titles or "
                "pseudo-queries, or the body"
            )
        for view in makers:
            self.vocabulary.marker(view)  # raises ValueError where the vocabulary has none
        return makers

    @cached_property
    def _rarity(self) -> np.ndarray:
        assert self.body is not None  # asked for by spans of it alone
        return self.body.rarity(self.vocabulary.text_size)


def blocks(
    pairs: Iterable[tuple[str, int, str]],
    mixture: ViewMixture,
    views: Views,
    *,
    seed: int | Sequence[int],
    counts: Counter,
) -> Iterator[ExampleBlock]:
    """The examples of each pair, in blocks of 256 pairs; the same for the same pairs and seed.

    pairs: (text, passage index, qid).
    counts: filled while the blocks are read: `pairs`; and for each view the number of its examples,
      `pairs_without_<view>`, and `pairs_with_fewer_<view>` than the mixture asks for.

    Raises ValueError when the mixture asks for none of the views, or one of them has no marker.
    """
    return _blocks(pairs, mixture, views._makers(mixture), seed, counts)


def _blocks(pairs, mixture, makers, seed, counts):
    rng = np.random.default_rng(seed)
    stream = iter(pairs)
    while held := list(itertools.islice(stream, _BLOCK)):
        texts, passages, qids = zip(*held, strict=True)
        passages = np.array(passages, np.int64)
        drawn = {view: make(texts, passages, rng) for view, make in makers.items()}
        counts["pairs"] += len(held)
        for view, (pair, _) in drawn.items():
            examples_of = np.bincount(pair, minlength=len(held))
            few = (examples_of > 0) & (examples_of < mixture.of(view))
            counts[view] += len(pair)
            counts[f"pairs_without_{view}"] += int((examples_of == 0).sum())
            counts[f"pairs_with_fewer_{view}"] += int(few.sum())
        yield _joined(texts, qids, passages, drawn)


def _joined(texts, qids, passages, drawn) -> ExampleBlock:
    """One block from the (pair, targets) that were drawn for each view."""
    pairs, tokens = zip(*drawn.values(), strict=True)
    width = max(part.shape[1] for part in tokens)
    pair = np.concatenate(pairs)
    view = np.repeat([VIEWS.index(view) for view in drawn], list(map(len, pairs)))
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in tokens]
    targets = np.concatenate(padded)
    order = np.argsort(pair, kind="stable")
    return ExampleBlock(texts, qids, passages, pair[order], view[order], targets[order])


class _Rows(ByPassage):
    """Draws `count` rows of a table for each passage."""

    def __init__(self, table: IdentifierRows, count: int) -> None:
        super().__init__(table)
        self._tokens, self._count = table.tokens, count

    def _targets(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._tokens[rows], np.int32)


class _Titles(_Rows):
    def __call__(self, texts, passages, rng):
        pair, rows = self.of(passages)
        return np.repeat(pair, self._count), self._targets(np.repeat(rows, self._count))


class _PseudoQueries(_Rows):
    def __call__(self, texts, passages, rng):
        pair, rows = self.of(passages)
        drawn = draw(pair, np.zeros(len(pair)), self._count, rng)
        return pair[drawn], self._targets(rows[drawn])


def examples(blocks: Iterable[ExampleBlock], pids: Sequence[str]) -> Iterator[dict[str, Any]]:
    """{inputs: str, view: str, targets: int32 [T'], qid: str, pid: str} of each example.

    The inputs lack the marker of the view, which is a token that no text can express.
    """
    for block in blocks:
        lengths = (block.targets > 0).sum(axis=1)
        each = zip(block.pair, block.view, block.targets, lengths, strict=True)
        for pair, view, target, length in each:
            yield {
                "inputs": block.texts[pair],
                "view": VIEWS[view],
                "targets": target[:length],
                "qid": block.qids[pair],
                "pid": pids[block.passages[pair]],
            }


def pseudo_queries(
    path: str, store, *, copies_of: Iterable[str] = (), counts: Counter
) -> Iterator[tuple[int, str]]:
    """(passage index, text) of a pseudo-query file, without copies of the queries `copies_of`.

    store: PassageStore. copies_of: test queries; a text is a copy if it equals one of them after
    both are `normalised`. counts: filled while the stream is read: pseudo_queries (those kept) and
    copies_of_test_queries (those left out).

    `examples.pseudo_queries` says what the file must hold, and what else is left out.
    """
    tests = frozenset(map(normalised, copies_of))
    for pair in texts_of.pseudo_queries(path, store, test_queries=tests, counts=counts):
        counts["pseudo_queries"] += 1
        yield pair
