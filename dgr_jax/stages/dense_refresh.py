"""Stage refresh: the encoder trains on, with the negatives that it has found itself."""

from __future__ import annotations

from pathlib import Path

from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.stages import dense, dense_batches, dense_mine
from dgr_jax.stages.training_run import Later
from dgr_jax.training.source import Source


def refresh(experiment: DenseExperiment, folder: Path) -> None:
    """Train on from the trained encoder with the mined negatives, and embed all passages."""
    start = dense.trained(experiment, dense.STAGE.name)
    dense.train_encoder(experiment, folder, experiment.refresh, batches(experiment), start)


def batches(experiment: DenseExperiment) -> Source:
    """What the stage learns from, step by step."""
    mined = experiment.mined
    lists = dense_batches.lists(experiment, experiment.refresh, dense_mine.STAGE.name, mined)
    return Later(lists, experiment.train.steps)


STAGE = Stage(
    "refresh",
    refresh,
    settings=fields("refresh", "lists"),
    upstream=after(dense_mine.STAGE.name),
    check=lambda e: dense.check(e, "refresh", e.refresh),
    batches=batches,
)
