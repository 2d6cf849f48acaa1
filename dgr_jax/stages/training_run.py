"""One training run, from a stage of an experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgr_jax import partitioning
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.pseudo_queries import PseudoQueries
from dgr_jax.training import loop
from dgr_jax.training.source import Source
from dgr_jax.training.validation import Validation


@dataclasses.dataclass(frozen=True)
class Later:
    """A source that begins where `steps` steps of another run have left it."""

    source: Source
    steps: int

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Any:
        return self.source.batch(step + self.steps, process_index, process_count)


@dataclasses.dataclass(frozen=True)
class _Together:
    """One batch of each source, by name."""

    sources: Mapping[str, Source]

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Any:
        return {k: s.batch(step, process_index, process_count) for k, s in self.sources.items()}


def train(
    experiment: Experiment | DenseExperiment | PseudoQueries,
    folder: Path,
    name: str,
    settings: Training,
    model: Any,
    batches: Source,
    start: Any = None,
    validation: Validation | None = None,
) -> None:
    """One training run of an experiment's stage."""
    loop.train(
        name=name,
        folder=folder,
        model=model,
        objective=settings.objective,
        optimizer=settings.optimizer,
        source=batches,
        mesh=partitioning.make_mesh(experiment.mesh),
        total_steps=settings.steps,
        seed=settings.seed,
        initial_params=start,
        microbatches=settings.microbatches,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=settings.keep_checkpoints,
        rules=experiment.mesh.rules,
        validation=validation,
    )
