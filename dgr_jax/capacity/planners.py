"""How the experiments of this package are planned."""

from __future__ import annotations

from typing import Any

from dgr_jax.capacity import dense, disk, planning, programs
from dgr_jax.capacity.planner import Batches, Planner
from dgr_jax.capacity.sizes import PreparedSizes, estimated_sizes, model_config
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment


def _batches(experiment: Experiment, sizes: PreparedSizes, mesh: Any) -> Batches | None:
    if experiment.prepare.identifiers.views:
        return None
    batch = lambda stage: programs.abstract_batch(stage, experiment, sizes, mesh)
    return model_config(experiment, sizes), batch


def _dense_batches(experiment: DenseExperiment, passages: int, mesh: Any) -> Batches:
    batch = lambda stage: dense.abstract_batch(experiment, mesh, stage)
    return dense.encoder(experiment).config.t5, batch


GENERATIVE = Planner(
    programs=programs.programs_of,
    sizes=estimated_sizes,
    assumptions=planning.assumptions,
    plan=planning.plan,
    advice=lambda plan, experiment, sizes: planning.advice(plan, experiment),
    sweep=planning.sweep,
    batches=_batches,
    lines=disk.generative,
)

DENSE = Planner(
    programs=lambda experiment: dense.PROGRAMS,
    sizes=lambda experiment, corpus: corpus.passages,
    assumptions=dense.assumptions,
    plan=dense.plan,
    advice=dense.advice,
    sweep=None,
    batches=_dense_batches,
    lines=disk.dense,
)
