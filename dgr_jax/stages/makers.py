"""What each stage of an experiment does: stage name -> function(experiment, folder)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgr_jax import processes
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.stages import dense
from dgr_jax.stages.candidates import candidates
from dgr_jax.stages.evaluate import evaluate
from dgr_jax.stages.prepare import prepare
from dgr_jax.stages.start import start
from dgr_jax.stages.student import control, distill, generate
from dgr_jax.stages.teach import teach

MAKERS: dict[str, Callable[[Experiment, Path], None]] = {
    "prepare": prepare,
    "start": start,
    "generate": generate,
    "candidates": candidates,
    "teach": teach,
    "distill": distill,
    "control": control,
    "evaluate": evaluate,
}


def makers(experiment: Experiment | DenseExperiment) -> dict[str, Callable[[Any, Path], None]]:
    """The stages of an experiment of this kind; ValueError for one that cannot run so."""
    if not isinstance(experiment, DenseExperiment):
        return MAKERS
    if processes.count() > 1:
        raise ValueError(
            f"got {processes.count()} processes, expected one: a dense retriever is trained and "
            "searched by all devices of one process"
        )
    return dense.MAKERS
