"""One training run, from a stage of an experiment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from dgr_jax import partitioning
from dgr_jax.experiments.common import Training
from dgr_jax.training import loop
from dgr_jax.training.packed_queries import PackedQueries
from dgr_jax.training.source import Source
from dgr_jax.training.validation import Validation

Settings = Callable[[Any], Mapping[str, Any]]  # see `Stage.settings`


class Meshed(Protocol):
    """An experiment of any kind, as far as a training run is concerned."""

    @property
    def mesh(self) -> partitioning.Mesh:
        """How devices share the work."""


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


def validated(settings: Settings, *trained: str) -> Settings:
    """The settings of a training stage and, where one of its `trained` asks for validation, also
    the search for the questions that are held out."""

    def of(experiment: Any) -> Mapping[str, Any]:
        own = settings(experiment)
        if not any(getattr(experiment, name).validate_every for name in trained):
            return own
        return {**own, "validation_search": experiment.evaluate.validation_search}

    return of


def check_batches(experiment: Any, stage: str, settings: Training, *sizes: str) -> None:
    """Raises ValueError where the devices that are here cannot share these batches of a stage."""
    mesh = partitioning.mesh_sizes(experiment.mesh, jax.device_count())
    shards = math.prod(mesh[axis] for axis in partitioning.BATCH_AXES)
    settings.check_shards(stage, shards, *sizes)


def train(
    experiment: Meshed,
    folder: Path,
    name: str,
    settings: Training,
    model: Any,
    batches: Source,
    start: Any = None,
    validation: Validation | None = None,
    pack_queries: bool = False,
) -> None:
    """One training run of an experiment's stage. pack_queries: see `Training`, where the objective
    encodes queries by `list_decoding`."""
    mesh = partitioning.make_mesh(experiment.mesh)
    if pack_queries:
        shards = partitioning.batch_shards(mesh)
        batches = PackedQueries(batches, shards=shards, microbatches=settings.microbatches)
    loop.train(
        name=name,
        folder=folder,
        model=model,
        objective=settings.objective,
        optimizer=settings.optimizer,
        source=batches,
        mesh=mesh,
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
