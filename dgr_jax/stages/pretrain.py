"""Stage pretrain: the student fills in spans of the passages before it learns to write identifiers.

It is a stage of experiments with `Experiment.pretrain` alone, and needs no labels and no queries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgr_jax.data.span_corruption import CorruptedTexts
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.stage import Stage, fields
from dgr_jax.models.t5 import Transformer
from dgr_jax.stages import start
from dgr_jax.stages.prepared import PREPARE, Prepared
from dgr_jax.stages.student import beginning
from dgr_jax.stages.training_run import check_batches, train


def pretrain(experiment: Experiment, folder: Path) -> None:
    """Trains on the passages from where the student starts."""
    settings = experiment.pretrain
    assert settings is not None  # as the stage is there
    prepared = Prepared.load(experiment.model_dir)
    model = Transformer(experiment.sized(prepared.vocabulary.size))
    initial = beginning(experiment, prepared, settings.seed)
    train(experiment, folder, folder.name, settings, model, texts(experiment), initial)


def texts(experiment: Any) -> CorruptedTexts:
    """What the stage learns from."""
    prepared, settings = Prepared.load(experiment.model_dir), experiment.pretrain
    contents = (passage.contents for passage in prepared.store)
    drawn = settings.batch_size, settings.seed
    return CorruptedTexts(contents, prepared.vocabulary, experiment.spans, *drawn)


STAGE = Stage(
    "pretrain",
    pretrain,
    settings=fields("model", "initial", "pretrain", "spans"),
    upstream=start.after_start(PREPARE),
    check=lambda e: check_batches(e, "pretrain", e.pretrain, "batch_size"),
    batches=texts,
)
