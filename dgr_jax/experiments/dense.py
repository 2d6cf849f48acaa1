"""The settings of an experiment with a dense retriever: see `dgr_jax.experiments.generative`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dgr_jax import ranges
from dgr_jax.corpora.types import Collection
from dgr_jax.data.examples import Sources
from dgr_jax.data.rules import TEST_SPLITS, TRAIN_SPLIT, DataRules, check_apart
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
from dgr_jax.models.dual_encoder import DualEncoderConfig
from dgr_jax.models.initial import Initial, check_initial
from dgr_jax.models.t5 import T5Config
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.dense import DenseSearch

NEGATIVES = ("in_batch", "random", "bm25", "own")


@dataclass(frozen=True)
class DensePrepare(DataRules):
    """Collection -> vocabulary, SeqIO tasks, token arrays of queries and of passages.

    tasks: file in tasks/ that registers the SeqIO tasks, such as 'squad'.
    sources: texts that are queries in training; by default the labelled ones alone. A chunk or
      sentence of a passage has this passage as its positive.
    train_splits: names of qrels to learn from, such as those of people and those of an LLM; (): no
      labels, see `Prepare.train_split`.
    test_splits: names of qrels to be measured on.
    min_relevance: grade from which a judged passage is a positive.
    query_length, passage_length: tokens of a text, EOS counted; longer ones are cut.
    """

    tasks: str
    vocabulary: SentencePiece = SentencePiece()
    sources: Sources = Sources(passages=0.0, pseudo_queries=0.0)
    train_splits: tuple[str, ...] = (TRAIN_SPLIT,)
    test_splits: tuple[str, ...] = TEST_SPLITS
    min_relevance: int = 1
    query_length: int = 32
    passage_length: int = 128

    def __post_init__(self) -> None:
        self.check_rules()
        others = self.sources.rates().keys() - {"labelled"}
        unlabelled = bool(others) and not self.train_splits
        for name in ("train_splits", "test_splits"):
            splits = getattr(self, name)
            if not (splits or unlabelled) or len(set(splits)) < len(splits):
                raise ValueError(
                    f"DensePrepare.{name}: got {splits!r}, expected one or more different splits"
                )
        length = ranges.at_least(2, ", EOS counted")
        ranges.check(
            self, min_relevance=ranges.at_least(1), query_length=length, passage_length=length
        )
        if unlabelled:
            object.__setattr__(self, "sources", dataclasses.replace(self.sources, labelled=0.0))

    def without_labels(self) -> DensePrepare:
        """The same settings, to learn from passages and pseudo-queries."""
        return dataclasses.replace(self, train_splits=())

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that are read."""
        named = (self.validation_split,) if self.validation_split else ()
        return tuple(dict.fromkeys((*self.train_splits, *self.test_splits, *named)))


@dataclass(frozen=True)
class Lists:
    """What the lists of a training step are made of, beside negatives.

    positives: most positives of a query in a list, P.
    fixed: the first P positives, the highest grades first, at every step; otherwise P are drawn
      anew, so that each epoch meets others, and a repeated run the same.
    grade_weights: what the chance of a positive to be drawn is proportional to: for grade 1, 2 ...
      (the last for all above); empty: the same for all.
    weights: relative rate of the queries of each of DensePrepare.train_splits; empty: the same.
    curriculum: phases, each (share of the steps, weight of each split ...), such as LLM labels
      first and human ones last: ((0.5, 1.0, 0.0), (0.5, 0.0, 1.0)); empty: `weights` throughout.
    """

    positives: int = 1
    fixed: bool = False
    grade_weights: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    curriculum: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        ranges.check(self, positives=ranges.at_least(1))
        weight = ranges.at_least(0)
        for name in ("grade_weights", "weights"):
            given = getattr(self, name)
            if given and not (all(map(weight.holds, given)) and any(given)):
                raise ValueError(
                    f"Lists.{name}: got {given}, expected weights of 0 or more, one of them above 0"
                )
        if self.curriculum and self.weights:
            raise ValueError("Lists: got both weights and curriculum, expected one of them")
        for phase in self.curriculum:
            valid = len(phase) > 1 and all(map(weight.holds, phase))
            if not valid or not phase[0] or not any(phase[1:]):
                raise ValueError(
                    f"Lists.curriculum: got the phase {phase!r}, expected (share of the steps "
                    "above 0, weight of each split ..., one of them above 0)"
                )

    def phases(self, splits: int) -> list[tuple[float, tuple[float, ...]]]:
        """(share of the steps, weight of each split) in order. ValueError for another number of
        weights than `splits`."""
        phases = self.curriculum or ((1.0, *(self.weights or (1.0,) * splits)),)
        name = "curriculum" if self.curriculum else "weights"
        for phase in phases:
            if len(phase) != splits + 1:
                raise ValueError(
                    f"Lists.{name}: got weights {tuple(phase[1:])}, expected {splits}, one for "
                    "each of DensePrepare.train_splits"
                )
        total = sum(share for share, *_ in phases)
        return [(share / total, tuple(weights)) for share, *weights in phases]


@dataclass(frozen=True)
class Negatives:
    """Passages that stand in a query's list as negatives, beside those of the batch.

    source: 'in_batch' none but these; 'random' passages; 'bm25', what it finds for the query;
      'own', what the trained encoder finds (DenseExperiment.mined alone).
    count: of each list, drawn anew at each step from the `depth` of a query.
    depth: passages of the source that are kept for a query; its positives are not among them.
    skip: so many of the best are left out, often answers that nobody judged.
    """

    source: str = "in_batch"
    count: int = 1
    depth: int = 50
    skip: int = 0
    bm25: Bm25 = Bm25()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in NEGATIVES:
            raise ValueError(
                f"Negatives.source: got {self.source!r}, expected one of {', '.join(NEGATIVES)}"
            )
        ranges.check(self, count=ranges.at_least(1), skip=ranges.at_least(0), seed=ranges.SEED)
        ranges.check(self, depth=ranges.at_least(self.count, ", Negatives.count"))


@dataclass(frozen=True)
class DenseExperiment(Measured):
    """One dense retriever: everything that `python -m dgr_jax.train` does, in MODEL_DIR.

    refresh: train on from the trained encoder, with negatives that it has found itself (`mined`),
      as ANCE does (Xiong et al. 2021); None: do not.
    teach: a teacher orders the `negatives` and the positives of each labelled query, and the lists
      cut from its order are what is trained on, with Dense.teacher_loss; None: there is none.
    initial: where the towers start: Corpus, or Pretrained, a published T5 whose encoder they take;
      None: at random.
    further: see `Experiment`.
    """

    model_dir: str
    collection: Collection
    prepare: DensePrepare
    model: DualEncoderConfig
    train: Training
    evaluate: Evaluate[DenseSearch]
    lists: Lists = Lists()
    negatives: Negatives = Negatives()
    teach: Teach | None = None
    refresh: Training | None = None
    mined: Negatives = field(default_factory=lambda: Negatives(source="own"))
    mesh: Mesh = Mesh()
    initial: Initial | None = None
    further: tuple[Stage, ...] = ()

    own_pairs: ClassVar = (("refresh", "dense"), ("refresh", "bm25"), ("dense", "bm25"))
    planner: ClassVar = "planners:DENSE"

    def __post_init__(self) -> None:
        check_apart(self.prepare)
        check_initial("DenseExperiment.initial", self.initial)
        search = self.evaluate.search
        if not isinstance(search, DenseSearch):
            raise ValueError(
                f"Evaluate.search: got {type(search).__name__}, expected @DenseSearch() with a "
                "dense retriever"
            )
        for name in ("query_length", "passage_length"):
            if getattr(search, name) != getattr(self.prepare, name):
                raise ValueError(
                    f"DenseSearch.{name}: got {getattr(search, name)}, expected "
                    f"{getattr(self.prepare, name)}, DensePrepare.{name}"
                )
        if self.negatives.source == "own":
            raise ValueError(
                "Negatives.source: got 'own', expected one of in_batch, random, bm25: an encoder "
                "finds its own once it is trained, see DenseExperiment.refresh"
            )
        if self.refresh is not None and self.mined.source == "in_batch":
            raise ValueError("mined/Negatives.source: got 'in_batch', expected own, bm25 or random")
        self.lists.phases(len(self.prepare.train_splits))
        self.check_systems()
        for name, training in {"Training": self.train, "refresh/Training": self.refresh}.items():
            if training is not None:
                training.check_batches(name, "batch_size")
                training.check_alone(name, "with a dense retriever")
                training.check_held_out(name, self.prepare)
        self._check_teacher()

    def _check_teacher(self) -> None:
        if _has_teacher_loss(self.refresh):
            raise ValueError(
                "DenseExperiment.refresh: got a teacher loss, expected none: mined negatives have "
                "no teacher's scores; give refresh/Training.objective = @refresh/Dense() and "
                "refresh/Dense.teacher_loss = None"
            )
        if _has_teacher_loss(self.train) and self.teach is None:
            raise ValueError(
                "DenseExperiment.teach: got None, expected @Teach() with Dense.teacher_loss"
            )
        if self.teach is None:
            return
        if self.negatives.source == "in_batch":
            raise ValueError(
                "Negatives.source: got 'in_batch', expected bm25 or random: passages for the "
                "teacher to order (DenseExperiment.teach)"
            )
        if others := self.prepare.sources.rates().keys() - {"labelled"}:
            raise ValueError(
                f"Sources.{min(others)}: got a rate, expected 0: the teacher orders passages "
                "of labelled queries alone (DenseExperiment.teach)"
            )

    @property
    def width(self) -> int:
        """Width D of the encoder's embeddings."""
        return self.model.t5.emb_dim

    @property
    def kind(self) -> str:
        """See Measured."""
        return "dense"

    @property
    def systems(self) -> tuple[str, ...]:
        """The stages that train what is measured, the best one last."""
        return ("dense",) if self.refresh is None else ("dense", "refresh")

    def network(self, vocab_size: int) -> T5Config:
        """The sizes of the transformer of each tower, with a vocabulary."""
        return with_vocabulary(self.model.t5, vocab_size)

    def sized(self, vocab_size: int) -> DualEncoderConfig:
        """The settings of the model with a vocabulary."""
        return dataclasses.replace(self.model, t5=self.network(vocab_size))

    def training(self, system: str) -> dict[str, Training]:
        """The training stages of a system, in order."""
        again = self.refresh if system == "refresh" else None
        return {"dense": self.train} | ({} if again is None else {"refresh": again})

    def compared(self, system: str) -> dict[str, Any]:
        """What systems must have in common to be compared: see `generative.Experiment`. A student
        that writes identifiers has one encoder, of these sizes."""
        splits = self.prepare.train_splits
        return {
            "examples": sum(run.steps * run.examples for run in self.training(system).values()),
            "model": sizes(self.model.t5) if self.model.shared else f"2 x {sizes(self.model.t5)}",
            "decoder": 0,  # it has none
            "start": repr(self.initial),
            "data": (splits if len(splits) > 1 else "".join(splits), *texts(self.prepare)),
        }

    @property
    def stages(self) -> dict[str, Stage]:
        """All stages, in the order that they run in."""
        pool = () if self.negatives.source == "in_batch" else ("dense_negatives:STAGE",)
        teach = () if self.teach is None else ("dense_teach:STAGE",)
        refresh = () if self.refresh is None else ("dense_refresh:MINE", "dense_refresh:REFRESH")
        trained = (*pool, *teach, *start(self.initial), "dense:STAGE", *refresh)
        return listed("dense_prepare:STAGE", *trained, "evaluate:STAGE", *self.further)


def _has_teacher_loss(training: Training | None) -> bool:
    return getattr(getattr(training, "objective", None), "teacher_loss", None) is not None
