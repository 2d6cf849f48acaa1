"""The weight of the log-probability beside a plan, chosen on questions held out of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgr_jax import processes
from dgr_jax.experiments.generative import Experiment
from dgr_jax.model_dir import kept
from dgr_jax.stages import validation
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.systems import open_system
from dgr_jax.training.validation import MEASURE

WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
REPORT = "plan_weight.json"  # in the folder of an evaluation


def chosen(experiment: Any, folder: Path, prepared: Prepared) -> Any:
    """The experiment with a number for the weight of its plan: where it has None, that of WEIGHTS
    with the best RR@10 of the held-out questions, of equal ones the smallest. Leaves a report."""
    (folder / REPORT).unlink(missing_ok=True)
    if experiment.plan is None or experiment.plan.weight is not None:
        return experiment
    weighed = lambda weight: replace(experiment, plan=replace(experiment.plan, weight=weight))
    opened = _opened(weighed(WEIGHTS[0]), prepared)
    measure, questions = validation.on_held_out(experiment, prepared, opened)
    values = {weight: measure(weight) for weight in WEIGHTS}
    best = max(values, key=values.__getitem__)
    if processes.first():
        report = {"measure": MEASURE, "questions": questions, "weight": best}
        of_each = {str(weight): value for weight, value in values.items()}
        (folder / REPORT).write_text(json.dumps(report | {"values": of_each}, indent=1))
    return weighed(best)


def _opened(experiment: Experiment, prepared: Prepared) -> validation.Opened:
    """weight, search -> the student with the plan; it is opened once."""
    systems: list[Any] = []

    def opened(weight: float, search: Any) -> Any:
        if not systems:
            systems.append(open_system(experiment, "planned", prepared, search))
        (system,) = systems
        return replace(system, plan=replace(system.plan, weight=weight))

    return opened


def readable(folder: Path) -> Iterator[str]:
    """What was chosen, in a line; nothing where nothing was."""
    if (folder / REPORT).is_file():
        with kept.reading(folder / REPORT):
            report = kept.read_json(folder / REPORT)
            weight, values = report["weight"], report["values"]
            yield (
                f"planned: of {len(values)} weights {weight} was chosen by {report['measure']} "
                f"{values[str(weight)]:.4f} of {report['questions']:,} questions held out of "
                "training"
            )
