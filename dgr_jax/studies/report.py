"""The table and the plots of a study."""

from __future__ import annotations

import csv
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import evaluation, plots
from dgr_jax.analysis import beam_losses, costs
from dgr_jax.display import harmless
from dgr_jax.experiments.study import choices
from dgr_jax.model_dir import writer_lock
from dgr_jax.retrieval.kinds import TRAINED
from dgr_jax.studies import results, runner
from dgr_jax.studies.grid import Grid, shown, slug
from dgr_jax.studies.rows import Row, check_fair, interval, markdown

logger = logging.getLogger(__name__)


def of_runs(grid: Grid, *, table_only: bool) -> str:
    """Runs what has not been run, unless a table is all that is wanted, and writes the report of
    what is finished; -> which experiments failed, in lines; blank where none did."""
    with writer_lock.held(grid.folder):
        failures = [] if table_only else runner.run(grid)
        summary = f"{len(failures)} of {len(grid.runs)} experiments failed"
        try:
            if not failures or any(grid.finished()):
                write(grid)
        except ValueError as error:
            if not failures:
                raise
            failures.append(f"the others cannot be reported: {error}")
    tried = f"{summary}; the same command tries them again"
    return "\n".join([tried, *failures]) if failures else ""


def write(grid: Grid) -> None:
    """Writes table.csv, table.md and plots, and prints the table.

    Raises ValueError where no experiment is finished, or rows are not comparable.
    """
    rows = results.rows(grid)
    if not rows:
        raise ValueError(f"{grid.folder}: no experiment of the study is finished")
    check_fair(rows, grid.study.may_differ, grid.study.apart)
    baselines = [_baseline(grid, row, rows) for row in rows]
    if grid.study.baseline and not any(baselines):
        logger.warning(
            "study: no row to test against, Study.baseline %s", shown(grid.study.baseline)
        )
    table = [_cells(grid, *pair) for pair in zip(rows, baselines, strict=True)]
    write_table(grid.folder, "table", table)
    for axis, values in grid.study.axes.items():
        if all(_is_number(label) for label, _ in choices(axis, values)):
            _plot(grid, axis, rows)
    if grid.study.beams:
        _report_limits(grid)


def _report_limits(grid: Grid) -> None:
    """Writes beams.csv, beams.md and beams.png, and prints the table: what beam search of each
    width loses, and what it could find at best."""
    table, series = [], {}
    for labels, group in itertools.groupby(grid.runs, key=lambda run: run.labels):
        runs = [run for run in group if grid.state(run)["evaluate"][0]]
        runs = [run for run in runs if TRAINED[grid.experiment(run).kind].writes]
        known = grid.experiment(runs[0]).systems if runs else ()
        systems = [s for s in runs[0].systems if s in known] if runs else []
        for system in systems:
            row = {**labels, "system": system}
            asked = (system, grid.study.beams, grid.study.split, grid.study.spread)
            by_run = [beam_losses.measured(grid.experiment(r), r.folder, *asked) for r in runs]
            for losses in zip(*by_run, strict=True):
                values = [loss.values() for loss in losses]
                means = {name: interval(Row(row, values, {}), name) for name in values[0]}
                cells = {name: round(mean, 4) for name, (mean, _, _) in means.items()}
                table.append({**row, "beams": losses[0].num_beams, **cells})
                line = series.setdefault(", ".join(row.values()), [])
                line.append((float(losses[0].num_beams), means))
    if not table:
        raise ValueError("Study.beams: got no student that writes identifiers, expected one")
    write_table(grid.folder, "beams", table)
    names = list(next(iter(series.values()))[0][1])
    plots.measures_over(series, "beams", names, grid.folder / "beams.png")


def write_table(folder: Path, name: str, table: Sequence[Mapping[str, Any]]) -> None:
    """Writes NAME.csv and NAME.md of rows of equal keys, and prints the table."""
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(
            {key: harmless(v) if isinstance(v, str) else v for key, v in row.items()}
            for row in table
        )
    text = markdown(table)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _baseline(grid: Grid, row: Row, rows: Sequence[Row]) -> Row | None:
    if not grid.study.baseline:
        return None
    wanted = row.labels | grid.study.baseline
    baseline = next((other for other in rows if wanted in (other.labels, *other.again)), None)
    return None if baseline is row else baseline


def _cells(grid: Grid, row: Row, baseline: Row | None) -> dict[str, Any]:
    cells: dict[str, Any] = {**row.labels, "seeds": len(row.values)}
    for measure in grid.study.measures:
        values = row.of(measure)
        cells[measure] = round(float(values.mean()), 4)
        if len(values) > 1:
            cells[f"{measure} sd"] = round(float(values.std(ddof=1)), 4)
        if grid.study.baseline:
            a, b = (np.mean([v[measure] for v in r.values], 0) for r in (row, baseline or row))
            compared = evaluation.compare(measure, a, b)
            cells[f"{measure} p"] = "" if baseline is None else round(compared.p_value, 4)
    return cells | _cost_cells(grid, row)


def _cost_cells(grid: Grid, row: Row) -> dict[str, Any]:
    """Means over the seeds, to four digits; blank for BM25, which has no student."""
    names = [name for name in costs.COLUMNS if grid.study.costs and name != "drift"]
    names += ["drift"] * bool(grid.study.drift)
    means = {name: [cost[name] for cost in row.costs if cost] for name in names}
    return {n: float(f"{np.mean(values):.4g}") if values else "" for n, values in means.items()}


def _named(grid: Grid, axis: str, label: str) -> str:
    """A label that says what it is of: values do not, names do."""
    is_value = axis in grid.study.axes and not isinstance(grid.study.axes[axis], Mapping)
    return f"{axis.rpartition('.')[-1]} {label}" if is_value else label


def _plot(grid: Grid, axis: str, rows: Sequence[Row]) -> None:
    """One panel a measure: its mean over an axis of numbers, a line for each of the others."""
    series: dict[str, list[tuple[float, dict[str, plots.Interval]]]] = {}
    for row in rows:
        alike = [row.labels, *row.again]
        rest = [(k, v) for k, v in row.labels.items() if k != axis]
        told = (_named(grid, k, v) for k, v in rest if all(labels[k] == v for labels in alike))
        intervals = {measure: interval(row, measure) for measure in grid.study.measures}
        line = series.setdefault(", ".join(told), [])
        line.extend((float(value), intervals) for value in dict.fromkeys(o[axis] for o in alike))
    plots.measures_over(series, axis, grid.study.measures, grid.folder / f"{slug(axis)}.png")


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
