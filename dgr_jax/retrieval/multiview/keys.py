"""Keys: the identifiers by which a student found its candidates, kept for distillation.

    block = keys(results, depth=200, limit=40, identifiers=..., length=...)   # candidates stage
    named = Keyed(...).of(query_rows, texts, passages, counts)                # teach stage

A rank list may hold passages that the student did not find, such as a positive that it missed.
Their keys are drawn as the targets of generation examples are: the title, pseudo-queries, and spans
of the text near the query.

Axis letters: L rank list, K identifiers of a passage, T tokens, U identifiers of a query, D depth.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dgr_jax.data import views as examples
from dgr_jax.data.rank_lists import ViewIdentifiers
from dgr_jax.data.views import ViewMixture, Views
from dgr_jax.decoding.passage_scoring import BODY, VIEWS, occurrences
from dgr_jax.decoding.suffix_array import SuffixArray
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.retrieval.multiview.index import Scored

Keys = dict[str, np.ndarray]


def keys(
    results: Sequence[Scored], *, depth: int, limit: int, identifiers: int, length: int
) -> Keys:
    """The best `limit` identifiers of each of the best `depth` passages of n queries.

    members: int16 [n, D, K], places among the identifiers of the query, best first, -1 for none.
    tokens int32 [n, U, T], views int8 [n, U] and counts int32 [n, U] describe these identifiers.
    U = identifiers, the most that a query can write; T = length.
    """
    kept: Keys = {
        "members": np.full((len(results), depth, limit), -1, np.int16),
        "tokens": np.zeros((len(results), identifiers, length), np.int32),
        "views": np.zeros((len(results), identifiers), np.int8),
        "counts": np.zeros((len(results), identifiers), np.int32),
    }
    for i, result in enumerate(results):
        members = result.packed.members[: min(depth, len(result.passages)), :limit]
        kept["members"][i, : len(members), : members.shape[1]] = members
        count = len(result.query.counts)
        tokens = result.query.tokens[:, :length]  # the search pads them further
        kept["tokens"][i, :count, : tokens.shape[1]] = tokens
        kept["views"][i, :count] = result.query.views
        kept["counts"][i, :count] = result.query.counts
    return kept


@dataclass(frozen=True, eq=False)
class Keyed:
    """Rank lists with the keys of their passages.

    query_keys: those of the queries, in their order. passages: int32 [n, D], the candidates.
    text, tables: where identifiers occur, see MultiviewIndex. views: the source of the keys of
    passages that the student did not find; `seed` decides which are drawn.
    """

    query_keys: Keys
    passages: np.ndarray
    text: SuffixArray | None
    tables: Mapping[str, IdentifierTable]
    views: Views
    seed: int = 0

    def of(
        self,
        query_rows: np.ndarray,
        texts: Sequence[str],
        passages: np.ndarray,
        counts: Counter,
    ) -> ViewIdentifiers:
        """The identifiers of the passages of n lists, int32 [n, L], -1 where a list is shorter.

        query_rows: int32 [n], places of their queries among the candidates. texts: the queries.
        counts: it is increased by the number of `passages`, of `passages_without_keys` (whose keys
        are drawn) and of `passages_without_identifier`.
        """
        lists, width = passages.shape
        limit, length = self.query_keys["members"].shape[2], self.query_keys["tokens"].shape[2]
        tokens = np.zeros((lists, width, limit, length), np.int32)
        views, occurring = np.zeros((2, lists, width, limit), np.int32)
        missing = []
        for i, row in enumerate(query_rows):
            place = {int(p): d for d, p in enumerate(self.passages[row]) if p >= 0}
            for j, passage in enumerate(passages[i].tolist()):
                if passage < 0:
                    continue
                if passage not in place:
                    missing.append((i, j))
                    continue
                members = self.query_keys["members"][row, place[passage]]
                members = members[members >= 0]
                tokens[i, j, : len(members)] = self.query_keys["tokens"][row, members]
                views[i, j, : len(members)] = self.query_keys["views"][row, members]
                occurring[i, j, : len(members)] = self.query_keys["counts"][row, members]
        self._draw(missing, texts, passages, (tokens, views, occurring))
        used = tokens.any((2, 3))
        counts["passages"] += int((passages >= 0).sum())
        counts["passages_without_keys"] += len(missing)
        counts["passages_without_identifier"] += int(((passages >= 0) & ~used).sum())
        return ViewIdentifiers(
            tokens, views, occurring, *self._occurrences(passages, tokens, views)
        )

    def _draw(self, missing, texts, passages, filled) -> None:
        """Draws keys for the passages at the `missing` places and writes them into `filled`, the
        arrays (tokens, views, counts)."""
        if not missing:
            return
        tokens, views, counts = filled
        limit, length = tokens.shape[2:]
        mixture = ViewMixture(titles=1, spans=max(1, limit // 2), pseudo_queries=limit // 4)
        pairs = [(texts[i], int(passages[i, j]), "") for i, j in missing]
        blocks = examples.blocks(pairs, mixture, self.views, seed=self.seed, counts=Counter())
        start = 0
        for block in blocks:
            targets = block.targets[:, :length]
            targets = np.pad(targets, ((0, 0), (0, length - targets.shape[1])))
            occurring = self._counts(targets, block.view)
            place = np.arange(len(block.pair)) - np.searchsorted(block.pair, block.pair)
            keep = place < limit
            at = np.array(missing[start : start + len(block.texts)])[block.pair[keep]]
            where = (*at.T, place[keep])
            tokens[where], views[where] = targets[keep], block.view[keep]
            counts[where] = occurring[keep]
            start += len(block.texts)

    def _counts(self, tokens: np.ndarray, views: np.ndarray) -> np.ndarray:
        """int32 [S]: how often each of the identifiers [S, T] occurs."""
        counts = np.zeros(len(tokens), np.int32)
        for view in np.unique(views):
            own = np.flatnonzero(views == view)
            if view == BODY:
                assert self.text is not None
                lo, hi = self.text.find(tokens[own], (tokens[own] > 0).sum(1))
                counts[own] = hi - lo
                continue
            table = self.tables[VIEWS[view]]
            rows = table.lookup(tokens[own])
            sizes = table.offsets[np.maximum(rows, 0) + 1] - table.offsets[np.maximum(rows, 0)]
            counts[own] = np.where(rows >= 0, sizes, 0)
        return counts

    def _occurrences(self, passages, tokens, views) -> tuple[np.ndarray, np.ndarray]:
        """The occurrences of body spans, int32 [n, L, 2 K] each: 1 + the k of the span, and where
        it begins. Where a passage has more than 2 K, the later ones of each span are left out."""
        lists, width, limit, _ = tokens.shape
        spans, starts = np.zeros((2, lists, width, 2 * limit), np.int32)
        for i, j in itertools.product(range(lists), range(width)):
            body = np.flatnonzero((views[i, j] == BODY) & tokens[i, j].any(1))
            if passages[i, j] < 0 or not len(body):
                continue
            owner, start = occurrences(self._text(passages[i, j]), tokens[i, j, body])
            repeat = np.arange(len(owner)) - np.searchsorted(owner, owner)
            order = np.argsort(repeat, kind="stable")[: 2 * limit]
            spans[i, j, : len(order)] = 1 + body[owner[order]]
            starts[i, j, : len(order)] = start[order]
        return spans, starts

    def _text(self, passage: int) -> np.ndarray:
        """Tokens of a passage."""
        assert self.text is not None
        starts, tokens = self.text.starts, self.text.tokens
        last = starts[passage + 1] if passage + 1 < len(starts) else len(tokens)
        return np.asarray(tokens[starts[passage] : last - 1])
