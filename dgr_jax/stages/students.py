"""Stages generate, control and distill: training runs of the student."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgr_jax import checkpoints, kept, partitioning, processes
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import trie
from dgr_jax.dense_experiment import DenseExperiment
from dgr_jax.experiment import Experiment, Training
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.query_generator import PseudoQueries
from dgr_jax.retrieval.generative import Decoder, Search, write_student
from dgr_jax.retrieval.multiview_search import MultiviewDecoder, MultiviewSearch
from dgr_jax.stages.prepare import Prepared
from dgr_jax.stages.start import parameters as corpus_params
from dgr_jax.training import loop, packing
from dgr_jax.training.source import ArraySource, MixtureSource, Source

logger = logging.getLogger(__name__)


def generate(experiment: Experiment, folder: Path) -> None:
    """Learn to generate identifiers."""
    start = None
    if experiment.initial is not None:
        vocabulary = Prepared.load(experiment.model_dir, identifiers=False).vocabulary
        config = model_config(experiment, vocabulary.size)
        if "start" in experiment.stages:
            start = corpus_params(experiment, Transformer(config), experiment.generate.seed)
        else:
            start = initial_params(experiment, config, vocabulary)
    _train(experiment, folder, "generate", experiment.generate, start)


def initial_params(
    experiment: Experiment | DenseExperiment, config: T5Config, vocabulary: Vocabulary
) -> Any:
    """Published weights as the start of a student of these sizes."""
    if not experiment.prepare.vocabulary.path:
        logger.warning(
            "%s with a vocabulary of this corpus: its pieces are others than those of the weights; "
            "SentencePiece.path: got '', expected the vocabulary of the weights",
            type(experiment.initial).__name__,
        )
    return experiment.initial.params(
        config, pieces=vocabulary.pieces, text_tokens=vocabulary.first_view_id
    )


def control(experiment: Experiment, folder: Path) -> None:
    """Generation alone, from the checkpoint of distillation and on as many examples: the same ones
    where those are the mixture's."""
    start = _trained(experiment, "generate")
    _train(experiment, folder, "control", _control(experiment), start)


def distill(experiment: Experiment, folder: Path) -> None:
    """Rank lists and generation examples, from the generation student."""
    start = _trained(experiment, "generate")
    _train(experiment, folder, "distill", experiment.distill, start)


def _control(experiment: Experiment) -> Training:
    return dataclasses.replace(
        experiment.distill,
        objective=experiment.generate.objective,
        batch_size=experiment.distill.examples,
    )


def batches(experiment: Experiment, stage: str) -> Source:
    """What a training stage learns from, step by step."""
    if stage == "generate":
        return _mixture(experiment, experiment.generate)
    before = experiment.generate.steps
    if stage == "control":
        return Later(_mixture(experiment, _control(experiment)), before)
    settings = experiment.distill
    parts = {"rank_list": _rank_lists(experiment, settings)}
    if settings.batch_size:
        parts["generation"] = Later(_mixture(experiment, settings), before)
    return _Together(parts)


def _rank_lists(experiment: Experiment, settings: Training) -> Source:
    folder = Path(experiment.model_dir) / "teach"
    lists = ArraySource(folder / "rank_lists", settings.list_batch_size, settings.seed)
    if "identifier_views" not in lists.features:
        return lists
    tokens, views = (lists.features[f"identifier_{name}"] for name in ("tokens", "views"))
    with kept.reading(folder / "report.json"):
        counted = int(kept.read_json(folder / "report.json")["keys"].get("packed_rows", 0))
    # The teach stage of an older version did not count them.
    rows = counted or packing.rows_needed(tokens, views)
    return packing.PackedLists(lists, tokens.shape[1:], rows)


@dataclasses.dataclass(frozen=True)
class Later:
    """A source that begins where `steps` steps of another run have left it."""

    source: Source
    steps: int

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Any:
        return self.source.batch(step + self.steps, process_index, process_count)


@dataclasses.dataclass(frozen=True)
class _Together:
    """One batch of each source, by name."""

    sources: Mapping[str, Source]

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Any:
        return {k: s.batch(step, process_index, process_count) for k, s in self.sources.items()}


def _mixture(experiment: Experiment, settings: Training) -> MixtureSource:
    arrays = Path(experiment.model_dir) / "prepare" / "arrays"
    rates = experiment.prepare.sources.rates()
    return MixtureSource(
        {name: (arrays / name, rate) for name, rate in rates.items()},
        settings.batch_size,
        settings.seed,
    )


def model_config(experiment: Experiment, vocab_size: int) -> T5Config:
    """The student's sizes with the experiment's vocabulary, unless T5Config.vocab_size is set."""
    return with_vocabulary(experiment.model, vocab_size)


def with_vocabulary(config: T5Config, vocab_size: int) -> T5Config:
    """The sizes with so many tokens, unless T5Config.vocab_size is set; ValueError if too small."""
    if config.vocab_size and config.vocab_size < vocab_size:
        raise ValueError(
            f"T5Config.vocab_size: got {config.vocab_size}, expected at least {vocab_size}, the "
            "text pieces and docid codes of this experiment (0 takes just those)"
        )
    return dataclasses.replace(config, vocab_size=config.vocab_size or vocab_size)


def _train(
    experiment: Experiment,
    folder: Path,
    name: str,
    settings: Training,
    start: Any,
) -> None:
    vocabulary = Prepared.load(experiment.model_dir).vocabulary
    config = model_config(experiment, vocabulary.size)
    source = batches(experiment, name)
    train(experiment, folder, name, settings, Transformer(config), source, start)
    if processes.first():
        write_student(folder, config, experiment.evaluate.search)


def train(
    experiment: Experiment | DenseExperiment | PseudoQueries,
    folder: Path,
    name: str,
    settings: Training,
    model: Any,
    batches: Source,
    start: Any = None,
) -> None:
    """One training run of an experiment's stage."""
    loop.train(
        name=name,
        folder=folder,
        model=model,
        objective=settings.objective,
        optimizer=settings.optimizer.transformation(settings.steps),
        source=batches,
        mesh=partitioning.make_mesh(experiment.mesh),
        total_steps=settings.steps,
        seed=settings.seed,
        initial_params=start,
        microbatches=settings.microbatches,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=settings.keep_checkpoints,
        rules=experiment.mesh.rules,
    )


def _trained(experiment: Experiment, system: str) -> Any:
    """Parameters of a finished student on the experiment's mesh."""
    vocabulary = Prepared.load(experiment.model_dir).vocabulary
    model = Transformer(model_config(experiment, vocabulary.size))
    mesh = partitioning.make_mesh(experiment.mesh)
    folder = Path(experiment.model_dir) / system / "checkpoints"
    abstract = partitioning.abstract_params(model, mesh, experiment.mesh.rules)
    return checkpoints.restore_params(folder, abstract)


def decoder(
    experiment: Experiment, system: str, search: Search | MultiviewSearch, made: Prepared
) -> Decoder | MultiviewDecoder:
    """A finished student, ready to retrieve; equal scores by pid."""
    config = model_config(experiment, made.vocabulary.size)
    params, mesh = _trained(experiment, system), partitioning.make_mesh(experiment.mesh)
    rules = experiment.mesh.rules
    if made.indexes is not None:
        views = MultiviewDecoder.of(config, params, made.indexes, search, mesh, rules)
        return views.by_pid(made.store.pid_of)
    index = trie.load(made.folder / "trie")
    docids = Decoder(config, params, index, made.table, search, mesh, rules=rules)
    return docids.by_pid(made.store.pid_of)
