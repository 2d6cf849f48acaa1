"""How a training run searches for held-out questions, see `training.validation`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgr_jax import evaluation
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.retrieval import self_hits
from dgr_jax.stages import judged, kept_runs
from dgr_jax.stages.prepared import Prepared
from dgr_jax.training.validation import MEASURE, Validation

Opened = Callable[[Any, Any], Any]  # parameters, search -> what retrieves, such as a `Decoder`


def of(
    experiment: Experiment | DenseExperiment, settings: Training, prepared: Prepared, opened: Opened
) -> Validation | None:
    """The validation that the settings of a training run ask for; None where they ask for none."""
    if not settings.validate_every:
        return None
    measure, questions = on_held_out(experiment, prepared, opened)
    return Validation(measure, questions, settings.validate_every, settings.keep, settings.patience)


def on_held_out(
    experiment: Experiment | DenseExperiment, prepared: Prepared, opened: Opened
) -> tuple[Callable[[Any], float], int]:
    """What measures parameters, or whatever else `opened` takes, on the questions held out of
    training, and how many these are."""
    (split,) = experiment.prepare.held_out
    queries, qrels = prepared.queries(split), prepared.qrels(split)
    own = judged.self_hits(experiment.prepare, queries, prepared.store, qrels)
    search = experiment.evaluate.validation_search
    wider = search.deeper() if own else search
    texts = {qid: query.text for qid, query in queries.items()}

    def measure(params: Any) -> float:
        system = opened(params, wider).by_pid(prepared.store.pid_of)
        run: kept_runs.Run = {}
        for block in kept_runs.retrieved(system, prepared, texts):
            run |= block
        measured = evaluation.evaluate(
            self_hits.without(run, own, search.depth),
            qrels,
            (MEASURE,),
            min_relevance=experiment.prepare.min_relevance,
        )
        return measured[MEASURE]

    return measure, len(queries)


def reopened(assembled: Opened) -> Opened:
    """`assembled`, called once: its system is used again with other parameters, so that its index
    is placed on the devices once."""
    held: list[Any] = []

    def opened(params: Any, search: Any) -> Any:
        if not held:
            held.append(assembled(params, search))
        held[0].params = params
        return held[0]

    return opened


def in_passing(embedded: Callable[[Any, Any, Path], Any], folder: Path) -> Opened:
    """`embedded`, with vectors of all passages in a folder that is not kept.

    embedded: parameters, search, where the vectors go -> what retrieves.
    """
    vectors = folder / "validation.tmp"

    def opened(params: Any, search: Any) -> Any:
        shutil.rmtree(vectors, ignore_errors=True)
        vectors.mkdir(parents=True)
        try:
            return embedded(params, search, vectors)
        finally:
            shutil.rmtree(vectors)  # what is mapped stays readable

    return opened
