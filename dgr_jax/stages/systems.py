"""Opens any system of an experiment, to retrieve with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgr_jax import partitioning, processes
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.retrieval import kinds, trained
from dgr_jax.retrieval.system import Opening, System, Trained
from dgr_jax.stages.prepared import Prepared


def params(experiment: Experiment | DenseExperiment, system: str, prepared: Prepared) -> Any:
    """Parameters of a finished training stage on the experiment's mesh."""
    model = kinds.TRAINED[experiment.kind].network(experiment.sized(prepared.vocabulary.size))
    mesh = partitioning.make_mesh(experiment.mesh)
    folder = Path(experiment.model_dir) / system
    return trained.params(folder, model, mesh, experiment.mesh.rules)


def assembled(
    experiment: Experiment | DenseExperiment,
    folder: Path,
    params: Any,
    search: Any,
    prepared: Prepared,
) -> System:
    """A trained system with these parameters, ready to retrieve; equal scores by pid.

    folder: where what was made with them lies, such as vectors.
    """
    model = experiment.sized(prepared.vocabulary.size)
    mesh, rules = partitioning.make_mesh(experiment.mesh), experiment.mesh.rules
    source = Trained(folder, prepared.folder, prepared.vocabulary, model, search, mesh, rules)
    return kinds.TRAINED[experiment.kind].opened(source, params).by_pid(prepared.store.pid_of)


def open_system(
    experiment: Experiment | DenseExperiment,
    name: str,
    prepared: Prepared,
    search: Any = None,
) -> System:
    """A finished system of an experiment, ready to retrieve; equal scores by pid.

    name: one that it trains, or one that is measured beside, such as 'bm25'. search: by default
    that of the evaluate stage. A plan without a weight has that which the evaluation chose.
    """
    search = search or experiment.evaluate.search

    def opened(name: str) -> System:
        folder = Path(experiment.model_dir) / name
        return assembled(experiment, folder, params(experiment, name, prepared), search, prepared)

    untrained = experiment.untrained
    if name not in untrained:
        return opened(name)
    mesh, rules = partitioning.make_mesh(experiment.mesh), experiment.mesh.rules
    opening = Opening(
        prepared.folder, prepared.store, search.depth, mesh, rules, opened, keep=processes.first()
    )
    settings = untrained[name]
    if settings.given().get("weight", 0) is None:
        settings = kinds.settings_of(kinds.untrained(Path(experiment.model_dir))[name])
    return settings.open(opening).by_pid(prepared.store.pid_of)
