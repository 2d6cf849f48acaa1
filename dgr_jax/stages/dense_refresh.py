"""Stages mine and refresh: the encoder trains on, with the negatives that it finds itself."""

from __future__ import annotations

from pathlib import Path

from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.stages import dense
from dgr_jax.stages.dense_negatives import finder, own_passages, write_pools
from dgr_jax.stages.dense_prepare import one_process, queries_of, sources
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.systems import open_system, params
from dgr_jax.stages.training_run import Later, validated
from dgr_jax.training.source import Source


def mine(experiment: DenseExperiment, folder: Path) -> None:
    """Writes pools as `negatives` does, of what the trained encoder finds."""
    settings = experiment.mined
    prepared = Prepared.load(experiment.model_dir)
    own = own_passages(experiment, prepared)
    find = finder(settings, prepared, deeper=bool(own)) if settings.source != "own" else None
    if find is None:
        depth = settings.skip + settings.depth + _most_positives(experiment) + bool(own)
        depth = min(depth, len(prepared.store))
        search = dense.search_for(experiment, depth=depth)
        student = open_system(experiment, dense.STAGE.name, prepared, search)
        find = lambda tokens: student.passages(tokens)[0]
    write_pools(experiment, folder, settings, find, own)


def _most_positives(experiment: DenseExperiment) -> int:
    """The most positives that a query has: so many passages of what it finds may be left out."""
    return max(
        queries_of(experiment, source)["positives"].shape[1] for source in sources(experiment)
    )


def refresh(experiment: DenseExperiment, folder: Path) -> None:
    """Train on from the trained encoder with the mined negatives, and embed all passages."""
    assert experiment.refresh is not None  # as the stage is there
    prepared = Prepared.load(experiment.model_dir)
    initial = params(experiment, dense.STAGE.name, prepared)
    dense.train_encoder(experiment, folder, experiment.refresh, batches(experiment), initial)


def batches(experiment: DenseExperiment) -> Source:
    """What the stage learns from, step by step."""
    settings, mined = experiment.refresh, experiment.mined
    assert settings is not None
    lists = dense.drawn_lists(experiment, settings, MINE.name, mined)
    return Later(lists, experiment.train.steps)


MINE = Stage(
    "mine", mine, settings=fields("mined"), upstream=after(dense.STAGE.name), check=one_process
)
REFRESH = Stage(
    "refresh",
    refresh,
    settings=validated(fields("refresh", "lists"), "refresh"),
    upstream=after(MINE.name),
    check=lambda e: dense.check(e, "refresh", e.refresh),
    batches=batches,
)
