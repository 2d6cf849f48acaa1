"""Stage evaluate of a dense retriever."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.stage import fields
from dgr_jax.stages import evaluate as generative
from dgr_jax.stages.dense import searcher
from dgr_jax.stages.dense_prepare import one_process, opened
from dgr_jax.stages.evaluate import measure, search_of
from dgr_jax.stages.measures import check_measures


def evaluate(experiment: DenseExperiment, folder: Path) -> None:
    """Measures the encoders as students are measured: see `stages.evaluate.measure`."""
    made = opened(experiment)
    search, order = search_of(experiment, made), made.store.pid_of
    measure(experiment, folder, made, lambda s: searcher(experiment, s, search).by_pid(order))


def check(experiment: DenseExperiment) -> None:
    """Raises ValueError where evaluation could only fail."""
    one_process(experiment)
    check_measures(experiment)


STAGE = dataclasses.replace(
    generative.STAGE,
    make=evaluate,
    settings=fields("evaluate"),
    upstream=lambda e: e.systems,
    check=check,
)
