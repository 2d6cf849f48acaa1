"""What a beam search has looked at, level by level, and where it lost a passage.

The search is done again on the host, in the plain words of NumPy, with the same student, index,
beams and bonus: slower, but every prefix that it weighs can be seen.

Axis letters: U identifiers, T identifier length, M beams, Q query length, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora.store import PassageStore
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.models.t5 import T5Config, Transformer

SHOWN = 24  # dropped prefixes of a level that are told, the best ones


@dataclass(frozen=True)
class Writes:
    """What a student may write for one query.

    query int32 [Q]; rows int32 [U, T], sorted, 0 after the end; bonus f32 [U], what a plan adds to
    the choice of each; None: nothing. fixed: whether all rows have T tokens. renormalise: whether
    log-probabilities are over the tokens that may be written.
    row_of: passage -> its row; -1: it has none. missing: of such a passage, why.
    """

    config: T5Config
    params: Any
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules
    query: np.ndarray
    rows: np.ndarray
    bonus: np.ndarray | None
    num_beams: int
    fixed: bool
    renormalise: bool
    row_of: Callable[[int], int]
    missing: Callable[[int], str]


@dataclass(frozen=True)
class Prefix:
    """Tokens that were weighed. parent: the place, among the live prefixes of the level before, of
    the one that it continues; score: log-probability + bonus, by which prefixes are ranked;
    identifiers: how many begin so; complete: whether it is an identifier itself."""

    tokens: tuple[int, ...]
    parent: int
    log_prob: float
    bonus: float
    score: float
    identifiers: int
    complete: bool


@dataclass(frozen=True)
class Level:
    """One step. live: the prefixes that were kept, best first; dropped: the best SHOWN of the
    `count` others."""

    live: tuple[Prefix, ...]
    dropped: tuple[Prefix, ...]
    count: int


@dataclass(frozen=True)
class Followed:
    """The way of one identifier through the search.

    path: its prefixes, each as it would have been weighed. fell_at: the level, from 1, at which it
    was dropped; None: never. by: what its score lacked there of the last one that was kept.
    """

    path: tuple[Prefix, ...]
    fell_at: int | None
    by: float | None


@functools.lru_cache(maxsize=8)
def next_fn(config: T5Config, mesh: jax.sharding.Mesh, rules: partitioning.Rules) -> Any:
    """The compiled log-probabilities of the next token: (params, query int32 [1, Q], prefixes int32
    [1, M, T], their length int32 []) -> f32 [M, V]."""
    model = Transformer(config)

    def log_probs(params: Any, query: jax.Array, prefixes: jax.Array, length: jax.Array) -> Any:
        apply: Any = functools.partial(model.apply, {"params": params})
        encoded = apply(query, method="encode")
        inputs = jnp.pad(prefixes[..., :-1], ((0, 0), (0, 0), (1, 0)))
        x = apply(encoded, query, inputs, method="decode")
        here = jax.lax.dynamic_index_in_dim(x, length, axis=2, keepdims=False)
        logits = apply(here, method="logits").astype(jnp.float32)
        return jax.nn.log_softmax(logits)[0]

    return jax.jit(log_probs, out_shardings=partitioning.replicated(mesh))


@dataclass(frozen=True)
class _Offers:
    """Continuations of live prefixes, [C] each: the rows `low` up to `high` begin with them."""

    parent: np.ndarray
    low: np.ndarray
    high: np.ndarray
    log_probs: np.ndarray
    bonus: np.ndarray
    complete: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        return self.log_probs + self.bonus

    def take(self, places: np.ndarray) -> _Offers:
        return _Offers(*(part[places] for part in vars(self).values()))

    def told(self, rows: np.ndarray, depth: int) -> tuple[Prefix, ...]:
        """As prefixes of so many tokens."""
        parts = zip(*(part.tolist() for part in vars(self).values()), strict=True)
        return tuple(
            Prefix(
                tuple(rows[low, :depth].tolist()),
                *(parent, log_prob, bonus, log_prob + bonus, high - low, complete),
            )
            for parent, low, high, log_prob, bonus, complete in parts
        )


def searched(writes: Writes, passage: int | None = None) -> tuple[list[Level], Followed | None]:
    """The levels of the search, and the way of a passage's identifier through it; None where no
    passage is given, or it has no identifier that may be written."""
    rows, beams = writes.rows, writes.num_beams
    row = -1 if passage is None else writes.row_of(passage)
    way = _Way(writes, row) if row >= 0 else None
    live, finished, ends = _start(len(rows)), np.zeros(0, np.float32), False
    levels: list[Level] = []
    for depth in range(rows.shape[1]):
        own = rows[[row], :depth] if way else rows[:0, :depth]
        log_probs = _next(writes, np.concatenate([rows[live.low, :depth], own]), depth)
        if ends:  # only the way goes on
            if way:
                way.step(log_probs[-1:], depth)
            continue
        offers = _expanded(writes, live, log_probs, depth)
        complete = offers.complete & (not writes.fixed)
        kept = _best(offers, np.flatnonzero(~complete), beams)
        ended = _best(offers, np.flatnonzero(complete), beams)
        finished = np.sort(np.append(finished, offers.scores[ended]))[::-1][:beams]
        ended = ended[offers.scores[ended] >= _least(finished, beams)]
        shown = np.concatenate([kept, ended])
        others = np.setdiff1d(np.arange(len(offers.low)), shown)
        dropped = offers.take(_best(offers, others, SHOWN)).told(rows, depth + 1)
        levels.append(Level(offers.take(shown).told(rows, depth + 1), dropped, len(others)))
        live = offers.take(kept)
        ends = not len(live.low) or live.scores[0] <= _least(finished, beams)
        if way and way.step(log_probs[-1:], depth):
            least = _least(live.scores, beams), _least(finished, beams)
            way.judge(offers.low[shown], *least, ends)
    return levels, way.followed() if way else None


def _least(scores: np.ndarray, count: int) -> float:
    """The last of so many scores, in descending order; -inf where there are fewer."""
    return float(scores[count - 1]) if len(scores) >= count else -np.inf


class _Way:
    """The way of the identifier in a row."""

    def __init__(self, writes: Writes, row: int) -> None:
        self._writes, self._row = writes, row
        self._own = _start(len(writes.rows))
        self._path: list[Prefix] = []
        self._fell_at: int | None = None
        self._by: float | None = None

    def step(self, log_probs: np.ndarray, depth: int) -> bool:
        """One more token of the identifier, from log_probs f32 [1, V]; whether it has one."""
        rows, row = self._writes.rows, self._row
        if depth >= np.count_nonzero(rows[row]):
            return False
        own = _expanded(self._writes, self._own, log_probs, depth)
        self._own = own.take(np.flatnonzero((own.low <= row) & (row < own.high)))
        self._path += self._own.told(rows, depth + 1)
        return True

    def judge(self, there: np.ndarray, of_live: float, of_finished: float, ends: bool) -> None:
        """Notes whether the prefix was dropped: it is not `there` or, though it is, the search ends
        before it is complete; and by how much. of_live, of_finished: the least scores kept."""
        if self._fell_at is not None:
            return
        complete = bool(self._own.complete[0]) and not self._writes.fixed
        if self._own.low[0] not in there:
            least = of_finished if complete else of_live
        elif ends and not complete:
            least = of_finished
        else:
            return
        self._fell_at, self._by = len(self._path), float(least - self._own.scores[0])

    def followed(self) -> Followed:
        return Followed(tuple(self._path), self._fell_at, self._by)


def _start(rows: int) -> _Offers:
    """The prefix without a token."""
    zero, none = np.zeros(1, np.int64), np.zeros(1, np.float32)
    return _Offers(zero, zero, zero + rows, none, none, np.zeros(1, bool))


def _best(offers: _Offers, places: np.ndarray, count: int) -> np.ndarray:
    """The places of the best `count` offers among `places`, best first; ties as in beam search: in
    the order of their parents, then of their tokens."""
    return places[np.argsort(-offers.scores[places], kind="stable")[:count]]


def _next(writes: Writes, prefixes: np.ndarray, depth: int) -> np.ndarray:
    """f32 [n, V]: log-probabilities of the next token after prefixes int32 [n, depth]."""
    padded = np.zeros((1, writes.num_beams + 1, writes.rows.shape[1]), np.int32)
    padded[0, : len(prefixes), :depth] = prefixes
    score = next_fn(writes.config, writes.mesh, writes.rules)
    query, places = partitioning.place(
        (writes.query[None], padded), partitioning.replicated(writes.mesh)
    )
    return np.asarray(score(writes.params, query, places, np.int32(depth)))[: len(prefixes)]


def _expanded(writes: Writes, live: _Offers, log_probs: np.ndarray, depth: int) -> _Offers:
    """All continuations of the live prefixes of `depth` tokens. log_probs f32 [n, V], as many rows
    as there are live ones, or more."""
    parts = []
    for place, (low, high, before) in enumerate(
        zip(live.low, live.high, live.log_probs, strict=True)
    ):
        column = writes.rows[low:high, depth]
        starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
        tokens = column[starts]
        gained = log_probs[place, tokens]
        if writes.renormalise:
            gained = gained - np.logaddexp.reduce(gained)
        bonus = np.zeros(len(starts), np.float32)
        if writes.bonus is not None:
            bonus = np.maximum.reduceat(writes.bonus[low:high], starts)
        ends = np.append(starts[1:], high - low)
        full = writes.rows.shape[1] == depth + 1
        complete = full | (writes.rows[low + starts, min(depth + 1, writes.rows.shape[1] - 1)] == 0)
        parents = np.full(len(starts), place)
        parts.append((parents, low + starts, low + ends, before + gained, bonus, complete))
    return _Offers(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Explanation:
    """What the search for one query has looked at. said: of the passage `pid`, where one was asked
    for, what became of it; rank: its place among the passages that were found; None: it was not.

    levels, followed: see `searched`; empty and None of a system that writes no identifiers.
    """

    query: str
    levels: tuple[Level, ...]
    pid: str | None
    rank: int | None
    followed: Followed | None
    said: str
    vocabulary: Vocabulary

    def as_json(self) -> dict[str, Any]:
        """As JSON, prefixes by the names of their tokens; numbers that are not finite as None."""
        followed = self.followed
        return {
            "levels": [
                {
                    "live": list(map(self._told, level.live)),
                    "dropped": list(map(self._told, level.dropped)),
                    "dropped_in_all": level.count,
                }
                for level in self.levels
            ],
            "pid": self.pid,
            "rank": self.rank,
            "said": self.said,
            "path": [self._told(prefix) for prefix in followed.path] if followed else [],
            "fell_at": followed.fell_at if followed else None,
            "by": _finite(followed.by) if followed else None,
        }

    def _told(self, prefix: Prefix) -> dict[str, Any]:
        return {
            "prefix": self.vocabulary.decode(list(prefix.tokens)),
            "parent": prefix.parent,
            "log_prob": _finite(prefix.log_prob),
            "bonus": _finite(prefix.bonus),
            "score": _finite(prefix.score),
            "identifiers": prefix.identifiers,
            "complete": prefix.complete,
        }


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)


def explain(
    system: Any, vocabulary: Vocabulary, store: PassageStore, query: str, pid: str | None = None
) -> Explanation:
    """How a System has searched for a query, and where it lost a passage.

    Raises ValueError for a pid that is not in the corpus.
    """
    if pid is not None and pid not in store:
        raise ValueError(f"pid: got {pid!r:.80}, expected one of the {len(store):,} passages")
    passage = None if pid is None else store.index_of(pid)
    encoded = system.encode(vocabulary, [query])
    writes = system.may_write(encoded)
    levels, followed = searched(writes, passage) if writes else ([], None)
    rank, said = None, ""
    if passage is not None:
        (found,), _ = system.passages(encoded)
        places = np.flatnonzero(found == passage)
        rank = int(places[0]) + 1 if len(places) else None
        said = _said(writes, followed, passage, rank, int((found >= 0).sum()))
    return Explanation(query, tuple(levels), pid, rank, followed, said, vocabulary)


def _said(
    writes: Writes | None, followed: Followed | None, passage: int, rank: int | None, count: int
) -> str:
    """What became of a passage, in a line."""
    found = f"found at rank {rank}" if rank else f"not among the {count} passages that were found"
    if writes is None:
        return found
    if followed is None:
        return f"{found}: {writes.missing(passage)}"
    if followed.fell_at is None:
        return found if rank else f"{found}, although its identifier was written"
    prefix = followed.path[followed.fell_at - 1]
    return (
        f"{found}: at step {followed.fell_at} its prefix has the score {prefix.score:.2f}, "
        f"{followed.by:.2f} below the last that was kept"
    )
