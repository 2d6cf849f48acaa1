"""The settings of an experiment, and the fingerprint that tells whether a stage is up to date."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dgr_jax import ranges
from dgr_jax.corpora.types import Collection
from dgr_jax.data.examples import SOURCES, Sources
from dgr_jax.data.rules import TEST_SPLITS, TRAIN_SPLIT, DataRules
from dgr_jax.data.views import ViewMixture
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.models import start
from dgr_jax.models.t5 import T5Config
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval.dense import DenseSearch
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.multiview_search import MultiviewSearch


def _without_effect(default: Any) -> Any:
    """A field that changes speed or output, but not results: it makes no stage run again."""
    return field(default=default, metadata={"fingerprint": False})


@dataclass(frozen=True)
class Prepare(DataRules):
    """Collection -> vocabulary, identifiers, trie, SeqIO tasks, token arrays.

    tasks: file in tasks/ that registers the SeqIO tasks, such as 'squad'.
    identifiers: a scheme of `dgr_jax.identifiers`; with Multiview, a passage has many.
    mixture: examples of each (text, passage) pair by view, of Multiview.
    train_split, test_splits: names of qrels of the collection. train_split='' learns without labels
      from passages and pseudo-queries, as is done where a collection lacks its split 'train' (see
      `pipeline.without_labels`); then test_splits may be () too.
    min_relevance: grade from which a judged passage is a positive.
    query_length: tokens of an encoder input, EOS counted.
    """

    tasks: str
    identifiers: Any
    vocabulary: SentencePiece = SentencePiece()
    sources: Sources = Sources()
    mixture: ViewMixture = ViewMixture()
    train_split: str = TRAIN_SPLIT
    test_splits: tuple[str, ...] = TEST_SPLITS
    min_relevance: int = 1
    query_length: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
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

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that are read."""
        return (*self.train_splits, *self.test_splits)

    @property
    def train_splits(self) -> tuple[str, ...]:
        """Splits that are learned from: one, or none without labels."""
        return (self.train_split,) if self.train_split else ()


@dataclass(frozen=True)
class Training:
    """One training run: a generation or distillation objective for `steps` steps.

    batch_size: generation examples a step. In distillation they are the mixture's, and 0 stands for
      the best positive of each list instead, as published: a query is then encoded once for both.
    list_batch_size: rank lists a step (distillation).
    """

    objective: Any
    optimizer: Any
    steps: int
    batch_size: int = 64
    list_batch_size: int = 16
    microbatches: int = 1
    seed: int = 0
    log_every: int = _without_effect(50)
    checkpoint_every: int = _without_effect(1000)
    keep_checkpoints: int = _without_effect(2)

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
        )

    @property
    def examples(self) -> int:
        """Generation examples a step."""
        return self.batch_size or self.list_batch_size

    def check_shards(self, stage: str, shards: int) -> None:
        """Raises ValueError where the data shards cannot share the batches of a stage."""
        sizes = {"batch_size": self.batch_size}
        if stage == "distill" or not self.batch_size:
            sizes["list_batch_size"] = self.list_batch_size
        for name, size in sizes.items():
            if size % (self.microbatches * shards):
                raise ValueError(
                    f"{stage}: got Training.{name}={size}, expected a multiple of "
                    f"{self.microbatches * shards}, Training.microbatches x the data shards of the "
                    "mesh; set BATCH_SIZE, LIST_BATCH_SIZE, or Mesh.data and Mesh.model"
                )

    def check_batches(self, name: str, *sizes: str) -> None:
        """Raises ValueError where one of these batch sizes cannot be cut into the microbatches, or
        is 0 and alone. name: of these settings in gin, such as 'generate/Training'."""
        if len(sizes) == 1:
            ranges.require(f"{name}.{sizes[0]}", getattr(self, sizes[0]), ranges.at_least(1))
        for size in sizes:
            if getattr(self, size) % self.microbatches:
                raise ValueError(
                    f"{name}.microbatches: got {self.microbatches}, expected a number that divides "
                    f"{name}.{size}, {getattr(self, size)}"
                )


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
class Teach:
    """A teacher orders the candidates, and rank lists are cut from its order.

    teacher, lists: see `dgr_jax.retrieval.teacher` and `dgr_jax.retrieval.recipes`.
    """

    teacher: Any
    lists: Any
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self, seed=ranges.SEED)


@dataclass(frozen=True)
class Evaluate:
    """Runs and measures of every system on the test splits.

    measures: names of ir_measures, and AnswerHits@k where the queries have answers; min_relevance:
    grade from which Success, RR and R count.
    max_queries: of each split at most (0: all), drawn by the seed. bm25: measure BM25 beside.
    """

    search: Search | MultiviewSearch | DenseSearch
    measures: tuple[str, ...] = (
        "Success@1", "Success@5", "Success@10", "Success@20", "Success@100",
        "RR@10", "nDCG@10", "R@100",
    )  # fmt: skip
    min_relevance: int = 1
    max_queries: int = 0
    bm25: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(
            self,
            min_relevance=ranges.at_least(1),
            max_queries=ranges.at_least(0),
            seed=ranges.SEED,
        )


class Stage(NamedTuple):
    """settings: those of the experiment that a stage reads itself; upstream: the stages whose
    output it reads."""

    settings: tuple[str, ...]
    upstream: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """One experiment: everything that `python -m dgr_jax.train` does, in MODEL_DIR.

    control: also train the generation objective alone for as many steps more as distillation
    has, from the same checkpoint and on the same examples: what distillation is compared with.
    initial: where the student starts, Corpus or Pretrained; None: at random.
    """

    model_dir: str
    collection: Collection
    prepare: Prepare
    model: T5Config
    generate: Training
    candidates: Candidates
    teach: Teach
    distill: Training
    evaluate: Evaluate
    control: bool = True
    mesh: Mesh = Mesh()
    initial: Any = None

    def __post_init__(self) -> None:
        start.check("Experiment.initial", self.initial)
        many = isinstance(self.prepare.identifiers, Multiview)
        if self.model.prefix_adaptive_layers and not getattr(
            self.prepare.identifiers, "codes_by_position", False
        ):
            raise ValueError(
                f"T5Config.prefix_adaptive_layers: got {self.model.prefix_adaptive_layers} with "
                f"{type(self.prepare.identifiers).__name__} identifiers, expected 0, or codes that "
                "are other tokens at every position: IDENTIFIERS=@ResidualQuantization(), "
                "@KMeansTree() or, with NaiveString.by_position=True, @NaiveString()"
            )
        expected = MultiviewSearch if many else Search
        for name in ("candidates", "evaluate"):
            search = getattr(self, name).search
            if not isinstance(search, expected):
                raise ValueError(
                    f"{type(getattr(self, name)).__name__}.search: got {type(search).__name__}, "
                    f"expected @{expected.__name__}() with identifiers of "
                    f"{type(self.prepare.identifiers).__name__} (Prepare.identifiers)"
                )
        if many and not self.distill.batch_size:
            raise ValueError(
                "distill/Training.batch_size: got 0, expected at least 1; 0 is for distillation "
                "with one identifier a passage"
            )
        self.generate.check_batches("generate/Training", "batch_size")
        self.distill.check_batches("distill/Training", "batch_size", "list_batch_size")
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

    @property
    def width(self) -> int:
        """Width D of the student's embeddings."""
        return self.model.emb_dim

    @property
    def systems(self) -> tuple[str, ...]:
        """The stages that train what is measured."""
        return ("generate", "control", "distill") if self.control else ("generate", "distill")

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
            "start": repr(self.initial),
            "data": (self.prepare.train_split, *texts(self.prepare)),
        }

    @property
    def stages(self) -> dict[str, Stage]:
        """All stages, in the order that they run in."""
        left_out = () if self.control else ("control",)
        stages = {
            name: Stage(settings, tuple(up for up in UPSTREAM[name] if up not in left_out))
            for name, settings in SETTINGS.items()
        }
        return with_start(stages, self.initial, "generate")


def with_start(stages: Mapping[str, Stage], initial: Any, first: str) -> dict[str, Stage]:
    """The stages and, where embeddings start from the passages, the one that makes these, before
    the one that trains first."""
    made: dict[str, Stage] = {}
    for name, stage in stages.items():
        if name == first and isinstance(initial, start.Corpus):
            made["start"] = Stage(("initial", "width"), ("prepare",))
            stage = stage._replace(upstream=(*stage.upstream, "start"))
        made[name] = stage
    return made


def texts(prepare: Any) -> tuple[Any, ...]:
    """What a mixture is made of, beside its judgements."""
    return prepare.min_relevance, prepare.shared_queries, json.dumps(describe(prepare.sources))


# Settings of Experiment that a stage reads itself, and the stages whose output it reads.
SETTINGS = {
    "prepare": ("collection", "prepare"),
    "generate": ("model", "generate", "initial"),
    "candidates": ("candidates",),
    "teach": ("teach",),
    "distill": ("distill",),
    "control": ("distill", "generate"),
    "evaluate": ("evaluate",),
}
UPSTREAM = {
    "prepare": (),
    "generate": ("prepare",),
    "candidates": ("generate",),
    "teach": ("candidates",),
    "distill": ("teach",),
    "control": ("generate",),
    "evaluate": ("distill", "control"),
}
STAGES = tuple(SETTINGS)

# Settings of a Training that only rank lists need.
_RANK_LISTS = ("objective", "list_batch_size")


def describe(value: Any) -> Any:
    """A setting as JSON: what it is and every field that has an effect on results.

    The folder that a collection lies in is left out, so that data may be moved; and a setting that
    came later (metadata "unless default"), where it is not used, so that older stages stay.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: describe(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.name != "folder" and _has_effect(f, getattr(value, f.name))
        }
        return {"is": type(value).__qualname__, **fields}
    if isinstance(value, functools.partial):
        return {
            "is": describe(value.func),
            "args": describe(value.args),
            **describe(value.keywords),
        }
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _has_effect(setting: dataclasses.Field, value: Any) -> bool:
    """Whether a setting of this value makes results other than they would be without it."""
    marked = setting.metadata.get("fingerprint", True)
    return value != setting.default if marked == "unless default" else marked


def sizes(config: T5Config) -> str:
    """The settings of a model, but for its vocabulary and prefix-adaptive layers, as JSON."""
    apart = ("vocab_size", "prefix_adaptive_layers")
    described = {k: v for k, v in describe(config).items() if k not in apart}
    return json.dumps(described, sort_keys=True)


def paths(value: Any) -> dict[str, str]:
    """Every file that the settings name: 'SentencePiece.path' -> 'spiece.model'; blank: left out.

    A file is named by a field `path` or `..._path`.
    """
    found: dict[str, str] = {}
    if isinstance(value, tuple):
        for part in value:
            found |= paths(part)
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            inside = getattr(value, f.name)
            if (f.name == "path" or f.name.endswith("_path")) and isinstance(inside, str):
                found |= {f"{type(value).__name__}.{f.name}": inside} if inside else {}
            found |= paths(inside)
    return found


def upstream(experiment: Experiment, stage: str) -> tuple[str, ...]:
    """The stages of this experiment whose output a stage reads."""
    return experiment.stages[stage].upstream


def stage_settings(
    experiment: Experiment, stage: str, files: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a stage and all stages before it were asked to do.

    files: stage -> what tells whether the files that it reads have changed.
    """
    own = {name: describe(getattr(experiment, name)) for name in experiment.stages[stage].settings}
    if stage == "control":  # the steps of distillation, not its objective
        own["distill"] = {k: v for k, v in own["distill"].items() if k not in _RANK_LISTS}
        own["distill"]["batch_size"] = experiment.distill.examples
    if files and files.get(stage):
        own["files"] = files[stage]
    return own | {up: stage_settings(experiment, up, files) for up in upstream(experiment, stage)}
