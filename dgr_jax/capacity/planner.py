"""The contract of what can be planned: an experiment names its Planner, and no caller asks which
kind of experiment it has."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dgr_jax.capacity.chips import Topology
from dgr_jax.capacity.planning import CapacityPlan
from dgr_jax.experiments.common import Measured
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.models.t5 import T5Config

Batches = tuple[T5Config, Callable[[str], Mapping[str, Any]]]


class Line(NamedTuple):
    """What a stage leaves: bytes on disk, and those that every device that searches holds of it."""

    stage: str
    what: str
    size: float
    on_device: float = 0.0


class Planner(NamedTuple):
    """How experiments of one kind are planned.

    programs: the names of what can be planned of an experiment.
    sizes: what the other functions have to know of a corpus.
    assumptions: what plans take for granted, as text.
    plan, advice, sweep: see the functions of `planning`; sweep is None where no meshes are ranked.
    batches: the transformer that is trained, and a function of a training stage that gives its
      batch in shape; None where batches are known only once the identifiers are prepared.
    lines: what the stages leave, the passages apart.
    """

    programs: Callable[[Any], Sequence[str]]
    sizes: Callable[[Any, CorpusSize], Any]
    assumptions: Callable[[Any, Any, Topology], str]
    plan: Callable[..., CapacityPlan]
    advice: Callable[[CapacityPlan, Any, Any], list[str]]
    sweep: Callable[..., list[tuple[Any, CapacityPlan]]] | None
    batches: Callable[[Any, Any, Any], Batches | None]
    lines: Callable[[Any, CorpusSize], Iterator[Line]]


def planner_of(experiment: Measured) -> Planner:
    """The planner that an experiment names. Raises ValueError for one that names none."""
    planner = experiment.planner
    if isinstance(planner, Planner):
        return planner
    if not planner:
        raise ValueError(
            f"{type(experiment).__name__}.planner: got {planner!r}, expected a Planner, or the "
            "name of one in dgr_jax.capacity"
        )
    return pkgutil.resolve_name(f"dgr_jax.capacity.{planner}")
