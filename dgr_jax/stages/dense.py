"""Stage dense: a dual encoder learns to find passages, and embeds them; see `dense_refresh`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dgr_jax import partitioning
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment, Negatives
from dgr_jax.experiments.stage import Stage, fields
from dgr_jax.models.dual_encoder import DualEncoder, start_from
from dgr_jax.retrieval import dense as retrieval
from dgr_jax.retrieval.dense import DenseSearch, Encoder
from dgr_jax.retrieval.kinds import write_student
from dgr_jax.retrieval.system import System
from dgr_jax.stages import dense_negatives, dense_teach, start, student, training_run, validation
from dgr_jax.stages.dense_negatives import own_passages, pool_of
from dgr_jax.stages.dense_prepare import (
    CORPUS,
    LABELLED,
    one_process,
    queries_of,
    sources,
)
from dgr_jax.stages.prepared import PREPARE, Prepared
from dgr_jax.stages.systems import assembled, params
from dgr_jax.training import arrays
from dgr_jax.training.lists import ListSource, Phases, TaughtLists
from dgr_jax.training.source import MixtureSource, Source


def dense(experiment: DenseExperiment, folder: Path) -> None:
    """Train the encoder, and embed all passages."""
    initial = None if experiment.initial is None else _initial(experiment)
    train_encoder(experiment, folder, experiment.train, batches(experiment), initial)


def batches(experiment: DenseExperiment) -> Source:
    """What the stage learns from, step by step."""
    if experiment.teach is not None:
        return _taught(experiment)
    pool = None if experiment.negatives.source == "in_batch" else experiment.negatives
    return drawn_lists(experiment, experiment.train, dense_negatives.STAGE.name, pool)


def drawn_lists(
    experiment: DenseExperiment, settings: Training, stage: str, pool: Negatives | None
) -> ListSource:
    """Batches of a training run, with negatives from the pools of a stage."""
    tasks = {}
    for source in sources(experiment):
        tasks[source] = dict(queries_of(experiment, source))
        if pool is not None:
            tasks[source]["negatives"] = pool_of(experiment, stage, source)
    for source, own in own_passages(experiment, Prepared.load(experiment.model_dir)).items():
        tasks[source]["own"] = own
    corpus = queries_of(experiment, CORPUS)["passage_tokens"]
    lists = experiment.lists
    return ListSource(
        Phases(list(_phases(experiment, settings, tasks))),
        corpus,
        positives=lists.positives,
        negatives=pool.count if pool else 0,
        seed=settings.seed,
        fixed=lists.fixed,
        grade_weights=lists.grade_weights,
    )


def _taught(experiment: DenseExperiment) -> TaughtLists:
    """Batches of the teacher's lists."""
    folder = Path(experiment.model_dir) / dense_teach.STAGE.name
    tasks = {source: arrays.read_arrays(folder / source) for source in sources(experiment)}
    corpus = queries_of(experiment, CORPUS)["passage_tokens"]
    return TaughtLists(Phases(list(_phases(experiment, experiment.train, tasks))), corpus)


def _phases(
    experiment: DenseExperiment, settings: Training, tasks: Mapping[str, arrays.Features]
) -> Iterator[tuple[int, MixtureSource]]:
    """(steps, mixture) of each phase of the curriculum."""
    rates, splits = experiment.prepare.sources.rates(), experiment.prepare.train_splits
    phases = experiment.lists.phases(len(splits))
    ends = np.round(np.cumsum([share for share, _ in phases]) * experiment.train.steps).astype(int)
    for (_, weights), (begin, end) in zip(phases, itertools.pairwise([0, *ends]), strict=True):
        of_split = {
            f"{LABELLED}{s}": w / sum(weights) for s, w in zip(splits, weights, strict=True)
        }
        mixed = {
            name: rates[kind] * of_split.get(name, 1.0)
            for name, kind in sources(experiment).items()
        }
        used = {name: (tasks[name], rate) for name, rate in mixed.items() if rate}
        yield int(end - begin), MixtureSource(used, settings.batch_size, settings.seed)


def _initial(experiment: DenseExperiment) -> Any:
    """Parameters with embeddings from the passages, or with the encoder of a published T5;
    projections are new."""
    vocabulary = Vocabulary.load(Path(experiment.model_dir) / PREPARE)
    config = experiment.sized(vocabulary.size)
    if start.STAGE.name in experiment.stages:
        return start.parameters(experiment, DualEncoder(config), experiment.train.seed)
    key = jax.random.key(experiment.train.seed)
    new = nn.unbox(partitioning.boxed_params(DualEncoder(config), key))
    return start_from(new, student.initial_params(experiment, config.t5, vocabulary))


def train_encoder(
    experiment: DenseExperiment, folder: Path, settings: Training, source: Source, initial: Any
) -> None:
    """Train, embed, and leave what `Retriever.load` needs."""
    prepared = Prepared.load(experiment.model_dir)
    config = experiment.sized(prepared.vocabulary.size)

    def embedded(params: Any, search: DenseSearch, at: Path) -> System:
        _embed(experiment, params, prepared, search, at)
        return assembled(experiment, at, params, search, prepared)

    in_passing = validation.in_passing(embedded, folder)
    measured = validation.of(experiment, settings, prepared, in_passing)
    model = DualEncoder(config)
    training_run.train(
        *(experiment, folder, folder.name, settings, model, source, initial, measured),
        text_tokens=prepared.vocabulary.first_view_id,
    )
    trained = params(experiment, folder.name, prepared)
    _embed(experiment, trained, prepared, search_for(experiment), folder)
    systems = experiment.systems
    write_student(folder, experiment.kind, config, experiment.evaluate.search, systems)


def _embed(
    experiment: DenseExperiment, params: Any, prepared: Prepared, search: DenseSearch, folder: Path
) -> None:
    """Writes the vectors of all passages, by the encoder with these parameters."""
    mesh, rules = partitioning.make_mesh(experiment.mesh), experiment.mesh.rules
    encoder = Encoder(experiment.sized(prepared.vocabulary.size), params, mesh, rules)
    path, encode_inputs = folder / retrieval.VECTORS, prepared.vocabulary.encode_inputs
    retrieval.embed(encoder, prepared.store, encode_inputs, path, search)


def search_for(experiment: DenseExperiment, **settings: Any) -> DenseSearch:
    """Lengths of texts as they are prepared; the rest has no effect on vectors."""
    prepare = experiment.prepare
    return DenseSearch(
        query_length=prepare.query_length, passage_length=prepare.passage_length, **settings
    )


def check(experiment: DenseExperiment, stage: str, settings: Training) -> None:
    """Raises ValueError where a training run cannot be one of the processes and devices here."""
    one_process(experiment)
    training_run.check_batches(experiment, stage, settings, "batch_size")


def _upstream(experiment: DenseExperiment) -> tuple[str, ...]:
    """The last stage that makes lists (the teacher's, the pools, or the positives), and `start`."""
    lists = PREPARE if experiment.negatives.source == "in_batch" else dense_negatives.STAGE.name
    if experiment.teach is not None:
        lists = dense_teach.STAGE.name
    return start.after_start(lists)(experiment)


STAGE = Stage(
    "dense",
    dense,
    settings=training_run.validated(fields("model", "train", "lists", "initial"), "train"),
    upstream=_upstream,
    check=lambda e: check(e, "dense", e.train),
    batches=batches,
)
