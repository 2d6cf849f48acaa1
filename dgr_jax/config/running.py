"""Runs stages of the experiment that the flags of a command describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Mistake


def run(
    args: argparse.Namespace,
    bindings: Sequence[str],
    stages: Sequence[str] | None = None,
    *,
    kinds: Sequence[str] = gin_files.EXPERIMENTS,
    hint: str = "",
    **more: Any,
) -> Any:
    """Runs these stages (None: all), and those that they read; -> the experiment.

    kinds: the components that it may be. more: see `pipeline.run`. Raises Mistake with the hint,
    where there is one, for an experiment that lacks a stage.
    """
    experiment = gin_files.load_experiment(args, bindings, kinds)
    if hint and not set(stages or ()) <= experiment.stages.keys():
        raise Mistake(f"{hint} (its stages: {', '.join(experiment.stages)})")

    from dgr_jax.stages import pipeline

    pipeline.run(experiment, stages, named=cli.named(bindings), **more)
    return experiment
