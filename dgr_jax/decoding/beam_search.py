"""Beam search under a constraint, in one lax.while_loop with a decoder cache.

The search: at every step all legal continuations of the M live beams are considered. Those that
complete a sequence compete with the sequences completed before for M finished places; the best M
of the others are the live beams of the next step. With M at least the number of legal sequences
this is exhaustive. The loop ends when no live beam can reach the finished places.

Ties go to the beam that ranks higher, then to the smaller token; a sequence that was finished
earlier stays before an equal one.

Where a constraint knows that nothing is left to choose (a trie, whose live beams all stand on
tails) and a score_fn is given, the loop stops: the rest of all sequences is scored in one pass,
which reads the parameters once and reorders nothing. The outcome is the same.

A guide (see Guide) adds a bonus to what beams are chosen by, and never to a log-probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from dgr_jax import moved
from dgr_jax.decoding.constraint import Candidates, Constraint, State, filled
from dgr_jax.decoding.selection import top_k

StepFn = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
ScoreFn = Callable[[jax.Array, jax.Array, Any, jax.Array], jax.Array]

LOGITS_TOGETHER = 64  # rows [V] of logits, where sequences are scored ahead


class Guide(Protocol):
    """What is known of sequences before they are written; a pytree of arrays [B, ...].

    Beams are ranked by log-probability + bonus. The bonus is that of a prefix as it stands: it is
    asked for anew at every prefix, and never added up.
    """

    def bonus(self, state: State) -> jax.Array:
        """f32 [B, C], finite, of the prefixes and complete sequences in these states of the
        constraint, leaves [B, C, ...]; any number for dead states.

        A prefix has no smaller bonus than what continues it: beam search stops where, by this, no
        prefix can reach the sequences that it has.
        """


class Prefixes(NamedTuple):
    """The live beams after every step: all prefixes that were searched, each once.

    tokens int32 [B, T, M, T]: the t + 1 tokens of the prefixes of step t, then 0;
    log_probs f32 [B, T, M], descending; -inf where there were fewer: tokens 0, the dead state;
    state: leaves [B, T, M, ...].
    Sequences that end are in the BeamResult and not here, but for those of a constraint of fixed
    length: they are the prefixes of the last step.
    """

    tokens: jax.Array
    log_probs: jax.Array
    state: State


class BeamResult(NamedTuple):
    """Sequences of each query, best first.

    tokens int32 [B, M, T], 0 after the end; log_probs f32 [B, M], without length penalty;
    valid bool [B, M]: False where fewer sequences were found: tokens 0, log_prob -inf, row -1;
    rows int32 [B, M]: Constraint.rows; prefixes: only of beam_search(record=True).
    bonus f32 [B, M]: only with a guide: its bonus of each sequence, by which they are ordered too.
    """

    tokens: jax.Array
    log_probs: jax.Array
    valid: jax.Array
    rows: jax.Array
    prefixes: Prefixes | None = None
    bonus: jax.Array | None = None


class _Beams(NamedTuple):
    """scores f32 [B, M], what beams are ranked by, in descending order; log_probs f32 [B, M];
    tokens [B, M, T]; state; bonus f32 [B, M], None without a guide."""

    scores: jax.Array
    log_probs: jax.Array
    tokens: jax.Array
    state: State
    bonus: jax.Array | None


class _Loop(NamedTuple):
    position: jax.Array
    last: jax.Array
    live: _Beams
    finished: _Beams
    cache: Any
    prefixes: Prefixes | None
    decided: jax.Array  # nothing is left to choose


def beam_search(
    step_fn: StepFn,
    constraint: Constraint,
    cache: Any,
    *,
    batch_size: int,
    num_beams: int,
    max_length: int | None = None,
    start_id: int = 0,
    length_penalty: float = 0.0,
    record: bool = False,
    score_fn: ScoreFn | None = None,
    guide: Guide | None = None,
) -> BeamResult:
    """The most likely legal sequences of each query.

    step_fn: (tokens int32 [B, M], cache, position int32) -> (logits [B, M, V], cache); the tokens
      are those at `position`, start_id at position 0, where M is 1; logits of any float dtype.
    cache: pytree, leaves [B, M, ...]; only these are reordered. It must hold max_length steps.
    max_length: None: of the constraint. Sequences that have not ended by then are dropped.
    length_penalty: sequences are ordered by log_prob / length ** length_penalty, the length
      counting every token of the sequence.
    record: also returns the prefixes of every step.
    score_fn: (inputs int32 [B, M, W], targets int32 [B, M, W], cache, position int32) -> f32
      [B, M, W], the log-probabilities of the targets; the inputs are the tokens at `position` and
      after. None: every token takes a step.
    guide: its bonus is added to what prefixes and sequences are ordered by. Only what the
      constraint offers is ranked, and that may be the likeliest alone: give one that offers all,
      such as `guide.PlannedRows`, which is both.

    Raises ValueError for num_beams or max_length below 1.
    """
    length = constraint.max_length if max_length is None else max_length
    check_sizes("beam_search", num_beams=num_beams, max_length=length, batch_size=batch_size)
    asks = score_fn is not None and not record
    width = min(getattr(constraint, "completion_width", 0), length) if asks else 0
    search = _Search(
        step_fn, score_fn, constraint, guide, num_beams, length, length_penalty, width,
        together=constraint.fixed_length == length,
    )  # fmt: skip
    return search.run(_start(search, cache, batch_size, start_id, record))


@dataclasses.dataclass(frozen=True)
class _Search:
    """What stays the same while beams are searched.

    width: tokens that are scored at once where nothing is left to choose; below 2: none are.
    together: all sequences end in the last step.
    """

    step_fn: StepFn
    score_fn: ScoreFn | None
    constraint: Constraint
    guide: Guide | None
    num_beams: int
    length: int
    length_penalty: float
    width: int
    together: bool

    def run(self, loop: _Loop) -> BeamResult:
        loop = self.advance(loop, searched=1)  # nothing is written yet: every query has one beam
        unfinished = lambda loop: self.reaches(loop) & ~loop.decided
        loop = lax.while_loop(unfinished, self.advance, loop)
        finished = loop.live if self.together else loop.finished
        if self.width > 1:
            finished = lax.cond(
                self.reaches(loop) & loop.decided,
                lambda: _best_of(self.completed(loop), None if self.together else loop.finished),
                lambda: finished,
            )
        valid = finished.log_probs > -jnp.inf
        tokens = jnp.where(valid[..., None], finished.tokens, 0)
        rows = self.constraint.rows(finished.state)
        return BeamResult(tokens, finished.log_probs, valid, rows, loop.prefixes, finished.bonus)

    def bonus(self, state: State) -> jax.Array | None:
        return None if self.guide is None else self.guide.bonus(state)

    def score(self, log_probs: jax.Array, tokens: jax.Array, bonus: jax.Array | None) -> jax.Array:
        """What sequences of so many tokens are ordered by."""
        if self.length_penalty:
            log_probs = log_probs / tokens**self.length_penalty
        return log_probs if bonus is None else log_probs + bonus

    def reaches(self, loop: _Loop) -> jax.Array:
        """Whether a live beam may still reach the finished places."""
        ahead = self.length if self.length_penalty > 0 else loop.position + 1
        live = loop.live
        reachable = self.score(live.log_probs, jnp.float32(ahead), live.bonus).max(-1)
        return (loop.position < self.length) & (reachable > loop.finished.scores[:, -1]).any()

    def advance(self, loop: _Loop, searched: int | None = None) -> _Loop:
        """One step, of the first `searched` beams: the others are dead; None: of all."""
        last, cache, state, prior = jax.tree.map(
            lambda leaf: leaf[:, :searched],
            (loop.last, loop.cache, loop.live.state, loop.live.log_probs),
        )
        logits, cache = self.step_fn(last, cache, loop.position)
        offers = expanded(self.constraint, state, prior, logits, self.num_beams)
        bonus = self.bonus(offers.next_state)
        finished = loop.finished if self.together else _keep_finished(self, loop, offers, bonus)
        live, parent = _keep_live(loop, offers, bonus, also_complete=self.together)
        cache = jax.tree.map(lambda x: _select(x, parent), cache)
        last = lax.dynamic_index_in_dim(live.tokens, loop.position, axis=2, keepdims=False)
        prefixes = _noted(loop.prefixes, live, loop.position)
        decided = _decided(self.constraint, live.state, self.width)
        return _Loop(loop.position + 1, last, live, finished, cache, prefixes, decided)

    def completed(self, loop: _Loop) -> _Beams:
        """The live beams with the rest of their sequences, in the order in which they would end."""
        live, position, width = loop.live, loop.position, self.width
        constraint: Any = self.constraint
        rest = constraint.completions(live.state, width)
        inputs = jnp.concatenate([loop.last[..., None], rest.tokens[..., :-1]], -1)
        log_probs = live.log_probs
        if not self.constraint.renormalise:
            assert self.score_fn is not None
            gained = self.score_fn(inputs, rest.tokens, loop.cache, position).astype(jnp.float32)
            written = jnp.arange(width) < rest.lengths[..., None]
            log_probs += jnp.where(written, gained, 0.0).sum(-1)
        length, ends = live.tokens.shape[-1], position + rest.lengths
        log_probs = jnp.where((rest.lengths > 0) & (ends <= length), log_probs, -jnp.inf)
        place = jnp.broadcast_to(jnp.arange(length) - position, live.tokens.shape)
        added = jnp.take_along_axis(rest.tokens, jnp.clip(place, 0, width - 1), -1)
        tokens = jnp.where((place >= 0) & (place < rest.lengths[..., None]), added, live.tokens)
        state = jax.tree.map(lambda leaf: _alive(leaf, log_probs), rest.state)
        bonus = self.bonus(state)
        scores = self.score(log_probs, ends.astype(jnp.float32), bonus)
        beams = _Beams(scores, log_probs, tokens, state, bonus)
        if self.constraint.fixed_length is not None:  # they end together
            return beams
        order = jnp.argsort(rest.lengths, axis=-1, stable=True)
        return jax.tree.map(lambda leaf: _select(leaf, order), beams)


def score_by_token(
    logits_fn: Callable[[Any], jax.Array], inputs: Any, targets: jax.Array
) -> jax.Array:
    """Log-probabilities f32 [B, M, W] of targets int32 [B, M, W], for a ScoreFn.

    logits_fn: what is known of a token, leaves [B, M, ...] -> logits [B, M, V] of any float dtype.
    inputs: leaves [B, M, W, ...]. Logits of few sequences are made together (LOGITS_TOGETHER rows
      at most), so that the output matrix is read once; those of many one by one: they are large.
    """

    def scored(token):
        logits = logits_fn(token[0])
        chosen = jnp.take_along_axis(logits, token[1][..., None], -1)[..., 0]
        return chosen.astype(jnp.float32) - _log_normaliser(logits)

    first = lambda leaf: jnp.moveaxis(leaf, 2, 0)
    together = max(1, LOGITS_TOGETHER // (targets.shape[0] * targets.shape[1]))
    scores = lax.map(scored, jax.tree.map(first, (inputs, targets)), batch_size=together)
    return jnp.moveaxis(scores, 0, 2)


def _log_normaliser(logits):
    return jax.nn.logsumexp(logits.astype(jnp.float32), -1)


def check_sizes(function: str, **sizes: int) -> None:
    """Raises ValueError for a size below 1, of an argument of the function."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{function}.{name} must be at least 1; got {value}")


def _start(search, cache, batch, start_id, record):
    """Every query has one live beam, the first: the others would only repeat it."""
    beams, length = search.num_beams, search.length

    def first_only(leaf):
        dead = jnp.full((batch, beams - 1, *leaf.shape[1:]), -1, leaf.dtype)
        return jnp.concatenate([leaf[:, None], dead], 1)

    state = jax.tree.map(first_only, search.constraint.init(batch))
    none = jnp.full((batch, beams), -jnp.inf, jnp.float32)
    tokens = jnp.zeros((batch, beams, length), jnp.int32)
    log_probs = none.at[:, 0].set(0.0)
    dead = jax.tree.map(lambda leaf: jnp.full_like(leaf, -1), state)
    bonus = None if search.guide is None else jnp.zeros_like(none)
    nothing = Prefixes(tokens, none, dead)
    every_step = lambda leaf: jnp.repeat(leaf[:, None], length, 1)
    return _Loop(
        position=jnp.int32(0),
        last=jnp.full((batch, beams), start_id, jnp.int32),
        live=_Beams(log_probs, log_probs, tokens, state, bonus),
        finished=_Beams(none, none, tokens, dead, bonus),
        cache=cache,
        prefixes=jax.tree.map(every_step, nothing) if record else None,
        decided=jnp.bool_(False),
    )


def _decided(constraint, state, width):
    """Whether all live states have one continuation of at most `width` tokens, and some of more
    than half: to score `width` tokens costs more than the few steps that are left otherwise."""
    if width < 2:
        return jnp.bool_(False)
    lengths = constraint.completions(state, width).lengths
    return (lengths >= 0).all() & (2 * lengths.max() > width)


def _best_of(beams, before):
    """The best M of _Beams and of those `before`, which win ties; None: there are none."""
    size = beams.scores.shape[1]
    if before is not None:
        beams = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), before, beams)
    _, index = top_k(beams.scores, size)
    return jax.tree.map(lambda leaf: _select(leaf, index), beams)


def _noted(prefixes, live, position):
    """`prefixes` with the live beams of this step; None stays None."""
    if prefixes is None:
        return None
    tokens = jnp.where(live.log_probs[..., None] > -jnp.inf, live.tokens, 0)
    now = Prefixes(tokens, live.log_probs, live.state)
    put = lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, position, 1)
    return jax.tree.map(put, prefixes, now)


def expanded(
    constraint: Constraint, state: State, prior: jax.Array, logits: jax.Array, width: int
) -> Candidates:
    """Candidates of beams whose log-probability is `prior`; theirs is of the whole sequence."""
    if not constraint.renormalise:
        prior -= _log_normaliser(logits)
    return filled(constraint.expand(state, logits, prior, width=width), width)


def _keep_live(loop, offers, bonus, also_complete):
    """The best offers that are not complete, and the beams they come from, int32 [B, M]."""
    hidden = False if also_complete else offers.complete
    log_probs = jnp.where(hidden, -jnp.inf, offers.log_probs)
    if bonus is None:
        log_probs, index = top_k(log_probs, loop.last.shape[1])
        scores = log_probs
    else:
        scores, index = top_k(log_probs + bonus, loop.last.shape[1])
        log_probs, bonus = _select(log_probs, index), _select(bonus, index)
    parent = _select(offers.parent, index)
    tokens = _append(loop, parent, _select(offers.token_ids, index))
    state = jax.tree.map(lambda leaf: _alive(_select(leaf, index), log_probs), offers.next_state)
    return _Beams(scores, log_probs, tokens, state, bonus), parent


def _keep_finished(search, loop, offers, bonus):
    """The best of the sequences finished so far and the offers that are complete."""
    old, beams = loop.finished, loop.last.shape[1]
    ended = jnp.where(offers.complete, offers.log_probs, -jnp.inf)
    new = search.score(ended, (loop.position + 1).astype(jnp.float32), bonus)
    scores, index = top_k(jnp.concatenate([old.scores, new], 1), beams)
    stays = index < beams
    old_index, new_index = jnp.where(stays, index, 0), jnp.where(stays, 0, index - beams)

    def choose(old_leaf, new_leaf):
        shape = stays.shape + (1,) * (old_leaf.ndim - 2)
        return jnp.where(stays.reshape(shape), _select(old_leaf, old_index), new_leaf)

    parent = _select(offers.parent, new_index)
    added = _append(loop, parent, _select(offers.token_ids, new_index))
    state = jax.tree.map(
        lambda a, b: _alive(choose(a, _select(b, new_index)), scores), old.state, offers.next_state
    )
    log_probs = choose(old.log_probs, _select(ended, new_index))
    if bonus is not None:
        bonus = choose(old.bonus, _select(bonus, new_index))
    return _Beams(scores, log_probs, choose(old.tokens, added), state, bonus)


def _append(loop, parent, token_ids):
    """Token rows [B, M, T] of the parents, with token_ids [B, M] at the position."""
    tokens = _select(loop.live.tokens, parent)
    here = jnp.arange(tokens.shape[-1]) == loop.position
    return jnp.where(here, token_ids[..., None], tokens)


def _select(leaf, index):
    """leaf [B, K, ...], index [B, M] -> [B, M, ...]."""
    index = index.reshape(index.shape + (1,) * (leaf.ndim - 2))
    return jnp.take_along_axis(leaf, index, axis=1, mode="clip")


def _alive(leaf, log_probs):
    """-1, the dead state, where the log-probability is -inf."""
    shape = log_probs.shape + (1,) * (leaf.ndim - 2)
    return jnp.where((log_probs > -jnp.inf).reshape(shape), leaf, -1)


__getattr__ = moved.names(__name__, sample="decoding.sampling")
