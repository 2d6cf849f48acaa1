"""A plan and a student together: plan score + weight * log p(identifier) of the planned passages.

Axis letters: B queries, Q query length, n planned passages, T identifier length, P passages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax import partitioning, traced
from dgr_jax.corpora import words
from dgr_jax.corpora.ranking import PidOf
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding.beam_search import BeamResult, score_by_token
from dgr_jax.decoding.guide import PlannedRows
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.batched import BatchedSystem, Queries
from dgr_jax.retrieval.batching import Found, _nothing
from dgr_jax.retrieval.explanation import Writes
from dgr_jax.retrieval.generative import Decoder, Search, rank_passages
from dgr_jax.retrieval.kept_postings import PLANS
from dgr_jax.retrieval.plan_scores import joined, ranked, summed
from dgr_jax.retrieval.search_programs import written
from dgr_jax.retrieval.simultaneous import Lexical, Plan, PlannedPassages, Planner
from dgr_jax.retrieval.system import Opening, System, SystemHit, SystemSettings


@dataclass(frozen=True)
class PlannedQueries:
    """tokens int32 [B, Q], and the planned passages of each query."""

    tokens: np.ndarray
    planned: PlannedPassages

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, some: slice) -> PlannedQueries:
        planned = (part[some] for part in self.planned)
        return PlannedQueries(self.tokens[some], PlannedPassages(*planned))


class _Scored(NamedTuple):
    """passages int32 and plan scores f32 [B, n] of a batch; log_probs f32 [B, n] on their way from
    the device, -inf where an identifier was not written; None: the plan decides alone. beside: what
    a search of all passages finds for the queries that have too few planned ones; None: all have
    enough."""

    passages: np.ndarray | jax.Array
    scores: np.ndarray | jax.Array
    log_probs: jax.Array | None
    beside: BeamResult | None


@functools.lru_cache(maxsize=8)
def score_fn(
    config: T5Config, mesh: jax.sharding.Mesh, rules: partitioning.Rules = partitioning.RULES
) -> Callable[[Any, tuple[jax.Array, jax.Array, jax.Array]], jax.Array]:
    """The compiled scores of all planned identifiers, from one pass of the decoder: (params,
    (queries int32 [B, Q], identifiers int32 [B, n, T], f32 [B, n])) -> log p(identifier | query)
    f32 [B, n], -inf for blank rows. The last argument is that of `guided_fn`, and not used."""

    def score(params: Any, batch: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tokens, rows, _ = batch
        apply: Any = functools.partial(Transformer(config).apply, {"params": params})
        encoded = apply(tokens, method="encode")
        inputs = jnp.pad(rows[..., :-1], ((0, 0), (0, 0), (1, 0)))
        x = apply(encoded, tokens, inputs, method="decode")
        log_probs = score_by_token(functools.partial(apply, method="logits"), x, rows)
        total = jnp.where(rows > 0, log_probs, 0.0).sum(-1)
        return jnp.where(rows[..., 0] > 0, total, -jnp.inf)

    return _compiled(score, mesh, rules)


@functools.lru_cache(maxsize=8)
def guided_fn(
    config: T5Config,
    num_beams: int,
    fixed: bool,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules = partitioning.RULES,
) -> Callable[[Any, tuple[jax.Array, jax.Array, jax.Array]], jax.Array]:
    """The compiled search: (params, (queries int32 [B, Q], identifiers int32 [B, n, T], sorted,
    their bonus f32 [B, n])) -> log p(identifier | query) f32 [B, n], -inf where no beam wrote it.

    fixed: whether all identifiers have T tokens.
    """

    def decode(params: Any, batch: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tokens, rows, bonus = batch
        guide = PlannedRows.of(rows, bonus, fixed=fixed)
        result = written(config, params, guide, tokens, num_beams, rows.shape[-1], guide=guide)
        return guide.log_probs(result)

    settings = config, num_beams, fixed, mesh.shape, rules
    return traced.kept("guided", settings, _compiled(decode, mesh, rules))


def _compiled(function: Any, mesh: jax.sharding.Mesh, rules: partitioning.Rules) -> Any:
    on_shards = partitioning.on_batch_shards(function, mesh, whole=1, rules=rules)
    return jax.jit(on_shards, out_shardings=partitioning.replicated(mesh))


@dataclass
class StudentWithPlan(BatchedSystem[Queries, _Scored], Generic[Queries]):
    """A student that answers for the passages that a plan names.

    student: its parameters and identifiers. Its trie is used only where a query has fewer planned
      passages than asked for: there the student searches all passages too, and what it finds
      beside has the plan score 0.
    planner: None where queries are planned already.
    beside: whether the student searches all passages too where few are planned.
    """

    student: Decoder
    plan: Plan
    planner: Planner | None
    beside: bool = True
    pid_of: PidOf | None = None
    sizes: tuple[int, ...] = ()

    writes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_search(self.plan, self.student.search)
        check_corpus(self.plan, self.student.table.num_passages)
        self._weight = weight_of(self.plan)

    @classmethod
    def of(
        cls, student: Decoder, plan: Plan, planner: Planner | None, *, beside: bool = True
    ) -> Self:
        """A student with a plan."""
        plan = plan.of_corpus(student.table.num_passages)
        search = replace(student.search, num_beams=plan.num_beams)
        return cls(replace(student, search=search), plan, planner, beside)

    @property
    def search(self) -> Search:
        """The settings of the student's search."""
        return self.student.search

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices that it runs on."""
        return self.student.mesh

    def describe(self) -> dict[str, Any]:
        """See System: what the student says of itself."""
        return self.student.describe()

    @property
    def index_bytes(self) -> int:
        """Bytes that a search reads beside the parameters: the plan, and the identifiers."""
        table, plan = self.student.table, self.planner.nbytes if self.planner else 0
        return plan + table.tokens.nbytes + table.passages.nbytes

    @property
    def limits(self) -> dict[str, int]:
        """See System."""
        return {"planned": self.plan.most, "depth": self.search.depth}

    def hits(self, queries: Queries) -> Iterator[list[SystemHit]]:
        """See System. The parts are 'plan', the plan score, and 'log_prob', the log-probability of
        the identifier, -inf where it was not written."""
        for passages, *parts in zip(*self._answers(queries), strict=True):
            columns = (part[passages >= 0].tolist() for part in (passages, *parts))
            rows = zip(*columns, self.student.tokens_of(passages), strict=True)
            yield [
                SystemHit(i, score, tokens, {"plan": plan, "log_prob": log_prob})
                for i, score, plan, log_prob, tokens in rows
            ]

    def _nothing(self, queries: int) -> tuple[np.ndarray, ...]:
        """Empty places for passages, scores, plan scores and log-probabilities."""
        passages, scores = super()._nothing(queries)
        return passages, scores, scores.copy(), scores.copy()

    def _rank(self, result: _Scored, count: int) -> tuple[np.ndarray, ...]:
        passages, scores = (np.asarray(part)[:count] for part in result[:2])
        weight = self._weight
        if result.log_probs is None:
            totals, log_probs = scores, np.full_like(scores, -np.inf)
        else:
            log_probs = np.asarray(result.log_probs)[:count]
            if result.beside is None:
                totals = summed(scores, log_probs, weight)
            else:
                more, values = self._beside(result.beside, (passages < 0).any(1))
                log_probs, new = joined(passages, log_probs, more, values)
                totals = np.concatenate([summed(scores, log_probs, weight), weight * new], 1)
                passages = np.concatenate([passages, more], 1)
                scores = np.concatenate([scores, np.zeros_like(new)], 1)
                log_probs = np.concatenate([log_probs, new], 1)
        best = ranked(passages, totals, self.search.depth, self.pid_of)
        place = (best[0][:, :, None] == passages[:, None, :]).argmax(-1)
        return *best, *(np.take_along_axis(part, place, 1) for part in (scores, log_probs))

    def _beside(self, result: BeamResult, short: np.ndarray) -> Found:
        """Passages and log-probabilities [B, M] that the student found for the queries that are
        `short` of planned passages, bool [B], which alone it searched; none for the others."""
        student, beams = self.student, self.search.num_beams
        rows, log_probs = _nothing(len(short), beams)
        rows[short] = student.written_rows(result, short.sum())
        log_probs[short] = np.asarray(result.log_probs)[: short.sum()]
        return rank_passages(rows, log_probs, student.table, beams, student.allowed)


@dataclass
class PlannedDecoder(StudentWithPlan[PlannedQueries]):
    """A student with a plan that reads the texts of queries before the student does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        student = self.student
        fixed = student.index.layout.ends == "fixed"
        if self.plan.ranked_by == "beams":
            settings = (self.plan.num_beams, fixed, student.mesh, student.rules)
            self._score = guided_fn(student.config, *settings)
        else:
            self._score = score_fn(student.config, student.mesh, student.rules)

    def restrict(self, passage_mask: np.ndarray) -> PlannedDecoder:
        """See System."""
        return replace(self, student=self.student.restrict(passage_mask))

    def encode(self, vocabulary: Vocabulary, texts: Sequence[str]) -> PlannedQueries:
        """Queries as `passages` takes them: planned already."""
        if self.planner is None:
            raise ValueError("PlannedDecoder.encode: got no planner, expected one to plan texts")
        planned = self.planner.best(texts, self.plan.most, self.student.allowed)
        return PlannedQueries(super().encode(vocabulary, texts), planned)

    def may_write(self, queries: PlannedQueries) -> Writes | None:
        """See System: the planned identifiers; None where the plan decides alone."""
        student, of_plan = self.student, self.plan.ranked_by
        passages, scores = (part[0] for part in queries.planned)
        there = np.flatnonzero(passages >= 0)
        there = there[np.argsort(student.rows[passages[there]], kind="stable")]
        there = there[student.rows[passages[there]] >= 0]
        if of_plan == "plan" or not len(there):
            return None if of_plan == "plan" else student.may_write(queries.tokens)
        passages, scores = passages[there], scores[there]
        place = {passage: row for row, passage in enumerate(passages.tolist())}
        missing = (
            f"it is not among the {len(place)} planned passages, of which the last has the plan "
            f"score {scores.min():.2f}"
        )
        return Writes(
            *(student.config, student.params, self.mesh, student.rules, queries.tokens[0]),
            rows=np.asarray(student.table.tokens[student.rows[passages]], np.int32),
            bonus=scores / np.float32(self._weight),
            num_beams=self.plan.num_beams if of_plan == "beams" else len(place),
            fixed=student.index.layout.ends == "fixed",
            renormalise=False,
            row_of=lambda passage: place.get(passage, -1),
            missing=lambda passage: missing,
        )

    def _lengths(self, queries: PlannedQueries) -> np.ndarray:
        return self.student._lengths(queries.tokens)

    def _start(
        self, queries: PlannedQueries, places: np.ndarray, shape: tuple[int, int]
    ) -> _Scored:
        student = self.student
        passages, scores = (part[places] for part in queries.planned)
        if self.plan.ranked_by == "plan":
            return _Scored(passages, scores, None, None)
        short = places[(passages < 0).any(1)] if self.beside else places[:0]
        few = partitioning.shared_rows(-(-shape[0] // 4), self.mesh)  # two shapes are compiled
        size = few if len(short) <= few else shape[0]
        beside = student._start(queries.tokens, short, (size, shape[1])) if len(short) else None
        rows = np.where(passages >= 0, student.rows[np.maximum(passages, 0)], -1)
        order = np.argsort(rows, axis=1, kind="stable")
        passages, scores, rows = (
            np.take_along_axis(part, order, 1) for part in (passages, scores, rows)
        )
        size, length = shape[0], student.index.layout.max_length
        identifiers = np.zeros((size, passages.shape[1], length), np.int32)
        bonus = np.full(identifiers.shape[:2], -np.inf, np.float32)
        known = np.where(rows[..., None] >= 0, student.table.tokens[np.maximum(rows, 0)], 0)
        identifiers[: len(places), :, : known.shape[2]] = known
        bonus[: len(places)] = scores / np.float32(self._weight)
        tokens = partitioning.place_padded(queries.tokens[places], shape, self.mesh)
        placed = partitioning.place((identifiers, bonus), partitioning.batch_sharding(self.mesh))
        return _Scored(passages, scores, self._score(student.params, (tokens, *placed)), beside)


# The kind of a student -> what it is with a plan by words. Those from elsewhere come to these.
BY_WORDS: dict[type, Any] = {Decoder: PlannedDecoder}


def with_identifiers(system: System, owner: str) -> Decoder:
    """The system as a student with one identifier a passage. Raises ValueError for another one, of
    which the `owner` has no use."""
    if not isinstance(system, Decoder):
        raise ValueError(
            f"{owner}: got a {type(system).__name__}, expected a student with one identifier a "
            "passage"
        )
    return system


@dataclass(frozen=True)
class PlannedSystem(SystemSettings):
    """The distilled student with a plan, as a system beside the others; see `Experiment.plan`.

    Every subclass says by the type of its `plan` which plans it is for.
    """

    plan: Plan

    of_plans: ClassVar[dict[type, type[PlannedSystem]]] = {}
    rules: ClassVar[tuple[Any, ...]] = ()  # what runs depend on beside settings
    preferred: ClassVar[bool] = True

    def __init_subclass__(cls, plans: type, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        PlannedSystem.of_plans[plans] = cls

    @property
    def made_of(self) -> tuple[str, ...]:
        """See SystemSettings."""
        return ("distill",)

    def asked(self, search: Any) -> tuple[Any, ...]:
        """See SystemSettings."""
        return search, self.plan, *self.rules

    def given(self) -> dict[str, Any]:
        """See SystemSettings: the settings of the plan."""
        return {name: getattr(self.plan, name) for name in self.plan.searched}

    def replaced(self, **settings: Any) -> Self:
        """See SystemSettings."""
        plan: Any = self.plan
        return replace(self, plan=replace(plan, **settings))


@dataclass(frozen=True)
class Planned(PlannedSystem, plans=Lexical):
    """The distilled student with the plan Lexical."""

    plan: Lexical

    rules = (words.RULES, "titles and pseudo-queries are guided")

    def open(self, opening: Opening) -> System:
        """See SystemSettings."""
        plans = opening.prepared / PLANS
        planner = self.plan.planner(opening.store, plans, keep=opening.keep)
        student = opening.system("distill")
        kind = next((BY_WORDS[k] for k in type(student).__mro__ if k in BY_WORDS), None)
        if kind is None:
            raise ValueError(
                f"Planned: got a {type(student).__name__}, expected a student that writes "
                f"identifiers: {', '.join(known.__name__ for known in BY_WORDS)}"
            )
        return kind.of(student, self.plan, planner)


def weight_of(plan: Plan) -> float:
    """The weight of a plan that has one; otherwise raises ValueError."""
    if plan.weight is None:
        raise ValueError(
            f"{type(plan).__name__}.weight: got None, expected a number: only an evaluation of an "
            "experiment chooses it"
        )
    return plan.weight


def check_corpus(plan: Plan, num_passages: int) -> None:
    """Raises ValueError where a corpus has fewer passages than are planned."""
    if plan.planned is not None and plan.planned > num_passages:
        raise ValueError(
            f"{type(plan).__name__}.planned: got {plan.planned}, expected at most "
            f"{num_passages:,}, the passages of the corpus"
        )


def check_search(plan: Plan, search: Search) -> None:
    """Raises ValueError where a student cannot search so with a plan."""
    for setting, expected in (("renormalise", False), ("constrained", True)):
        if getattr(search, setting) != expected:
            raise ValueError(
                f"Search.{setting}: got {not expected} with a plan ({type(plan).__name__}), "
                f"expected {expected}: only identifiers of planned passages are written, and their "
                "log-probabilities are over the whole vocabulary"
            )
