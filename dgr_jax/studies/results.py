"""The rows of a study: what was measured of its finished experiments."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgr_jax.analysis import costs
from dgr_jax.experiments.generative import Experiment
from dgr_jax.model_dir.measurements import read_kept, write_kept
from dgr_jax.settings import describe, fingerprint
from dgr_jax.stages.evaluate import first_test_split
from dgr_jax.studies.grid import Grid, Run
from dgr_jax.studies.rows import Row, fairness, values_of

logger = logging.getLogger(__name__)


def rows(grid: Grid) -> list[Row]:
    """The rows that are finished under every seed, each stage of a system once."""
    rows: dict[Any, Row] = {}
    for group in grid.finished():
        labels, states = group[0].labels, [grid.state(run) for run in group]
        experiment = grid.experiment(group[0])
        for run in group:
            grid.link(run)
        for system in group[0].systems:
            if system not in experiment.measured:
                continue
            trained = experiment.made_of(system)
            asked = (
                fingerprint(describe(experiment.evaluate)) if trained else _asked(grid, group[0])
            )
            untrained = experiment.untrained.get(system)
            beside = () if untrained is None else (fingerprint(describe(untrained)),)
            made_of = (asked, *beside, *(state[name][1] for name in trained for state in states))
            named = {**labels, "system": system}
            if made_of in rows:
                rows[made_of].again.append(named)
            else:
                rows[made_of] = _row(grid, named, group)
    return list(rows.values())


def _asked(grid: Grid, run: Run) -> str:
    """What BM25 is asked, and of what: the same in experiments of every kind."""
    experiment = grid.experiment(run)
    split = grid.study.split or first_test_split(experiment)
    evaluate = experiment.evaluate
    asked = (
        *(evaluate.max_queries, evaluate.min_relevance),
        *map(describe, (evaluate.baseline, evaluate.variation)),
    )
    rules = experiment.prepare.rules_of_measures
    return fingerprint([describe(experiment.collection), split, *asked, *rules])


def _row(grid: Grid, labels: dict[str, str], runs: Sequence[Run]) -> Row:
    values, fair, cost = [], {}, []
    measures = grid.study.measures
    for run in runs:
        experiment = grid.experiment(run)
        split = grid.study.split or first_test_split(experiment)
        values.append(values_of(experiment, run.folder, labels["system"], split, measures))
        fair = fairness(experiment, run.folder, labels["system"], split)
        cost.append(_costs(grid, experiment, run.folder, labels["system"]))
    return Row(labels, values, fair, cost)


def _costs(grid: Grid, experiment: Experiment, folder: Path, system: str) -> dict[str, float]:
    """What `dgr_jax.analysis.costs` measures, once: it is kept beside the runs."""
    drift = grid.study.drift if system in experiment.systems else ""
    if not experiment.made_of(system) or not (grid.study.costs or drift):
        return {}
    path = folder / "evaluate" / f"costs-{system}.json"
    asked = {"split": grid.study.split, "drift": drift}
    kept: dict[str, Any] = read_kept(path)
    if kept.get("asked") != asked:
        logger.info("study: costs of %s, %s", folder.name, system)
        measured = costs.measure(experiment, system, grid.study.split, drift)
        kept = {"asked": asked, "found": measured}
        write_kept(path, kept)
    measured = kept["found"]
    return measured if grid.study.costs else {"drift": measured["drift"]}
