"""What becomes of an experiment whose collection has no judgements to learn from."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TypeVar

from dgr_jax import processes
from dgr_jax.data.rules import TRAIN_SPLIT
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.model_dir.records import read_record
from dgr_jax.stages.prepared import PREPARE

logger = logging.getLogger(__name__)

_Labelled = TypeVar("_Labelled", Experiment, DenseExperiment)


def without_labels(experiment: _Labelled) -> _Labelled:
    """The experiment as it goes on where its collection has no judgements to learn from.

    Where the settings name no split but 'train', and the collection lacks it and has a test split,
    or no queries at all, the student learns from passages and pseudo-queries. Without queries there
    is nothing to measure either. A prepare stage that is done decides where the collection is not
    at hand, and goes on where its split is gone.
    """
    first = processes.first()
    lacks_labels, has_queries = processes.agree(_lacks(experiment) if first else None)
    if not lacks_labels:
        return experiment
    prepare = experiment.prepare.without_labels()
    if not has_queries:
        prepare = dataclasses.replace(prepare, test_splits=())
    return dataclasses.replace(experiment, prepare=prepare)


def _lacks(experiment: _Labelled) -> tuple[bool, bool]:
    """Whether the experiment goes on without labels, and whether it has queries to measure on."""
    prepare, collection = experiment.prepare, experiment.collection
    if prepare.train_splits != (TRAIN_SPLIT,):
        return False, True
    record = read_record(Path(experiment.model_dir) / PREPARE)
    before = record.get("settings", {}).get("prepare", {}) if record.get("status") == "done" else {}
    lacking, has_queries = collection.lacking(prepare.splits), collection.has_queries
    if before.get("train_split") or before.get("train_splits"):
        return False, True
    if before and lacking is None:
        lacking, has_queries = (TRAIN_SPLIT,), bool(before.get("test_splits"))
    tested = lacking is not None and not set(prepare.test_splits) <= set(lacking)
    if TRAIN_SPLIT not in (lacking or ()) or has_queries and not tested:
        return False, True
    if not prepare.sources.rates().keys() - {"labelled"}:
        logger.warning(
            "there is no split %r: to learn without labels, give Sources.passages or "
            "Sources.pseudo_queries a rate, such as 0.5",
            TRAIN_SPLIT,
        )
        return False, True
    return True, has_queries
