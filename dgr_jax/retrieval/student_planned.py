"""A student that plans by itself and goes on to write, in one program for a batch of queries.

Axis letters: B queries, Q query length, n planned passages, T identifier length, P passages, U
identifiers, M members of a passage, R passages of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dgr_jax import partitioning
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding.beam_search import score_by_token
from dgr_jax.decoding.guide import PlannedRows
from dgr_jax.models import query_tables
from dgr_jax.models.t5 import Reading, T5Config
from dgr_jax.retrieval.generative import Decoder
from dgr_jax.retrieval.planned import PlannedSystem, StudentWithPlan, _Scored, with_identifiers
from dgr_jax.retrieval.search_programs import applied, written_of
from dgr_jax.retrieval.simultaneous import PlannedPassages
from dgr_jax.retrieval.student_plans import Learned, OnePass, StudentPlan
from dgr_jax.retrieval.system import Opening, System

_TOGETHER = 1 << 25  # places of the tables of a batch that are summed up at once: 128 MB


class PlanIndex(NamedTuple):
    """What a student needs of a corpus to plan. Its passages are in the order of their pids, which
    decides between equals, in blocks; the last one is filled up.

    members: int [blocks, R, M]; passages, rows: passage index and row of `identifiers`, int32
    [blocks, R], rows -1 where there is no identifier; allowed: bool [blocks, R]; identifiers: int32
    [U, T]; weight: of the log-probability, f32 [], which each search gives.
    """

    members: Any
    passages: Any
    rows: Any
    allowed: Any
    identifiers: Any
    weight: Any


@functools.lru_cache(maxsize=8)
def scores_fn(
    config: T5Config,
    plan: StudentPlan,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules = partitioning.RULES,
) -> Callable[[Any, PlanIndex, jax.Array], jax.Array]:
    """The compiled scores of all passages: (params, index, queries int32 [B, Q]) -> f32 [B, blocks
    * R], in the order of the index."""

    def score(params: Any, index: PlanIndex, tokens: jax.Array) -> jax.Array:
        apply = applied(config, params)
        encoded = apply(tokens, method="encode")
        table, _ = plan.table(apply, config, encoded, tokens, index.identifiers.shape[1])
        scores = lax.map(functools.partial(query_tables.sums, table), index.members)
        return jnp.moveaxis(scores, 0, 1).reshape(len(tokens), -1)

    on_shards = partitioning.on_batch_shards(score, mesh, whole=2, rules=rules)
    return jax.jit(on_shards, out_shardings=partitioning.replicated(mesh))


@functools.lru_cache(maxsize=8)
def planned_fn(
    config: T5Config,
    plan: StudentPlan,
    fixed: bool,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules = partitioning.RULES,
) -> Callable[[Any, PlanIndex, jax.Array], tuple[jax.Array, ...]]:
    """The compiled search: (params, index, queries int32 [B, Q]) -> planned passages int32 [B, n],
    -1: none, and their plan scores f32 [B, n]; and, unless the plan decides alone, log p(identifier
    | query) f32 [B, n], -inf where no beam wrote it.

    A query is encoded once, and read once: what is written goes on from what the plan has read.
    fixed: whether all identifiers have T tokens.
    """
    count = plan.planned
    assert count is not None  # of_corpus

    def search(params: Any, index: PlanIndex, tokens: jax.Array) -> tuple[jax.Array, ...]:
        apply = applied(config, params)
        encoded = apply(tokens, method="encode")
        length = index.identifiers.shape[1]
        table, reading = plan.table(apply, config, encoded, tokens, length)
        scores, passages, rows = best_passages(table, index, count)
        if plan.ranked_by == "plan":
            return passages, scores
        order = jnp.argsort(rows, axis=1, stable=True)
        scores, passages, rows = (
            jnp.take_along_axis(part, order, 1) for part in (scores, passages, rows)
        )
        there = rows[..., None] >= 0
        identifiers = jnp.where(there, index.identifiers[jnp.maximum(rows, 0)], 0)
        if plan.ranked_by == "identifiers":
            log_probs = _scored(apply, encoded, tokens, identifiers, reading)
        else:
            bonus = jnp.where(rows >= 0, scores / index.weight, -jnp.inf)
            guide = PlannedRows.of(identifiers, bonus, fixed=fixed)
            result = written_of(
                *(apply, encoded, tokens, guide, plan.num_beams, length),
                reading=reading,
                guide=guide,
            )
            log_probs = guide.log_probs(result)
        return passages, scores, log_probs

    on_shards = partitioning.on_batch_shards(search, mesh, whole=2, rules=rules)
    return jax.jit(on_shards, out_shardings=partitioning.replicated(mesh))


def best_passages(table: jax.Array, index: PlanIndex, count: int) -> tuple[jax.Array, ...]:
    """Scores f32, passages and rows int32 [B, n] of the best, block after block."""
    batch = len(table)

    def advance(best: tuple[jax.Array, ...], block: tuple[jax.Array, ...]) -> tuple[Any, None]:
        members, passages, rows, allowed = block
        scores = jnp.where(allowed, query_tables.sums(table, members), -jnp.inf)
        new = (scores, *(jnp.broadcast_to(part, scores.shape) for part in (passages, rows)))
        joined = [jnp.concatenate(pair, 1) for pair in zip(best, new, strict=True)]
        scores, place = lax.top_k(joined[0], count)
        return (scores, *(jnp.take_along_axis(part, place, 1) for part in joined[1:])), None

    nothing = jnp.full((batch, count), -1, jnp.int32)
    start = (jnp.full((batch, count), -jnp.inf, jnp.float32), nothing, nothing)
    (scores, passages, rows), _ = lax.scan(advance, start, tuple(index[:4]))
    there = scores > -jnp.inf
    return scores, jnp.where(there, passages, -1), jnp.where(there, rows, -1)


def _scored(
    apply: Any,
    encoded: jax.Array,
    tokens: jax.Array,
    identifiers: jax.Array,
    reading: Reading | None,
) -> jax.Array:
    """log p(identifier | query) f32 [B, n] of identifiers int32 [B, n, T], -inf of blank ones."""
    inputs = jnp.pad(identifiers[..., :-1], ((0, 0), (0, 0), (1, 0)))
    x = apply(encoded, tokens, inputs, method="decode", reading=reading)
    log_probs = score_by_token(functools.partial(apply, method="logits"), x, identifiers)
    total = jnp.where(identifiers > 0, log_probs, 0.0).sum(-1)
    return jnp.where(identifiers[..., 0] > 0, total, -jnp.inf)


@dataclass
class StudentPlanner:
    """A Planner whose plan the student makes. index: on the devices of the decoder."""

    decoder: Decoder
    plan: StudentPlan
    vocabulary: Vocabulary
    pids: Sequence[str]
    index: PlanIndex

    @classmethod
    def of(cls, decoder: Decoder, plan: StudentPlan, opening: Opening) -> StudentPlanner:
        """The plan of a corpus that the student was trained on."""
        table, length = decoder.table, decoder.index.layout.max_length
        identifiers = np.zeros((len(table), length), np.int32)
        identifiers[:, : table.tokens.shape[1]] = table.tokens
        rows, pids = table.rows_of_passages(), opening.store.pids
        of_passages = np.where(rows[:, None] >= 0, identifiers[np.maximum(rows, 0)], 0)
        members = plan.members(of_passages, decoder.config, opening)
        order = np.array(sorted(range(len(pids)), key=pids.__getitem__), np.int32)
        size = partitioning.shared_rows(decoder.search.batch_size, decoder.mesh)
        of_shard = size // partitioning.batch_shards(decoder.mesh)
        block = max(1, min(len(pids), _TOGETHER // (of_shard * members.shape[1])))
        put = functools.partial(_blocks, block=block)
        allowed = np.ones(len(pids), bool) if decoder.allowed is None else decoder.allowed[order]
        index = PlanIndex(
            members=put(members[order]),
            passages=put(order),
            rows=put(rows[order]),
            allowed=put(allowed),
            identifiers=identifiers,
            weight=np.float32(1),
        )
        index = partitioning.place(index, partitioning.replicated(decoder.mesh))
        vocabulary = Vocabulary.load(opening.prepared)
        return cls(decoder, plan, vocabulary, pids, index)

    @property
    def nbytes(self) -> int:
        """See Planner."""
        return sum(leaf.nbytes for leaf in self.index)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """See Planner."""
        decoder, count = self.decoder, len(self.pids)
        search = scores_fn(decoder.config, self.plan, decoder.mesh, decoder.rules)
        tokens = self.vocabulary.encode_inputs(texts, decoder.query_length)
        size = partitioning.shared_rows(decoder.search.batch_size, decoder.mesh)
        scores = np.zeros((len(texts), count), np.float32)
        order = np.asarray(self.index.passages).reshape(-1)[:count]
        for start in range(0, len(texts), size):
            batch = tokens[start : start + size]
            placed = partitioning.place_padded(batch, (size, tokens.shape[1]), decoder.mesh)
            of_batch = np.asarray(search(decoder.params, self.index, placed))[: len(batch), :count]
            scores[start : start + size, order] = of_batch
        return scores

    def best(
        self, texts: Sequence[str], count: int, allowed: np.ndarray | None = None
    ) -> PlannedPassages:
        """See Planner."""
        scores = self.scores(texts)
        if allowed is not None:
            scores = np.where(allowed, scores, -np.inf)
        rank = np.empty(len(self.pids), np.int32)
        rank[np.asarray(self.index.passages).reshape(-1)[: len(rank)]] = np.arange(len(rank))
        passages = np.stack([np.lexsort((rank, -row))[:count] for row in scores]).astype(np.int32)
        best = np.take_along_axis(scores, passages, 1)
        return PlannedPassages(np.where(best > -np.inf, passages, -1), best)

    def restricted(self, allowed: np.ndarray) -> StudentPlanner:
        """The same plan, of passages that are allowed, bool [P], alone."""
        order, shape = np.asarray(self.index.passages), self.index.allowed.shape
        real = np.arange(order.size).reshape(shape) < len(self.pids)
        mask = partitioning.place(real & allowed[order], partitioning.replicated(self.decoder.mesh))
        return replace(self, index=self.index._replace(allowed=mask))


def _blocks(array: np.ndarray, block: int) -> np.ndarray:
    """[P, ...] -> [blocks, R, ...]; the last one is filled up with zeros."""
    missing = -len(array) % block
    filled = np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
    return filled.reshape(-1, block, *array.shape[1:])


@dataclass
class StudentPlannedDecoder(StudentWithPlan[np.ndarray]):
    """A student that plans by itself: queries are tokens, as for a student alone."""

    plan: StudentPlan
    planner: StudentPlanner

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = self.student.index.layout.ends == "fixed"
        # The weight is an argument, and what trains the plan is of no concern.
        student, plan = self.student, replace(self.plan.once_trained(), weight=1.0)
        self._search = planned_fn(student.config, plan, fixed, student.mesh, student.rules)

    def restrict(self, passage_mask: np.ndarray) -> StudentPlannedDecoder:
        """See Decoder.restrict."""
        student = self.student.restrict(passage_mask)
        assert student.allowed is not None
        return replace(self, student=student, planner=self.planner.restricted(student.allowed))

    def encode(self, vocabulary: Vocabulary, texts: Sequence[str]) -> np.ndarray:
        """See System."""
        return self.student.encode(vocabulary, texts)

    def _lengths(self, queries: np.ndarray) -> np.ndarray:
        return self.student._lengths(queries)

    def _start(self, queries: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> _Scored:
        tokens = partitioning.place_padded(queries[places], shape, self.mesh)
        index = self.planner.index._replace(weight=np.float32(self._weight))
        passages, scores, *log_probs = self._search(self.student.params, index, tokens)
        return _Scored(passages, scores, log_probs[0] if log_probs else None, None)


@dataclass(frozen=True)
class PlannedByStudent(PlannedSystem, plans=StudentPlan):
    """The distilled student with a plan of its own."""

    plan: StudentPlan

    def open(self, opening: Opening) -> System:
        """See SystemSettings."""
        student = with_identifiers(opening.system("distill"), "Planned")
        plan = self.plan.of_corpus(student.table.num_passages)
        planner = StudentPlanner.of(student, plan, opening)
        return StudentPlannedDecoder.of(student, plan, planner)


@dataclass(frozen=True)
class PlannedByLearned(PlannedByStudent, plans=Learned):
    """The distilled student with the plan Learned."""

    plan: Learned


@dataclass(frozen=True)
class PlannedByOnePass(PlannedByStudent, plans=OnePass):
    """The distilled student with the plan OnePass."""

    plan: OnePass
