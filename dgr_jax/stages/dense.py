"""Stage dense: a dual encoder learns to find passages, and embeds them; see `dense_refresh`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from dgr_jax import checkpoints, partitioning
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.stage import Stage, fields
from dgr_jax.models.dual_encoder import DualEncoder, DualEncoderConfig, start_from
from dgr_jax.retrieval import dense as retrieval
from dgr_jax.retrieval.dense import DenseSearch, Encoder, Searcher
from dgr_jax.retrieval.retriever import write_student
from dgr_jax.stages import dense_batches, dense_negatives, dense_teach, student, training_run
from dgr_jax.stages.dense_prepare import one_process, opened
from dgr_jax.stages.prepared import PREPARE
from dgr_jax.training.source import Source


def dense(experiment: DenseExperiment, folder: Path) -> None:
    """Train the encoder, and embed all passages."""
    start = None
    if experiment.initial is not None:
        start = _initial(experiment)
    train_encoder(experiment, folder, experiment.train, batches(experiment), start)


def batches(experiment: DenseExperiment) -> Source:
    """What the stage learns from, step by step."""
    if experiment.teach is not None:
        return dense_batches.taught(experiment)
    pool = None if experiment.negatives.source == "in_batch" else experiment.negatives
    return dense_batches.lists(experiment, experiment.train, dense_negatives.STAGE.name, pool)


def encoder_config(experiment: DenseExperiment, vocab_size: int) -> DualEncoderConfig:
    """The encoder's sizes with the experiment's vocabulary."""
    model = experiment.model
    return dataclasses.replace(model, t5=training_run.with_vocabulary(model.t5, vocab_size))


def _config(experiment: DenseExperiment) -> DualEncoderConfig:
    vocabulary = Vocabulary.load(Path(experiment.model_dir) / PREPARE)
    return encoder_config(experiment, vocabulary.size)


def _initial(experiment: DenseExperiment) -> Any:
    """Parameters with the encoder of a published T5; projections are new."""
    vocabulary = Vocabulary.load(Path(experiment.model_dir) / PREPARE)
    config = encoder_config(experiment, vocabulary.size)
    key = jax.random.key(experiment.train.seed)
    new = nn.unbox(partitioning.boxed_params(DualEncoder(config), key))
    return start_from(new, student.initial_params(experiment, config.t5, vocabulary))


def train_encoder(
    experiment: DenseExperiment, folder: Path, settings: Training, source: Source, start: Any
) -> None:
    """Train, embed, and leave what `Retriever.load` needs."""
    config = _config(experiment)
    model = DualEncoder(config)
    training_run.train(experiment, folder, folder.name, settings, model, source, start)
    made = opened(experiment)
    retrieval.embed(
        _encoder(experiment, folder.name),
        made.store,
        made.vocabulary.encode_inputs,
        folder / retrieval.VECTORS,
        search_for(experiment),
    )
    write_student(folder, config, experiment.evaluate.search)


def search_for(experiment: DenseExperiment, **settings: Any) -> DenseSearch:
    """Lengths of texts as they are prepared; the rest has no effect on vectors."""
    prepare = experiment.prepare
    return DenseSearch(
        query_length=prepare.query_length, passage_length=prepare.passage_length, **settings
    )


def trained(experiment: DenseExperiment, system: str) -> Any:
    """Parameters of a finished encoder on the experiment's mesh."""
    mesh = partitioning.make_mesh(experiment.mesh)
    model, rules = DualEncoder(_config(experiment)), experiment.mesh.rules
    abstract = partitioning.abstract_params(model, mesh, rules)
    folder = Path(experiment.model_dir) / system / "checkpoints"
    return checkpoints.restore_params(folder, abstract)


def _encoder(experiment: DenseExperiment, system: str) -> Encoder:
    mesh = partitioning.make_mesh(experiment.mesh)
    params = trained(experiment, system)
    return Encoder(_config(experiment), params, mesh, experiment.mesh.rules)


def searcher(experiment: DenseExperiment, system: str, search: DenseSearch) -> Searcher:
    """A finished encoder and its passages, ready to retrieve."""
    encoder = _encoder(experiment, system)
    path = Path(experiment.model_dir) / system / retrieval.VECTORS
    index = retrieval.open_index(path, search.index, encoder.mesh)
    return Searcher(encoder, index, search)


def check(experiment: DenseExperiment, stage: str, settings: Training) -> None:
    """Raises ValueError where a training run cannot be one of the processes and devices here."""
    one_process(experiment)
    training_run.check_batches(experiment, stage, settings, "batch_size")


def _upstream(experiment: DenseExperiment) -> tuple[str, ...]:
    """The last stage that makes lists: those of the teacher, the pools, or the positives."""
    if experiment.teach is not None:
        return (dense_teach.STAGE.name,)
    is_alone = experiment.negatives.source == "in_batch"
    return (PREPARE if is_alone else dense_negatives.STAGE.name,)


STAGE = Stage(
    "dense",
    dense,
    settings=fields("model", "train", "lists", "initial"),
    upstream=_upstream,
    check=lambda e: check(e, "dense", e.train),
    batches=batches,
)
