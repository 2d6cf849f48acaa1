"""Keys: the identifiers by which a student found its candidates, kept for distillation.

    block = keys(found, depth=200, limit=40, size=decoder.most_identifiers)   # candidates stage
    named = Keyed(...).of(query_rows, texts, passages)                        # teach stage

A rank list may hold passages that the student has not found, such as a positive that it missed.
They get keys as generation examples get targets: the title, pseudo-queries, and spans of the text
near the query.

Axis letters: L rank list, K identifiers a passage, T tokens, U identifiers a query, D depth.
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


def keys(found: Sequence[Scored], *, depth: int, limit: int, identifiers: int, length: int) -> Keys:
    """The best `limit` identifiers of each of the best `depth` passages of n queries.

    members int16 [n, D, K]: places among the identifiers of the query, best first, -1 for none;
    tokens int32 [n, U, T], views int8 [n, U], counts int32 [n, U] of these. U = identifiers, the
    most that a query can write; T = length.
    """
    made: Keys = {
        "members": np.full((len(found), depth, limit), -1, np.int16),
        "tokens": np.zeros((len(found), identifiers, length), np.int32),
        "views": np.zeros((len(found), identifiers), np.int8),
        "counts": np.zeros((len(found), identifiers), np.int32),
    }
    for i, one in enumerate(found):
        members = one.packed.members[: min(depth, len(one.passages)), :limit]
        made["members"][i, : len(members), : members.shape[1]] = members
        number = len(one.query.counts)
        tokens = one.query.tokens[:, :length]  # what follows is padding of the search
        made["tokens"][i, :number, : tokens.shape[1]] = tokens
        made["views"][i, :number] = one.query.views
        made["counts"][i, :number] = one.query.counts
    return made


@dataclass(frozen=True, eq=False)
class Keyed:
    """Rank lists with the keys of their passages.

    found: what `keys` made of the queries, in their order; passages int32 [n, D], the candidates.
    text, tables: where identifiers occur, see MultiviewIndex. views: what keys of passages that
    the student has not found are drawn from, by `seed`.
    """

    found: Keys
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
        """The identifiers of the passages int32 [n, L] (-1: free place) of n lists.

        query_rows int32 [n]: places of their queries among the candidates; texts: the queries.
        counts, added to: passages; passages_without_keys, drawn ones; passages_without_identifier.
        """
        number, width = passages.shape
        limit, length = self.found["members"].shape[2], self.found["tokens"].shape[2]
        tokens = np.zeros((number, width, limit, length), np.int32)
        views, occurring = np.zeros((2, number, width, limit), np.int32)
        missing = []
        for i, row in enumerate(query_rows):
            place = {int(p): d for d, p in enumerate(self.passages[row]) if p >= 0}
            for j, passage in enumerate(passages[i].tolist()):
                if passage < 0:
                    continue
                if passage not in place:
                    missing.append((i, j))
                    continue
                members = self.found["members"][row, place[passage]]
                members = members[members >= 0]
                tokens[i, j, : len(members)] = self.found["tokens"][row, members]
                views[i, j, : len(members)] = self.found["views"][row, members]
                occurring[i, j, : len(members)] = self.found["counts"][row, members]
        self._draw(missing, texts, passages, (tokens, views, occurring))
        used = tokens.any((2, 3))
        counts["passages"] += int((passages >= 0).sum())
        counts["passages_without_keys"] += len(missing)
        counts["passages_without_identifier"] += int(((passages >= 0) & ~used).sum())
        return ViewIdentifiers(
            tokens, views, occurring, *self._occurrences(passages, tokens, views)
        )

    def _draw(self, missing, texts, passages, filled) -> None:
        """Writes keys of the passages at `missing` places into (tokens, views, counts)."""
        if not missing:
            return
        tokens, views, counts = filled
        limit, length = tokens.shape[2:]
        mixture = ViewMixture(titles=1, spans=max(1, limit // 2), pseudo_queries=limit // 4)
        pairs = [(texts[i], int(passages[i, j]), "") for i, j in missing]
        made = examples.blocks(pairs, mixture, self.views, seed=self.seed, counts=Counter())
        start = 0
        for block in made:
            targets = block.targets[:, :length]
            targets = np.pad(targets, ((0, 0), (0, length - targets.shape[1])))
            found = self._counts(targets, block.view)
            place = np.arange(len(block.pair)) - np.searchsorted(block.pair, block.pair)
            keep = place < limit
            at = np.array(missing[start : start + len(block.texts)])[block.pair[keep]]
            where = (*at.T, place[keep])
            tokens[where], views[where] = targets[keep], block.view[keep]
            counts[where] = found[keep]
            start += len(block.texts)

    def _counts(self, tokens: np.ndarray, views: np.ndarray) -> np.ndarray:
        """int32 [S]: how often identifiers [S, T] occur."""
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
        """Occurrences of body spans, int32 [n, L, 2 K] each: 1 + the k of each, and its start.

        Of more than 2 K in a passage, the later ones of the same spans are left out.
        """
        number, width, limit, _ = tokens.shape
        spans, starts = np.zeros((2, number, width, 2 * limit), np.int32)
        for i, j in itertools.product(range(number), range(width)):
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
