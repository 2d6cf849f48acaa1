"""Queries -> passages, from identifiers of several views: titles, body spans, pseudo-queries.

    index = MultiviewIndex(text, {"title": titles, "query": pseudo_queries})
    results = index.rank([
        written_spans(spans_result),                              # beam_search(record=True)
        written_rows("title", titles_result, trie.table_rows(titles_result.rows), titles),
        written_rows("query", queries_result, ...),
    ])
    results[0].passages, results[0].scores                        # of the first query, best first
    results[0].identifiers(40)                                    # by which its passages were found

The method is that of SEAL (Bevilacqua et al. 2022) and MINDER (Li et al. 2023). For each query:

1. Identifiers of weight 0 are left out, as they add nothing to a score.
2. Identifiers that occur at most Scoring.common times nominate the passages that hold them.
3. Where more than Scoring.max_passages are nominated, those stay to which their identifiers could
   add most. The bound is a sum over the places of the passage where spans begin, of the best weight
   there, plus the weights of its titles and pseudo-queries. Ties are broken as in `ranking`.
4. All identifiers are looked up in the passages that stay, and passage_scoring scores them.

The host finds where identifiers occur. Weights and scores come from one function on the device,
whose inputs are padded to a few sizes, so that it is not compiled again for every query.

Axis letters: B queries, M identifiers of a view, K identifiers of a query, T tokens, P passages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dgr_jax import moved
from dgr_jax.corpora import ranking
from dgr_jax.corpora.ranking import PidOf
from dgr_jax.decoding import passage_scoring
from dgr_jax.decoding.passage_scoring import BODY, VIEWS, Identifiers, Scoring
from dgr_jax.decoding.suffix_array import SuffixArray
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.retrieval.multiview.written import Written

_FEWEST = 64, 128  # the smallest padded numbers of identifiers (passages), and of occurrences


class _Query(NamedTuple):
    """Identifiers of one query whose weight is above 0, best first; views int32."""

    log_probs: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    views: np.ndarray
    weights: np.ndarray
    lo: np.ndarray


class _Places(NamedTuple):
    """Occurrences, int [n] each.

    owner: which identifier occurs. passage: where it occurs. start: the position in the passage, 0
    where the identifier is no span.
    """

    owner: np.ndarray
    passage: np.ndarray
    start: np.ndarray


class _Packed(NamedTuple):
    """Identifiers by passage.

    members: int32 [P, K'], identifiers of the query, best first, then -1. spans, starts: int32
    [P, E] as in Identifiers, where spans are places in `members`.
    """

    members: np.ndarray
    spans: np.ndarray
    starts: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """The passages int32 [n] of one query and their scores f32 [n], in the order of `ranking`."""

    passages: np.ndarray
    scores: np.ndarray
    query: _Query
    packed: _Packed

    def identifiers(self, limit: int) -> Identifiers:
        """The `limit` identifiers with the highest weights that each passage holds, as numpy arrays
        [n, limit, ...]. All their occurrences are listed; E is the most that any passage has."""
        members, spans, starts = self.packed
        members = members[:, :limit]
        members = np.pad(members, ((0, 0), (0, limit - members.shape[1])), constant_values=-1)
        order = np.argsort(~((0 <= spans) & (spans < limit)), axis=1, kind="stable")
        spans, starts = (np.take_along_axis(leaf, order, 1) for leaf in (spans, starts))
        spans = np.where(spans < limit, spans, -1)
        used = (spans >= 0).sum(1).max(initial=0)
        starts = np.where(spans >= 0, starts, 0)
        return _gather(self.query[:4], _Packed(members, spans[:, :used], starts[:, :used]))


def best(results: Sequence[Scored], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Passage indices int32 and scores f32 [B, depth], best first, then -1 and -inf."""
    passages = np.full((len(results), depth), -1, np.int32)
    scores = np.full((len(results), depth), -np.inf, np.float32)
    for query, result in enumerate(results):
        count = min(depth, len(result.passages))
        passages[query, :count] = result.passages[:count]
        scores[query, :count] = result.scores[:count]
    return passages, scores


@dataclasses.dataclass(frozen=True, eq=False)
class MultiviewIndex:
    """Where identifiers occur, and how passages are scored by them.

    text: index of the passages, None where no body spans are searched; tables: titles and
    pseudo-queries by view, over the same passages. num_tokens: of the corpus; 0: of the text.
    special_ids: token ids that belong to no text, see passage_scores.
    allowed: bool [P], the passages that may be returned; None allows all. Counts are those of all
    passages in either case.
    pid_of: passage index -> pid, by which ties are ordered; None orders them by passage index.

    Raises ValueError for an unknown view and for tables or masks of another number of passages.
    """

    text: SuffixArray | None
    tables: Mapping[str, IdentifierTable]
    scoring: Scoring = Scoring()
    special_ids: tuple[int, ...] = (1,)
    allowed: np.ndarray | None = None
    num_tokens: int = 0
    pid_of: PidOf | None = None

    def __post_init__(self) -> None:
        if self.text is not None:
            object.__setattr__(self, "num_tokens", self.num_tokens or len(self.text))
        elif not self.tables or not self.num_tokens:
            raise ValueError(
                "MultiviewIndex.text: got None; expected num_tokens and a table instead of it"
            )
        expected = self.num_passages
        for view, table in self.tables.items():
            if view not in VIEWS or view == "body":
                raise ValueError(f"MultiviewIndex.tables: got view {view!r}, expected title, query")
            if table.num_passages != expected:
                raise ValueError(
                    f"MultiviewIndex.tables: {view!r} has {table.num_passages} passages; expected "
                    f"{expected}, those of the text"
                )
        mask = self.allowed
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (expected,)):
            raise ValueError(
                f"MultiviewIndex.allowed must be bool of shape [{expected}]; got {mask.dtype} of "
                f"shape {mask.shape}"
            )

    @property
    def num_passages(self) -> int:
        """Passages of the corpus."""
        if self.text is not None:
            return self.text.num_passages
        return next(iter(self.tables.values())).num_passages

    @property
    def _most_passages(self) -> int:
        """How many passages are scored at most; those of a query are padded to that."""
        return min(self.scoring.max_passages, size_class(self.num_passages, _FEWEST[0]))

    def rank(self, written: Sequence[Written]) -> list[Scored]:
        """The passages that hold identifiers of each of B queries; none where no passage does.

        written: the views, in any order; a view has no identifier twice for a query. Among equal
          weights and log-probabilities, titles come before body spans before pseudo-queries.
        Raises ValueError for a view that has no table, and without any view.
        """
        waiting = []
        for query in self._queries(written):
            places, nominated = self._nominated(query, self._rare(query))
            if len(nominated):
                places = _joined([places, self._common(query, nominated)])
            packed = _pack(query, places, nominated, self._most_passages)
            scores = self._scores(query, packed) if len(nominated) else np.zeros(0, np.float32)
            waiting.append((nominated, scores, query, packed))
        return [_ranked(*parts, self.pid_of) for parts in waiting]

    def _queries(self, written: Sequence[Written]) -> list[_Query]:
        if not written:
            raise ValueError("MultiviewIndex.rank: got no view, expected one or more")
        known = (*["body"] * (self.text is not None), *self.tables)
        if unknown := [part.view for part in written if part.view not in known]:
            raise ValueError(
                f"MultiviewIndex.rank: got view {unknown[0]!r}, expected {', '.join(known)}: set "
                "MultiviewIndex.tables"
            )
        written = sorted(written, key=lambda part: VIEWS.index(part.view))
        length = max(part.tokens.shape[-1] for part in written)
        widen = lambda x: np.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])))
        tokens = np.concatenate([widen(part.tokens) for part in written], 1)
        log_probs, lo, hi = (
            np.concatenate([getattr(part, name) for part in written], 1)
            for name in ("log_probs", "lo", "hi")
        )
        views = [np.full(part.lo.shape, VIEWS.index(part.view), np.int32) for part in written]
        views, counts = np.concatenate(views, 1), (hi - lo).astype(np.int32)
        weights = np.asarray(
            _weigh(log_probs, counts, views, float(self.num_tokens), scoring=self.scoring)
        )
        weights = np.where(counts > 0, weights, 0.0)
        order = np.lexsort((-log_probs, -weights))  # the order of passage_scores
        leaves = (log_probs, counts, tokens, views, weights, lo)
        return [
            _Query(*(leaf[b, order[b][: (weights[b] > 0).sum()]] for leaf in leaves))
            for b in range(len(order))
        ]

    def _entries(self, query: _Query, k: np.integer) -> np.ndarray:
        """Where the k-th identifier occurs: positions in the text, or passages of its table."""
        view, part = query.views[k], slice(query.lo[k], query.lo[k] + query.counts[k])
        if view == BODY and self.text is not None:
            return np.asarray(self.text.suffixes[part])
        return np.asarray(self.tables[VIEWS[view]].passages[part])

    def _rare(self, query: _Query) -> _Places:
        """All occurrences, in allowed passages, of the identifiers that nominate passages."""
        rare = np.flatnonzero(query.counts <= self.scoring.common)
        entries_of = [self._entries(query, k) for k in rare]
        owner = np.repeat(rare, [len(entries) for entries in entries_of])
        entry = np.concatenate([*entries_of, np.zeros(0, np.int32)]).astype(np.int32)
        body = query.views[owner] == BODY
        passage, start = entry.copy(), np.zeros_like(entry)
        if self.text is not None and body.any():
            starts = self.text.starts
            passage[body] = np.searchsorted(starts, entry[body], side="right") - 1
            start[body] = entry[body] - starts[passage[body]]
        keep = slice(None) if self.allowed is None else self.allowed[passage]
        return _Places(owner[keep], passage[keep], start[keep])

    def _nominated(self, query: _Query, places: _Places) -> tuple[_Places, np.ndarray]:
        """(the occurrences in the passages that stay, the passages that stay, ascending)."""
        passages, of_passage = np.unique(places.passage, return_inverse=True)
        most = self.scoring.max_passages
        if len(passages) <= most:
            return places, passages
        # One span counts for each place where spans begin: the best, as owners are sorted.
        begin = np.where(query.views[places.owner] == BODY, places.start, -1 - places.owner)
        key = of_passage * (np.ptp(begin) + 1) + begin - begin.min()
        _, once = np.unique(key, return_index=True)
        bounds = np.bincount(of_passage[once], query.weights[places.owner[once]])
        stay = np.sort(_order(bounds, passages, self.pid_of)[:most])
        keep = np.isin(of_passage, stay)
        return _Places(*(leaf[keep] for leaf in places)), passages[stay]

    def _common(self, query: _Query, nominated: np.ndarray) -> _Places:
        """The occurrences, in the nominated passages, of the identifiers that nominate none."""
        common = np.flatnonzero(query.counts > self.scoring.common)
        spans = common[query.views[common] == BODY]
        places = [self._spans_in(query, spans, nominated)] if len(spans) else []
        for k in common[query.views[common] != BODY]:
            passage = nominated[np.isin(nominated, self._entries(query, k))]
            places.append(_Places(np.full(len(passage), k), passage, np.zeros(len(passage), int)))
        return _joined(places)

    def _spans_in(self, query: _Query, spans: np.ndarray, nominated: np.ndarray) -> _Places:
        """The occurrences of body spans, found in the text of the passages."""
        assert self.text is not None
        tokens, starts = self.text.tokens, self.text.starts
        begins, following = starts[nominated], np.minimum(nominated + 1, len(starts) - 1)
        ends = np.where(nominated < following, starts[following], len(tokens))  # a 0 is the last
        text = np.concatenate([tokens[a:b] for a, b in zip(begins, ends, strict=True)])
        offsets = np.cumsum(ends - begins) - (ends - begins)
        special = np.isin(query.tokens[spans], (0, *self.special_ids))
        order = np.argsort(special, axis=1, kind="stable")
        plain = np.take_along_axis(np.where(special, 0, query.tokens[spans]), order, 1)
        owner, start = passage_scoring.occurrences(text, plain)
        row = np.searchsorted(offsets, start, side="right") - 1
        return _Places(spans[owner], nominated[row], start - offsets[row])

    def _scores(self, query: _Query, packed: _Packed) -> jax.Array:
        """f32 [_most_passages], which the device may still be computing."""
        size = size_class(len(query.lo), _FEWEST[0])
        grow = lambda leaf: np.pad(leaf, [(0, size - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))
        return _score(
            tuple(map(grow, query[:4])),
            packed,
            float(self.num_tokens),
            scoring=self.scoring,
            special_ids=self.special_ids,
        )


_weigh = jax.jit(passage_scoring.identifier_weights, static_argnames="scoring")


@functools.partial(jax.jit, static_argnames=("scoring", "special_ids"))
def _score(leaves, packed, num_tokens, *, scoring, special_ids) -> jax.Array:
    identifiers = _gather(leaves, packed)
    return passage_scoring.passage_scores(identifiers, num_tokens, scoring, special_ids=special_ids)


def _gather(leaves: Sequence, packed: _Packed) -> Identifiers:
    """The identifiers of each passage, on the host or the device.

    leaves: the first four arrays of a `_Query`.
    """
    at = packed.members.clip(0)
    log_probs, counts, tokens, views = (leaf[at] for leaf in leaves)
    mask = packed.members >= 0
    return Identifiers(log_probs, counts, tokens, views, mask, packed.spans, packed.starts)


def _joined(parts: Sequence[_Places]) -> _Places:
    none = np.zeros(0, np.int64)
    return _Places(*map(np.concatenate, zip(_Places(none, none, none), *parts, strict=True)))


def _pack(query: _Query, places: _Places, passages: np.ndarray, rows: int) -> _Packed:
    """The occurrences by passage, padded to `rows` passages and to one of a few sizes."""
    width = max(1, len(query.lo))
    row = np.searchsorted(passages, places.passage)
    pairs, of_pair = np.unique(row * width + places.owner, return_inverse=True)
    pair_row, owner = pairs // width, pairs % width
    slot = np.arange(len(pairs)) - np.searchsorted(pair_row, pair_row)
    members = np.full((rows, size_class(slot.max(initial=0) + 1, _FEWEST[0])), -1, np.int32)
    members[pair_row, slot] = owner
    body = np.flatnonzero(query.views[places.owner] == BODY)
    body = body[np.argsort(row[body], kind="stable")]
    row = row[body]
    event = np.arange(len(body)) - np.searchsorted(row, row)
    spans = np.full((rows, size_class(event.max(initial=0) + 1, _FEWEST[1])), -1, np.int32)
    starts = np.zeros_like(spans)
    spans[row, event], starts[row, event] = slot[of_pair[body]], places.start[body]
    return _Packed(members, spans, starts)


def size_class(needed: int | np.integer, fewest: int) -> int:
    """The lowest power of two that is at least `needed` and `fewest`."""
    return max(fewest, 1 << (int(needed) - 1).bit_length())


def _ranked(
    passages: np.ndarray,
    scores: jax.Array | np.ndarray,
    query: _Query,
    packed: _Packed,
    pid_of: PidOf | None,
) -> Scored:
    scores = np.asarray(scores)[: len(passages)]
    order = _order(scores, passages, pid_of)
    packed = _Packed(*(leaf[order] for leaf in packed))
    return Scored(passages[order].astype(np.int32), scores[order], query, packed)


def _order(scores: np.ndarray, passages: np.ndarray, pid_of: PidOf | None) -> np.ndarray:
    """int [n]: the places of ascending passages, best first."""
    order = np.argsort(-scores, kind="stable")
    if pid_of is None:
        return order
    group = ranking.groups(np.zeros(len(order), int), scores[order])
    return order[ranking.in_order(group, passages[order], pid_of)]


_WRITTEN = "retrieval.multiview.written"
__getattr__ = moved.names(__name__, written_spans=_WRITTEN, written_rows=_WRITTEN)
