"""What differs between kinds of experiments where one is planned, by `Measured.kind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dgr_jax.capacity import dense, planning, programs
from dgr_jax.capacity.chips import Topology
from dgr_jax.capacity.planning import CapacityPlan
from dgr_jax.capacity.sizes import PreparedSizes, estimated_sizes, model_config
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.models.t5 import T5Config

Batches = tuple[T5Config, Callable[[str], Mapping[str, Any]]]


class Planner(NamedTuple):
    """How experiments of one kind are planned.

    programs: the names of what can be planned of an experiment.
    sizes: what the other functions have to know of a corpus.
    assumptions: what plans take for granted, as text.
    plan, advice, sweep: see the functions of `planning`; sweep is None where no meshes are ranked.
    batches: the transformer that is trained, and a function of a training stage that gives its
      batch in shape; None where batches are known only once the identifiers are prepared.
    """

    programs: Callable[[Any], Sequence[str]]
    sizes: Callable[[Any, CorpusSize], Any]
    assumptions: Callable[[Any, Any, Topology], str]
    plan: Callable[..., CapacityPlan]
    advice: Callable[[CapacityPlan, Any, Any], list[str]]
    sweep: Callable[..., list[tuple[Any, CapacityPlan]]] | None
    batches: Callable[[Any, Any, Any], Batches] | None


def _docid_batches(experiment: Experiment, sizes: PreparedSizes, mesh: Any) -> Batches:
    batch = lambda stage: programs.abstract_batch(stage, experiment, sizes, mesh)
    return model_config(experiment, sizes), batch


def _dense_batches(experiment: DenseExperiment, passages: int, mesh: Any) -> Batches:
    batch = lambda stage: dense.abstract_batch(experiment, mesh, stage)
    return dense.encoder(experiment).config.t5, batch


_DOCID = Planner(
    programs=programs.programs_of,
    sizes=estimated_sizes,
    assumptions=planning.assumptions,
    plan=planning.plan,
    advice=lambda plan, experiment, sizes: planning.advice(plan, experiment),
    sweep=planning.sweep,
    batches=_docid_batches,
)

PLANNERS: Mapping[str, Planner] = {
    "docid": _DOCID,
    "multiview": _DOCID._replace(batches=None),
    "dense": Planner(
        programs=lambda experiment: dense.PROGRAMS,
        sizes=lambda experiment, corpus: corpus.passages,
        assumptions=dense.assumptions,
        plan=dense.plan,
        advice=dense.advice,
        sweep=None,
        batches=_dense_batches,
    ),
}
