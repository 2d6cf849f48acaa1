"""Rows of a study: their values, whether they may be compared, and how a table shows them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import evaluation
from dgr_jax.analysis import query_values
from dgr_jax.corpora import trec
from dgr_jax.display import markdown_cell
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.study import FAIR
from dgr_jax.model_dir import kept
from dgr_jax.settings import describe
from dgr_jax.stages.evaluate import chosen_queries
from dgr_jax.stages.prepared import Prepared

Values = Mapping[str, np.ndarray]  # measure -> value of each query


@dataclass(frozen=True)
class Row:
    """One system of one point of the grid, over all seeds.

    again: labels of other points whose stages are the same, such as those of a control.
    """

    labels: dict[str, str]
    values: Sequence[Values]
    fair: dict[str, Any]
    costs: Sequence[Mapping[str, float]] = field(default_factory=list)
    again: list[dict[str, str]] = field(default_factory=list)

    def of(self, measure: str) -> np.ndarray:
        """f64 [seeds]: the mean over the queries."""
        return np.array([values[measure].mean() for values in self.values])


def interval(row: Row, measure: str) -> tuple[float, float, float]:
    """(mean, low, high): 95% of the bootstrap over queries, each with its mean over the seeds."""
    return query_values.interval(np.mean([v[measure] for v in row.values], axis=0))


def values_of(
    experiment: Experiment, folder: Path, system: str, split: str, measures: Sequence[str]
) -> dict[str, np.ndarray]:
    """Every measure of each query, in the order of the qids."""
    prepared = Prepared.load(folder)
    run = trec.run_in_memory(trec.runs(kept.opened(folder / "evaluate" / f"{system}.{split}.trec")))
    least, grades = experiment.evaluate.min_relevance, prepared.qrels(split)
    if experiment.evaluate.max_queries:
        grades = {qid: grades[qid] for qid in chosen_queries(experiment, prepared, split)}
    by_measure = evaluation.per_query(run, grades, measures, min_relevance=least)
    return {name: np.array([by_measure[name][qid] for qid in sorted(grades)]) for name in measures}


def fairness(experiment: Experiment, folder: Path, system: str, split: str) -> dict[str, Any]:
    """What rows of a table must have in common, see Study.may_differ."""
    collection = json.dumps(describe(experiment.collection), sort_keys=True)
    evaluate = experiment.evaluate
    measured = split, evaluate.max_queries, evaluate.variation, collection
    fair = {"split": (*measured, *experiment.prepare.rules_of_measures)}
    made_of = experiment.made_of(system)
    if not made_of:
        return fair
    prepared = folder / "prepare"
    vocabulary = kept.read_json(prepared / "vocabulary.json")
    model = kept.opened(prepared / "spiece.model")
    pieces = hashlib.sha256(model.read_bytes()).hexdigest()[:8]
    return (
        fair | experiment.compared(made_of[0]) | {"vocabulary": (vocabulary["text_size"], pieces)}
    )


def check_fair(
    rows: Sequence[Row], may_differ: Sequence[str] = (), apart: Sequence[str] = ()
) -> None:
    """Raises ValueError where rows to be compared differ in what nobody asked to vary; those of
    other labels of the axes `apart` are not compared."""
    groups: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.labels.get(axis) for axis in apart), []).append(row)
    for group in groups.values():
        _check_group(group, may_differ)


def _check_group(rows: Sequence[Row], may_differ: Sequence[str]) -> None:
    for name in FAIR:
        labels_of: dict[Any, dict[str, str]] = {}
        for row in rows:
            if name in row.fair:
                labels_of.setdefault(row.fair[name], row.labels)
        if len(labels_of) > 1 and name not in may_differ:
            (a, first), (b, second) = list(labels_of.items())[:2]
            raise ValueError(
                f"Study.may_differ: the {name} of {first} is {a}, that of {second} is {b}; "
                f"expected the same in all rows, or {name!r} among what may differ"
            )


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(table[0])
    rows = [names, *([row[name] for name in names] for row in table)]
    lines = [[markdown_cell(value) for value in row] for row in rows]
    lines.insert(1, ["---"] * len(names))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
