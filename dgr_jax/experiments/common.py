"""Settings that experiments of several kinds share."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from dgr_jax import ranges
from dgr_jax.corpora.variations import Variation
from dgr_jax.data.rules import DataRules
from dgr_jax.experiments.stage import Stage
from dgr_jax.models.initial import Corpus, Initial
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval.bm25 import WORDS, Bm25, Bm25Baseline
from dgr_jax.retrieval.dense import DenseSearch
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.multiview.search import MultiviewSearch
from dgr_jax.retrieval.simultaneous import Plan
from dgr_jax.retrieval.system import SystemSettings
from dgr_jax.settings import describe, unless_default, without_effect
from dgr_jax.teaching.list_recipes import ListRecipe
from dgr_jax.teaching.teacher import Teacher
from dgr_jax.training.objectives import Objective
from dgr_jax.training.optimizers import Optimizer

SearchKind = TypeVar("SearchKind", bound=Search | MultiviewSearch | DenseSearch)


@dataclass(frozen=True)
class Training:
    """One training run: a generation or distillation objective for `steps` steps.

    batch_size: generation examples a step. In distillation they are the mixture's, and 0 stands for
      the best positive of each list instead, as published: a query is then encoded once for both.
    list_batch_size: rank lists a step (distillation).
    validate_every: steps from one search for the questions held out of training
      (`Prepare.validation`) to the next, by `Evaluate.search`; their RR@10 is among the metrics. 0:
      none. A dense retriever embeds all passages for each.
    keep: the student of the stage is that of the 'last' step, or that of the 'best' RR@10.
    patience: training ends after so many searches in a row that found no better RR@10; 0: never.
    examples_per_query: so many generation examples of one query and view are learned together, from
      one encoding of it; batch_size is a multiple. 1: each has an encoding of its own. Where there
      are fewer, some are learned more than once. For identifiers of several views.
    pack_queries: where a student learns to write, is distilled or refreshed, short queries share
      rows of its encoder, which then reads little padding; they are encoded as each would be alone.
    drop_tokens: the probability with which a token of a query's text is left out of a step, so that
      a retriever learns to do without some. Not of texts to pre-train on or to refresh with.
    """

    objective: Objective
    optimizer: Optimizer
    steps: int
    batch_size: int = 64
    list_batch_size: int = 16
    microbatches: int = 1
    seed: int = 0
    log_every: int = without_effect(50)
    checkpoint_every: int = without_effect(1000)
    keep_checkpoints: int = without_effect(2)
    validate_every: int = unless_default(0)
    keep: str = unless_default("last")
    patience: int = unless_default(0)
    examples_per_query: int = unless_default(1)
    pack_queries: bool = unless_default(True)
    drop_tokens: float = unless_default(0.0)

    def __post_init__(self) -> None:
        ranges.check(
            self,
            steps=ranges.at_least(0),
            batch_size=ranges.at_least(0),
            list_batch_size=ranges.at_least(1),
            microbatches=ranges.at_least(1),
            seed=ranges.SEED,
            log_every=ranges.at_least(1),
            checkpoint_every=ranges.at_least(1),
            keep_checkpoints=ranges.at_least(1),
            validate_every=ranges.at_least(0),
            keep=ranges.one_of("last", "best"),
            patience=ranges.at_least(0),
            drop_tokens=ranges.from_to_below(0, 1),
            examples_per_query=ranges.at_least(1),
        )
        if self.batch_size % self.examples_per_query:
            raise ValueError(
                f"Training.examples_per_query: got {self.examples_per_query}, expected a number "
                f"that divides Training.batch_size, {self.batch_size}"
            )
        for name in ("keep", "patience"):
            chosen = getattr(self, name)
            if not self.validate_every and chosen not in ("last", 0):
                raise ValueError(
                    f"Training.{name}: got {chosen!r} with Training.validate_every=0, expected 1 "
                    "or more steps from one search for the held-out questions to the next"
                )

    @property
    def examples(self) -> int:
        """Generation examples a step."""
        return self.batch_size or self.list_batch_size

    @property
    def checkpoints(self) -> int:
        """How many checkpoints lie on the disk at the end."""
        return self.keep_checkpoints + (self.keep == "best")

    def _together(self, size: str) -> int:
        """How many of one of the batch sizes have one encoding."""
        return self.examples_per_query if size == "batch_size" else 1

    def check_shards(self, stage: str, shards: int, *sizes: str) -> None:
        """Raises ValueError where the data shards cannot share these batches of a stage."""
        parts = self.microbatches * shards
        for name in sizes:
            size, together = getattr(self, name), self._together(name)
            if size // together % parts:
                raise ValueError(
                    f"{stage}: got Training.{name}={size}, expected a multiple of "
                    f"{parts * together}, Training.microbatches x the data shards of the mesh"
                    + " x Training.examples_per_query" * (together > 1)
                    + "; set BATCH_SIZE, LIST_BATCH_SIZE, or Mesh.data and Mesh.model"
                )

    def check_alone(self, name: str, where: str) -> None:
        """Raises ValueError where examples cannot be learned together. name: of these settings in
        gin; where: that is, in words."""
        if self.examples_per_query > 1:
            raise ValueError(
                f"{name}.examples_per_query: got {self.examples_per_query}, expected 1 {where}"
            )

    def check_held_out(self, name: str, prepare: DataRules) -> None:
        """Raises ValueError where there are no questions to validate on. name: of these settings in
        gin, such as 'generate/Training'."""
        if self.validate_every and not prepare.held_out:
            owner = type(prepare).__name__
            raise ValueError(
                f"{name}.validate_every: got {self.validate_every}, expected 0 without questions "
                f"held out of training: give {owner}.validation a share, such as 0.1, or "
                f"{owner}.validation_split a name"
            )

    def check_batches(self, name: str, *sizes: str) -> None:
        """Raises ValueError where one of these batch sizes cannot be cut into the microbatches, or
        is 0 and alone. name: of these settings in gin, such as 'generate/Training'."""
        if len(sizes) == 1:
            ranges.require(f"{name}.{sizes[0]}", getattr(self, sizes[0]), ranges.at_least(1))
        for size in sizes:
            if getattr(self, size) // self._together(size) % self.microbatches:
                raise ValueError(
                    f"{name}.microbatches: got {self.microbatches}, expected a number that divides "
                    f"{name}.{size}, {getattr(self, size)}"
                )


@dataclass(frozen=True)
class Teach:
    """A teacher orders the candidates, and rank lists are cut from its order."""

    teacher: Teacher
    lists: ListRecipe
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self, seed=ranges.SEED)


def _has_other_baseline(evaluate: Evaluate) -> bool:
    """Whether BM25 is measured with settings other than WORDS, which it had in older versions."""
    return evaluate.bm25 and evaluate.baseline != WORDS


def _has_variation(evaluate: Evaluate) -> bool:
    """Whether questions are varied, which they were not in older versions."""
    return evaluate.variation != Variation()


@dataclass(frozen=True)
class Evaluate(Generic[SearchKind]):
    """Runs and measures of every system on the test splits.

    measures: names of ir_measures, and AnswerHits@k where the queries have answers; min_relevance:
    grade from which Success, RR and R count.
    max_queries: of each split at most (0: all), drawn by the seed.
    bm25: whether BM25 is measured beside; baseline: its settings.
    systems: others that no stage trains, such as a sum of trained ones.
    variation: how the questions differ from those of the collection, to see what typos do.
    """

    search: SearchKind
    measures: tuple[str, ...] = (
        "Success@1", "Success@5", "Success@10", "Success@20", "Success@100",
        "RR@10", "nDCG@10", "R@100",
    )  # fmt: skip
    min_relevance: int = 1
    max_queries: int = 0
    bm25: bool = True
    seed: int = 0
    baseline: Bm25 = field(default=Bm25(), metadata={"fingerprint": _has_other_baseline})
    systems: tuple[SystemSettings, ...] = unless_default(())
    variation: Variation = field(default=Variation(), metadata={"fingerprint": _has_variation})

    def __post_init__(self) -> None:
        ranges.check(
            self,
            min_relevance=ranges.at_least(1),
            max_queries=ranges.at_least(0),
            seed=ranges.SEED,
        )

    @property
    def validation_search(self) -> Search | MultiviewSearch | DenseSearch:
        """The search for questions that are held out of training: as deep as their RR@10 looks."""
        return dataclasses.replace(self.search, depth=min(10, self.search.depth))


class Measured:
    """What experiments of every kind say of the systems that they measure.

    kind: of the trained ones, that of a `TrainedSystem`; own_pairs: of systems that are
    compared where both are measured. plan: None where there is none.
    planner: how it is planned: a `capacity.planner.Planner`, or the name of one in `capacity`, such
    as 'planners:DENSE'; blank: it cannot be.
    """

    own_pairs: ClassVar[tuple[tuple[str, str], ...]]
    planner: ClassVar[Any] = ""
    evaluate: Evaluate
    plan: Plan | None = None

    @property
    def kind(self) -> str:
        """The kind of the trained systems."""
        raise NotImplementedError

    @property
    def systems(self) -> tuple[str, ...]:
        """The stages that train what is measured, the best one last."""
        raise NotImplementedError

    @property
    def stages(self) -> dict[str, Stage]:
        """All stages, in the order that they run in."""
        raise NotImplementedError

    @property
    def added(self) -> tuple[SystemSettings, ...]:
        """Systems beside the trained ones and BM25."""
        return self.evaluate.systems

    @property
    def untrained(self) -> dict[str, SystemSettings]:
        """What is measured that no stage trains, by name."""
        evaluate = self.evaluate
        baseline = (Bm25Baseline("bm25", evaluate.baseline),) if evaluate.bm25 else ()
        return {settings.name: settings for settings in (*baseline, *self.added)}

    @property
    def measured(self) -> tuple[str, ...]:
        """Every system that is measured, in the order of tables."""
        added = (settings.name for settings in self.added)
        return (*["bm25"] * self.evaluate.bm25, *self.systems, *added)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The systems that are compared: one that was added against what it is made of and BM25."""
        added = ((s.name, other) for s in self.added for other in (*s.made_of, "bm25"))
        return (*self.own_pairs, *added)

    def made_of(self, system: str) -> tuple[str, ...]:
        """The trained systems that one is made of: itself where it is trained."""
        untrained = self.untrained.get(system)
        return untrained.made_of if untrained else (system,)

    def check_systems(self) -> None:
        """Raises ValueError for systems that have no name of their own, or are made of others than
        those that are trained."""
        names = ["bm25", *self.systems, *self.stages] if self.added else []
        for settings in self.added:
            if settings.name in names or not re.fullmatch(r"[\w-]+", settings.name):
                raise ValueError(
                    f"{type(settings).__name__}.name: got {settings.name!r}, expected letters, "
                    "digits, _ and -, and no name of a stage or of another system"
                )
            if unknown := [other for other in settings.made_of if other not in self.systems]:
                raise ValueError(
                    f"Evaluate.systems: {settings.name!r} is made of {unknown[0]!r}, expected some "
                    f"of {', '.join(self.systems)}"
                )
            names.append(settings.name)


def start(initial: Initial | None) -> tuple[str, ...]:
    """The stage that makes embeddings of the passages, where a model starts from these."""
    return ("start:STAGE",) if isinstance(initial, Corpus) else ()


def texts(prepare: Any) -> tuple[Any, ...]:
    """What a mixture is made of, beside its judgements."""
    fold = prepare.validation, prepare.validation_split, prepare.validation_seed
    held_out = fold if prepare.held_out else ()
    sources = json.dumps(describe(prepare.sources))
    return prepare.min_relevance, prepare.shared_queries, *held_out, sources


def sizes(config: T5Config) -> str:
    """The settings of a model, but for its vocabulary, prefix-adaptive layers and what its decoder
    reads of the query, as JSON."""
    apart = ("vocab_size", "prefix_adaptive_layers", "decoder_query_tokens")
    described = {k: v for k, v in describe(config).items() if k not in apart}
    return json.dumps(described, sort_keys=True)


def with_vocabulary(config: T5Config, vocab_size: int) -> T5Config:
    """The sizes with so many tokens, unless T5Config.vocab_size is set; ValueError if too small."""
    if config.vocab_size and config.vocab_size < vocab_size:
        raise ValueError(
            f"T5Config.vocab_size: got {config.vocab_size}, expected at least {vocab_size}, the "
            "text pieces and docid codes of this experiment (0 takes just those)"
        )
    return dataclasses.replace(config, vocab_size=config.vocab_size or vocab_size)
