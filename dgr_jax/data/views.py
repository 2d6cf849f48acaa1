"""Generation examples of several views. No TensorFlow here.

A student that writes multiview identifiers learns, from every (query, passage) pair, to write the
passage's title, spans of its text and its pseudo-queries, each asked for by a marker before the
query: see dgr_jax.identifiers.multiview for the tokens.

    pairs = [(text, passage index, qid), ...]
    views = Views(vocabulary, title=titles, query=queries, body=Body(index.tokens, index.starts))
    made = blocks(pairs, ViewMixture(), views, seed=0, counts=counts)
    examples(made, store.pids)                  # dicts, for a SeqIO task
    features(made, vocabulary, query_length)    # or arrays, as GenerationConverter makes them
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from dgr_jax import ranges
from dgr_jax.data import examples as texts_of
from dgr_jax.data.same_text import normalised
from dgr_jax.data.vocabulary import VIEWS, Vocabulary
from dgr_jax.special_tokens import UNK_ID

_BLOCK = 256  # pairs; what is drawn depends on it
_SAMPLE = 1 << 23  # tokens that their rarity is measured on


class Table(Protocol):
    """What is asked of an identifier table."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def passages(self) -> np.ndarray: ...
    @property
    def num_passages(self) -> int: ...


@dataclass(frozen=True)
class ViewMixture:
    """Examples of one (query, passage) pair, by view (MINDER, Li et al. 2023).

    titles: the passage's title, so many times. spans, pseudo_queries: so many different ones, or
    all where there are fewer; 0 leaves a view out.
    preference: a span that holds all of the query is e**preference times as likely as one that
    shares nothing with it; 0: all are equally likely. See `SpanSampler`.
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
        """Examples of a view."""
        return dict(zip(VIEWS, (self.titles, self.spans, self.pseudo_queries), strict=True))[view]


@dataclass(frozen=True)
class Body:
    """The tokens of all passages, as a suffix array holds them.

    tokens: int [N + P], the passages one after another, each followed by a 0.
    starts: int [P], position of each passage.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [P]: tokens of each passage."""
        return np.diff(self.starts, append=len(self.tokens)).astype(np.int64) - 1

    def gather(self, passages: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens of passages int [n], one after another: int64 [S] each.

        Which of the n it belongs to, its position in the passage, the token.
        """
        lengths = self.lengths[passages]
        owner = np.repeat(np.arange(len(passages)), lengths)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens = self.tokens[np.asarray(self.starts)[passages].astype(np.int64)[owner] + offset]
        return owner, offset, tokens.astype(np.int64)

    def rarity(self, vocab_size: int) -> np.ndarray:
        """f64 [V]: log(1 + P / passages that hold a token), as inverse document frequency (Sparck
        Jones 1972); a token of no passage counts as of one. Measured on passages of about 8M
        tokens, evenly spread."""
        step = -(-len(self.tokens) // _SAMPLE)
        chosen = np.arange(0, len(self.starts), step)
        owner, _, tokens = self.gather(chosen)
        held = np.sort(owner * vocab_size + tokens)  # np.unique takes thirty times as long
        held = held[np.diff(held, prepend=-1) > 0]
        number = np.bincount(held % vocab_size, minlength=vocab_size)
        return np.log1p(len(chosen) / np.maximum(number, 1))


@dataclass(frozen=True)
class SpanSampler:
    """Draws spans of a passage's text, rather those that share words with the query.

    The chance of a span is proportional to exp(preference * share). share is the part of the query
    that the span holds: the rarities of the different query tokens in the span, over those of all
    tokens of the query, at most 1. Words are compared as tokens, so that scripts without spaces
    have words too; a query also has the tokens of its lower-cased and of its capitalised form.
    Unknown pieces are shared with nothing. That spans near the query are preferred is MINDER's
    (Li et al. 2023, after SEAL, Bevilacqua et al. 2022); this weight is ours.

    body, span_tokens: spans have exactly so many tokens; a shorter passage is one span.
    number: different spans of a passage; fewer where it has fewer, none where its text is blank.
    rarity: f64 [V], see Body.rarity. opening: bool [V], tokens a span may begin with, the same as
    for SuffixArray.constraint; None: all.
    """

    body: Body
    encode: Callable[[str], Sequence[int]]
    span_tokens: int
    number: int
    preference: float
    rarity: np.ndarray
    opening: np.ndarray | None = None

    def __call__(
        self, texts: Sequence[str], passages: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """texts: n queries; passages int [n]. -> which of the n int64 [S], ascending; tokens int32
        [S, span_tokens], padded with 0 where the passage is shorter."""
        pair, offset, log_weights = self.log_weights(texts, passages)
        drawn = draw(pair, log_weights, self.number, rng)
        pair, offset = pair[drawn], offset[drawn]
        within = offset[:, None] + np.arange(self.span_tokens)
        inside = within < self.body.lengths[passages[pair]][:, None]
        first = np.asarray(self.body.starts)[passages[pair]].astype(np.int64)
        tokens = self.body.tokens[np.where(inside, first[:, None] + within, 0)]
        return pair, np.where(inside, tokens, 0).astype(np.int32)

    def log_weights(
        self, texts: Sequence[str], passages: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All spans that may be drawn: pair int64 [S], ascending; position of the first token
        int64 [S]; preference * share f64 [S]."""
        pair, offset, tokens = self.body.gather(passages)
        share = self._shares(texts, pair, offset, tokens)
        last = np.maximum(self.body.lengths[passages] - self.span_tokens, 0)
        legal = offset <= last[pair]
        if self.opening is not None:
            legal &= self.opening[tokens]
        return pair[legal], offset[legal], self.preference * share[legal]

    def _shares(self, texts, pair, offset, tokens):
        """Share of the query in the span that begins at each token, f64 [S].

        A query token at j counts in the spans that begin in (j - span_tokens, j] and after the
        place of the same token before it, where that one counts.
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
        """Sorted query * V + token, int64 [.], of every form of each query; rarity of all tokens
        of the query as it is written, f64 [n], 1 where it has none."""
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
    group: np.ndarray, log_weights: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Ascending places of at most `number` entries of every group, drawn without replacement.

    group: int [S], ascending; log_weights f64 [S]: the chance of an entry is proportional to their
    exponential (Gumbel top-k, Kool et al. 2019; Efraimidis and Spirakis 2006).
    """
    order = np.lexsort((-(log_weights + rng.gumbel(size=len(group))), group))
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    return np.sort(order[rank < number])


_Maker = Callable[[Sequence[str], np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class Block(NamedTuple):
    """Examples of n pairs: texts and qids of each, passages int64 [n]; and of each of E examples,
    those of a pair together: pair int64 [E], view int64 [E] (a place in VIEWS), targets int32
    [E, T], padded with 0."""

    texts: Sequence[str]
    qids: Sequence[str]
    passages: np.ndarray
    pair: np.ndarray
    view: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Views:
    """What the identifiers of examples are drawn from; a view that is None gives none.

    title, query: identifier tables; body: the tokens of the passages. span_tokens, opening: see
    SpanSampler.
    """

    vocabulary: Vocabulary
    title: Table | None = None
    query: Table | None = None
    body: Body | None = None
    span_tokens: int = 10
    opening: np.ndarray | None = None

    def _makers(self, mixture: ViewMixture) -> dict[str, _Maker]:
        made: dict[str, _Maker] = {}
        if self.title is not None and mixture.titles:
            made["title"] = _Titles(self.title, mixture.titles)
        if self.body is not None and mixture.spans:
            made["body"] = SpanSampler(
                self.body, self.vocabulary.encode, self.span_tokens, mixture.spans,
                mixture.preference, self._rarity, self.opening,
            )  # fmt: skip
        if self.query is not None and mixture.pseudo_queries:
            made["query"] = _PseudoQueries(self.query, mixture.pseudo_queries)
        if not made:
            raise ValueError(
                f"{mixture}: got no view that it asks for, expected a table of titles or "
                "pseudo-queries, or the body"
            )
        for view in made:
            self.vocabulary.marker(view)  # refuses a vocabulary that has none
        return made

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
) -> Iterator[Block]:
    """The examples of each pair, 256 pairs a block; the same for the same pairs and seed.

    pairs: (text, passage index, qid).
    counts, filled while the blocks are read: pairs; and for each view its examples, its
    `pairs_without_<view>` and the `pairs_with_fewer_<view>` than the mixture asks for.

    Raises ValueError when the mixture asks for none of the views, or one has no marker.
    """
    return _blocks(pairs, mixture, views._makers(mixture), seed, counts)


def _blocks(pairs, mixture, makers, seed, counts):
    rng = np.random.default_rng(seed)
    stream = iter(pairs)
    while held := list(itertools.islice(stream, _BLOCK)):
        texts, passages, qids = zip(*held, strict=True)
        passages = np.array(passages, np.int64)
        made = {view: make(texts, passages, rng) for view, make in makers.items()}
        counts["pairs"] += len(held)
        for view, (pair, _) in made.items():
            number = np.bincount(pair, minlength=len(held))
            few = (number > 0) & (number < mixture.of(view))
            counts[view] += len(pair)
            counts[f"pairs_without_{view}"] += int((number == 0).sum())
            counts[f"pairs_with_fewer_{view}"] += int(few.sum())
        yield _joined(texts, qids, passages, made)


def _joined(texts, qids, passages, made) -> Block:
    """One block of the (pair, targets) of each view."""
    found, tokens = zip(*made.values(), strict=True)
    width = max(part.shape[1] for part in tokens)
    pair = np.concatenate(found)
    view = np.repeat([VIEWS.index(view) for view in made], list(map(len, found)))
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in tokens]
    targets = np.concatenate(padded)
    order = np.argsort(pair, kind="stable")
    return Block(texts, qids, passages, pair[order], view[order], targets[order])


class _ByPassage:
    """The rows of an identifier table by passage."""

    def __init__(self, table: Table, number: int) -> None:
        rows = np.repeat(np.arange(len(table.tokens), dtype=np.int32), np.diff(table.offsets))
        self._rows = rows[np.argsort(table.passages, kind="stable")]
        sizes = np.bincount(table.passages, minlength=table.num_passages)
        self._offsets = np.append(0, np.cumsum(sizes))
        self._tokens = table.tokens
        self._number = number

    def _of(self, passages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All rows of each passage: which passage int64 [S], ascending; row int32 [S]."""
        first = self._offsets[passages]
        sizes = self._offsets[passages + 1] - first
        pair = np.repeat(np.arange(len(passages)), sizes)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return pair, self._rows[first[pair] + within]

    def _targets(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._tokens[rows], np.int32)


class _Titles(_ByPassage):
    def __call__(self, texts, passages, rng):
        pair, rows = self._of(passages)
        return np.repeat(pair, self._number), self._targets(np.repeat(rows, self._number))


class _PseudoQueries(_ByPassage):
    def __call__(self, texts, passages, rng):
        pair, rows = self._of(passages)
        drawn = draw(pair, np.zeros(len(pair)), self._number, rng)
        return pair[drawn], self._targets(rows[drawn])


def examples(made: Iterable[Block], pids: Sequence[str]) -> Iterator[dict[str, Any]]:
    """{inputs: str, view: str, targets: int32 [T'], qid: str, pid: str} of each example.

    The inputs are without the marker of the view: it is a token, and no text becomes it.
    """
    for block in made:
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

    store: PassageStore. copies_of: test queries; a copy is a text that equals one of them when
    both are `normalised`.
    counts, filled while the stream is read: pseudo_queries (kept), copies_of_test_queries (left
    out).

    What the file must hold, and what else is left out: see `examples.pseudo_queries`.
    """
    tests = frozenset(map(normalised, copies_of))
    for pair in texts_of.pseudo_queries(path, store, test_queries=tests, counts=counts):
        counts["pseudo_queries"] += 1
        yield pair
