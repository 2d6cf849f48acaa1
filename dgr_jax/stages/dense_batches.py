"""What a dense retriever learns from, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment, Negatives
from dgr_jax.stages import dense_teach
from dgr_jax.stages.dense_negatives import own_passages, pool_of
from dgr_jax.stages.dense_prepare import CORPUS, LABELLED, opened, queries_of, sources
from dgr_jax.training import arrays
from dgr_jax.training.lists import ListSource, Phases, TaughtLists
from dgr_jax.training.source import MixtureSource


def lists(
    experiment: DenseExperiment, settings: Training, stage: str, pool: Negatives | None
) -> ListSource:
    """Batches of a training run, with negatives from the pools of a stage."""
    tasks = {}
    for source in sources(experiment):
        tasks[source] = dict(queries_of(experiment, source))
        if pool is not None:
            tasks[source]["negatives"] = pool_of(experiment, stage, source)
    for source, own in own_passages(experiment, opened(experiment)).items():
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


def taught(experiment: DenseExperiment) -> TaughtLists:
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
