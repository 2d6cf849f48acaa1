"""The settings of an experiment, and the fingerprint that tells whether a stage is up to date."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from dgr_jax import ranges
from dgr_jax.corpora.types import Collection
from dgr_jax.data.examples import SOURCES, Sources
from dgr_jax.data.rules import TEST_SPLITS, TRAIN_SPLIT, DataRules, check_apart
from dgr_jax.data.span_corruption import SpanCorruption
from dgr_jax.data.views import ViewMixture
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.experiments.common import (
    Evaluate,
    Measured,
    Teach,
    Training,
    sizes,
    start,
    texts,
    with_vocabulary,
)
from dgr_jax.experiments.stage import Stage, listed
from dgr_jax.identifiers.scheme import Scheme
from dgr_jax.models.initial import Initial, check_initial
from dgr_jax.models.t5 import T5Config
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval import kinds, planned, set_identifiers
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.multiview.search import MultiviewSearch
from dgr_jax.retrieval.simultaneous import Plan
from dgr_jax.retrieval.student_plans import Learned, OnePass
from dgr_jax.retrieval.system import SystemSettings
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.plan_losses import CodeLoss, PlanLoss, SetLoss


@dataclass(frozen=True)
class Prepare(DataRules):
    """Collection -> vocabulary, identifiers, trie, SeqIO tasks, token arrays.

    tasks: file in tasks/ that registers the SeqIO tasks, such as 'squad'.
    identifiers: a scheme of `dgr_jax.identifiers`; of several views, a passage has many.
    mixture: examples of each (text, passage) pair by view, of a scheme of several views.
    train_split, test_splits: names of qrels of the collection. train_split='' learns without labels
      from passages and pseudo-queries, as is done where a collection lacks its split 'train' (see
      `stages.labels`); then test_splits may be () too.
    min_relevance: grade from which a judged passage is a positive.
    query_length: tokens of an encoder input, EOS counted.
    """

    tasks: str
    identifiers: Scheme
    vocabulary: SentencePiece = SentencePiece()
    sources: Sources = Sources()
    mixture: ViewMixture = ViewMixture()
    train_split: str = TRAIN_SPLIT
    test_splits: tuple[str, ...] = TEST_SPLITS
    min_relevance: int = 1
    query_length: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.identifiers, Scheme):
            raise ValueError(
                f"Prepare.identifiers: got {type(self.identifiers).__name__}, expected a scheme of "
                "identifiers (dgr_jax.identifiers.scheme.Scheme), such as "
                "IDENTIFIERS=@ResidualQuantization()"
            )
        self.check_rules()
        if self.train_split and not self.test_splits:
            raise ValueError("Prepare.test_splits: got (), expected a split or more")
        ranges.check(
            self,
            min_relevance=ranges.at_least(1),
            query_length=ranges.at_least(2, ", EOS counted"),
            seed=ranges.SEED,
        )
        if not self.train_split:
            rates = self.sources.rates().keys() - {"labelled"}
            if not rates:
                raise ValueError(
                    "Prepare.train_split: got '', no labels, with Sources.passages=0 and "
                    "Sources.pseudo_queries=0, expected a rate for one of them, such as 0.5"
                )
            object.__setattr__(self, "sources", dataclasses.replace(self.sources, labelled=0.0))

    def without_labels(self) -> Prepare:
        """The same settings, to learn from passages and pseudo-queries."""
        return dataclasses.replace(self, train_split="")

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that are read."""
        named = (self.validation_split,) if self.validation_split else ()
        return (*self.train_splits, *self.test_splits, *named)

    @property
    def train_splits(self) -> tuple[str, ...]:
        """Splits that are learned from: one, or none without labels."""
        return (self.train_split,) if self.train_split else ()


@dataclass(frozen=True)
class Candidates:
    """The student retrieves its own candidates for queries that it learned from.

    sources: 'labelled' is the queries of the training split; 'passages' and 'pseudo_queries' are
      the texts of these sources of the mixture, each with the passage that it was made of as its
      positive. A teacher that needs no labels can order the candidates of any text.
    max_queries: so many queries of each source at most (0: all), drawn by the seed.
    keys: identifiers kept of each passage, where it has many.
    """

    search: Search | MultiviewSearch
    sources: tuple[str, ...] = ("labelled",)
    max_queries: int = 0
    keys: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.sources if name not in SOURCES]
        if unknown or not self.sources:
            raise ValueError(f"Candidates.sources: got {self.sources}, expected some of {SOURCES}")
        ranges.check(
            self, max_queries=ranges.at_least(0), keys=ranges.at_least(1), seed=ranges.SEED
        )


@dataclass(frozen=True)
class Experiment(Measured):
    """One experiment: everything that `python -m dgr_jax.train` does, in MODEL_DIR.

    control: also train the generation objective alone for as many steps more as distillation
    has, from the same checkpoint and on the same examples: what distillation is compared with.
    initial: where the student starts, Corpus or Pretrained; None: at random.
    further: stages of one's own; each runs after those that it reads.
    plan: what scores all passages before a student writes: Lexical, or Learned or OnePass, which
      the student is trained for in all of its stages. The distilled student with it is measured as
      `planned` beside the others. None: nothing.
    pretrain: how the student first learns to fill in `spans` of the passages; None: it does not.
    """

    model_dir: str
    collection: Collection
    prepare: Prepare
    model: T5Config
    generate: Training
    candidates: Candidates
    teach: Teach
    distill: Training
    evaluate: Evaluate[Search | MultiviewSearch]
    control: bool = True
    mesh: Mesh = Mesh()
    initial: Initial | None = None
    further: tuple[Stage, ...] = ()
    plan: Plan | None = None
    pretrain: Training | None = None
    spans: SpanCorruption = SpanCorruption()

    own_pairs: ClassVar = (("distill", "generate"), ("distill", "control"), ("distill", "bm25"))
    planner: ClassVar = "planners:GENERATIVE"

    def __post_init__(self) -> None:
        check_apart(self.prepare)
        check_initial("Experiment.initial", self.initial)
        scheme = self.prepare.identifiers
        if self.model.prefix_adaptive_layers and not scheme.codes_by_position:
            raise ValueError(
                f"T5Config.prefix_adaptive_layers: got {self.model.prefix_adaptive_layers} with "
                f"{type(scheme).__name__} identifiers, expected 0, or codes that "
                "are other tokens at every position: IDENTIFIERS=@ResidualQuantization(), "
                "@KMeansTree() or, with NaiveString.by_position=True, @NaiveString()"
            )
        if self.model.prefix_adaptive_layers and getattr(
            self.distill.objective, "pack_docids", False
        ):
            raise ValueError(
                "Distillation.pack_docids: got True with T5Config.prefix_adaptive_layers="
                f"{self.model.prefix_adaptive_layers}, expected False: these layers count places"
            )
        expected = MultiviewSearch if scheme.views else Search
        for name in ("candidates", "evaluate"):
            search = getattr(self, name).search
            if not isinstance(search, expected):
                raise ValueError(
                    f"{type(getattr(self, name)).__name__}.search: got {type(search).__name__}, "
                    f"expected @{expected.__name__}() with identifiers of "
                    f"{type(scheme).__name__} (Prepare.identifiers)"
                )
        if self.plan is not None:
            if scheme.views:
                _check_of_views(self.plan, scheme)
            else:
                assert isinstance(self.evaluate.search, Search)
                planned.check_search(self.plan, self.evaluate.search)
            if self.plan.weight is None and not self.prepare.held_out:
                raise ValueError(
                    f"{type(self.plan).__name__}.weight: got None without questions held out of "
                    "training, expected a number, or Prepare.validation above 0, such as 0.1"
                )
        self._train_for(self.plan)
        for name in () if scheme.views else ("generate", "distill"):
            getattr(self, name).check_alone(f"{name}/Training", "with one identifier a passage")
        if scheme.views and not self.distill.batch_size:
            raise ValueError(
                "distill/Training.batch_size: got 0, expected at least 1; 0 is for distillation "
                "with one identifier a passage"
            )
        self._check_pretraining()
        self.check_systems()
        self.generate.check_batches("generate/Training", "batch_size")
        self.distill.check_batches("distill/Training", "batch_size", "list_batch_size")
        self.generate.check_held_out("generate/Training", self.prepare)
        self.distill.check_held_out("distill/Training", self.prepare)
        rates = self.prepare.sources.rates()
        if not self.prepare.train_split:
            asked = tuple(name for name in self.candidates.sources if name != "labelled")
            unlabelled = dataclasses.replace(self.candidates, sources=asked or tuple(rates))
            object.__setattr__(self, "candidates", unlabelled)
        for source in self.candidates.sources:
            if source != "labelled" and source not in rates:
                raise ValueError(
                    f"Candidates.sources: got {source!r}, expected 'labelled' or one of "
                    f"{sorted(rates)}: give Sources.{source} a rate"
                )

    def _check_pretraining(self) -> None:
        """Raises ValueError where the student cannot be trained on spans of passages so."""
        if self.pretrain is None:
            return
        self.pretrain.check_batches("pretrain/Training", "batch_size")
        self.pretrain.check_alone("pretrain/Training", "where spans are filled in")
        if self.pretrain.validate_every:
            raise ValueError(
                f"pretrain/Training.validate_every: got {self.pretrain.validate_every}, expected "
                "0: before it learns identifiers, a student finds nothing"
            )
        self.spans.check_ids(self.prepare.vocabulary.extra_ids)

    def _train_for(self, plan: Plan | None) -> None:
        """Changes what is trained to what a plan of the student's own needs.

        Raises ValueError where the settings of the plan do not fit.
        """
        loss: PlanLoss | None = None
        if isinstance(plan, Learned):
            pieces, longest = self.prepare.vocabulary, self.prepare.query_length
            if not pieces.path:
                set_identifiers.check_size(plan.set_size, pieces.size)
            if plan.query_tokens is not None and plan.query_tokens > longest:
                raise ValueError(
                    f"Learned.query_tokens: got {plan.query_tokens}, expected at most {longest}, "
                    "Prepare.query_length"
                )
            read = longest if plan.query_tokens is None else plan.query_tokens
            model = dataclasses.replace(self.model, decoder_query_tokens=read)
            object.__setattr__(self, "model", model)
            loss = SetLoss(plan.set_size, plan.loss_weight, plan.loss, plan.flops)
        elif isinstance(plan, OnePass):
            loss = CodeLoss(plan.loss_weight, plan.loss)
        for name in ("generate", "distill"):
            training = getattr(self, name)
            objective: Any = training.objective
            if getattr(objective, "plan", None) == loss:
                continue
            if not isinstance(objective, (Generation, Distillation)):
                raise ValueError(
                    f"{name}/Training.objective: got {type(objective).__name__} with "
                    f"Experiment.plan=@{type(plan).__name__}(), expected Generation or Distillation"
                )
            objective = dataclasses.replace(objective, plan=loss)
            object.__setattr__(self, name, dataclasses.replace(training, objective=objective))

    @property
    def kind(self) -> str:
        """See Measured."""
        return "multiview" if self.prepare.identifiers.views else "docid"

    @property
    def width(self) -> int:
        """Width D of the student's embeddings."""
        return self.model.emb_dim

    @property
    def systems(self) -> tuple[str, ...]:
        """The stages that train what is measured, the best one last."""
        return ("generate", "control", "distill") if self.control else ("generate", "distill")

    @property
    def added(self) -> tuple[SystemSettings, ...]:
        """See Measured: at last `planned`, the best student with the plan."""
        if self.plan is None:
            return self.evaluate.systems
        return (*self.evaluate.systems, kinds.planned_by(self.plan))

    def network(self, vocab_size: int) -> T5Config:
        """The sizes of the transformer of every student, with a vocabulary."""
        return with_vocabulary(self.model, vocab_size)

    def sized(self, vocab_size: int) -> T5Config:
        """The settings of the model with a vocabulary."""
        return self.network(vocab_size)

    def training(self, system: str) -> dict[str, Training]:
        """The training stages of a system, in order; the steps of `control` are those of
        `distill`."""
        return {"generate": self.generate} | (
            {system: self.distill} if system != "generate" else {}
        )

    def compared(self, system: str) -> dict[str, Any]:
        """What systems must have in common to be compared: examples seen, sizes of the model (but
        for its vocabulary), the kind of its decoder, its start, and the data to learn from."""
        return {
            "examples": sum(run.steps * run.examples for run in self.training(system).values()),
            "model": sizes(self.model),
            "decoder": self.model.prefix_adaptive_layers,
            "start": repr(
                (self.initial, self.pretrain, self.spans) if self.pretrain else self.initial
            ),
            "data": (self.prepare.train_split, *texts(self.prepare)),
        }

    @property
    def stages(self) -> dict[str, Stage]:
        """All stages, in the order that they run in."""
        control = ("student:CONTROL",) if self.control else ()
        pretrained = ("pretrain:STAGE",) if self.pretrain is not None else ()
        trained = (
            *start(self.initial),
            *pretrained,
            "student:GENERATE",
            "candidates:STAGE",
            "teach:STAGE",
        )
        return listed(
            "prepare:STAGE", *trained, "distill:STAGE", *control, "evaluate:STAGE", *self.further
        )


def _check_of_views(plan: Plan, scheme: Scheme) -> None:
    """Raises ValueError where students with identifiers of several views cannot have a plan."""
    name = type(plan).__name__
    if not plan.of_any_student:
        raise ValueError(
            f"Experiment.plan: got {name} with identifiers of {type(scheme).__name__}, expected "
            "None, @Lexical(), or identifiers of which a passage has one (Prepare.identifiers)"
        )
    if plan.ranked_by == "identifiers":
        raise ValueError(
            f"{name}.ranked_by: got 'identifiers' with identifiers of {type(scheme).__name__}, "
            "expected 'beams' or 'plan': a passage has more identifiers than can be scored"
        )
