"""What a stage of an experiment is, and how an experiment lists its stages."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def fields(*names: str) -> Callable[[Any], dict[str, Any]]:
    """The settings of an experiment that have these names."""
    return lambda experiment: {name: getattr(experiment, name) for name in names}


def after(*stages: str) -> Callable[[Any], tuple[str, ...]]:
    """The same stages before a stage, whatever the experiment."""
    return lambda experiment: stages


@dataclass(frozen=True)
class Stage:
    """A step of an experiment, with a folder of its name in MODEL_DIR. It is declared in the file
    that makes it; every function is called with the experiment.

    make: makes what lies in the folder, its second argument, or completes what an earlier call with
      the same settings began.
    settings: name -> what the stage is made from, see `settings.describe`.
    upstream: names of the stages whose output it reads.
    reads: name -> a file that it reads from elsewhere; or name -> {name: file}, which count when
      all are there, and which `check` looks for.
    check: raises FileNotFoundError, ValueError or ImportError where the stage could only fail; it
      is called before any stage starts.
    alone: one process makes it, while the others wait.
    batches: what a stage that trains learns from, step by step.
    """

    name: str
    make: Callable[[Any, Path], None]
    settings: Callable[[Any], Mapping[str, Any]]
    upstream: Callable[[Any], tuple[str, ...]] = after()
    reads: Callable[[Any], Mapping[str, Any]] = fields()
    check: Callable[[Any], None] = lambda experiment: None
    alone: bool = False
    batches: Callable[[Any], Any] | None = None


def listed(*stages: str | Stage) -> dict[str, Stage]:
    """Name -> stage, in this order; a stage of `dgr_jax.stages` is named by where it is declared,
    such as 'prepare:STAGE'. Raises ValueError where two have one name."""
    by_name = {}
    for given in stages:
        stage = pkgutil.resolve_name(f"dgr_jax.stages.{given}") if isinstance(given, str) else given
        if stage.name in by_name:
            raise ValueError(f"got two stages {stage.name!r}, expected different names")
        by_name[stage.name] = stage
    return by_name
