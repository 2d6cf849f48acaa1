"""The table and the plot of a study of a corpus that grows."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from dgr_jax import plots
from dgr_jax.display import harmless
from dgr_jax.model_dir import writer_lock
from dgr_jax.studies import forgetting
from dgr_jax.studies.living import Living, Way
from dgr_jax.studies.report import write_table

Values = list[dict[str, np.ndarray]]  # of each seed: measure -> f64 [steps, parts]


def run(living: Living, dry_run: bool, table_only: bool) -> None:
    """Makes and measures what is outstanding, unless it is only to be listed or told, and writes
    the tables."""
    living.check()
    if dry_run:
        for seed, way, step in living.outstanding():
            sys.stdout.write(harmless(f"seed {seed}, step {step}: {way.name}\n"))
        return
    with writer_lock.held(living.folder):
        if not table_only:
            living.run()
        write(living)


def write(living: Living) -> None:
    """Writes table.csv and table.md (AP, BWT and FWT, means over the seeds), parts.csv and parts.md
    (every part after every step) and steps.png, and prints the tables.

    Raises ValueError where no way is measured under every seed.
    """
    seeds, table, parts = living.study.seeds, [], []
    series: dict[str, list[tuple[float, dict[str, plots.Interval]]]] = {}
    left = {(seed, way) for seed, way, _ in living.outstanding()}
    for way in living.ways():
        if any((seed, way) in left for seed in seeds):
            continue
        values = [living.values(seed, way) for seed in seeds]
        table.append(_cells(living, way, values))
        parts += _parts(living, way, values)
        series[way.name] = _points(living, way, values)
    if not table:
        raise ValueError(f"{living.folder}: nothing is measured under every seed yet")
    write_table(living.folder, "parts", parts)
    write_table(living.folder, "table", table)
    axis, measures = "parts added", living.study.measures
    plots.measures_over(series, axis, measures, living.folder / "steps.png")


def _cells(living: Living, way: Way, values: Values) -> dict[str, Any]:
    cells: dict[str, Any] = {"answers": way.name, "seeds": len(values)}
    for measure in living.study.measures:
        of_seeds = [value[measure] for value in values]
        for name, number in (
            ("AP", forgetting.average),
            ("BWT", forgetting.forgetting),
            ("FWT", forgetting.learning),
            ("added", lambda value: float(np.mean(value[-1, 1:]))),
        ):
            cells[f"{measure} {name}"] = _mean([number(value) for value in of_seeds])
    seeds = living.study.seeds
    flops = [living.flops(seed, way) for seed in seeds]
    later = [of[way.steps[0] == 0 :] for of in flops]
    cells["TFLOP a step"] = _mean([float(np.mean(of)) / 1e12 for of in later])
    return cells


def _parts(living: Living, way: Way, values: Values) -> list[dict[str, Any]]:
    """A row for each step: the first measure of every part."""
    measure = living.study.measures[0]
    mean = np.mean([value[measure] for value in values], axis=0)
    return [
        {
            "answers": way.name,
            "parts added": step,
            **{f"{measure} part {part}": _mean([of]) for part, of in enumerate(mean[step])},
        }
        for step in way.steps
    ]


def _points(
    living: Living, way: Way, values: Values
) -> list[tuple[float, dict[str, plots.Interval]]]:
    """AP after each step: the mean over the seeds, the least and the greatest."""
    points = []
    for step in way.steps:
        intervals = {}
        for measure in living.study.measures:
            of_seeds = [forgetting.average(value[measure], step) for value in values]
            intervals[measure] = float(np.mean(of_seeds)), min(of_seeds), max(of_seeds)
        points.append((float(step), intervals))
    return points


def _mean(values: list[float]) -> float | str:
    """The mean, to four digits; blank where one is missing."""
    return "" if np.isnan(values).any() else float(f"{np.mean(values):.4g}")
