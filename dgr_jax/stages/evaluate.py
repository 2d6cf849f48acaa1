"""Stage evaluate: runs, measures, comparisons and plots of every system on the test splits."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import display, evaluation, plots, processes
from dgr_jax.corpora import store
from dgr_jax.corpora.types import Query
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.stage import Stage
from dgr_jax.model_dir import kept
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.planned import check_corpus
from dgr_jax.retrieval.system import System
from dgr_jax.stages import judged, kept_runs, plan_weight
from dgr_jax.stages.dense_prepare import one_process
from dgr_jax.stages.measures import check_measures
from dgr_jax.stages.prepared import PREPARE, Prepared
from dgr_jax.stages.systems import open_system
from dgr_jax.training import metrics, validation

logger = logging.getLogger(__name__)

Values = dict[str, dict[str, float]]  # measure -> qid -> value
COMPARED = ("Success@1", "Success@10", "RR@10")


def evaluate(experiment: Experiment | DenseExperiment, folder: Path) -> None:
    """Measures every system; see `measure`."""
    prepared = Prepared.load(experiment.model_dir)
    _keep_training_queries(experiment, prepared)
    experiment = plan_weight.chosen(experiment, folder, prepared)
    search = search_of(experiment, prepared)
    measure(
        experiment, folder, prepared, lambda name: open_system(experiment, name, prepared, search)
    )


def _keep_training_queries(experiment: Experiment | DenseExperiment, prepared: Prepared) -> None:
    """Keeps them where an older version prepared the passages without."""
    if processes.first() and not (prepared.store.folder / store.QUERIES).is_file():
        judged.keep_training_queries(prepared.folder, experiment.prepare)
    processes.wait()


def search_of(experiment: Experiment | DenseExperiment, prepared: Prepared) -> Any:
    """The search of the evaluate stage. It goes one passage deeper where a query is itself a
    passage, which it must not find."""
    own = any(
        _own(experiment, prepared, split, chosen_queries(experiment, prepared, split))
        for split in experiment.prepare.test_splits
    )
    return experiment.evaluate.search.deeper() if own else experiment.evaluate.search


def _own(
    experiment: Experiment | DenseExperiment, prepared: Prepared, split: str, qids: Iterable[str]
) -> frozenset[str]:
    """The queries that must not find the passage of their id."""
    return judged.self_hits(experiment.prepare, qids, prepared.store, prepared.qrels(split))


def measure(
    experiment: Experiment | DenseExperiment,
    folder: Path,
    prepared: Prepared,
    opened: Callable[[str], System],
) -> None:
    """Writes <system>.<split>.trec, metrics.json (system -> split -> measure), comparisons.json,
    success_at_k.png and training_curves.png, and prints the table.

    One system is in memory at a time, and of its runs one block of queries. Several processes
    search together; the first does the rest. Runs are kept, see `stages.kept_runs`: what lies in
    the stage's folder is a copy, for people.

    opened: opens a system by its name, to search as `search_of` says.
    """
    splits, evaluate = experiment.prepare.test_splits, experiment.evaluate
    if not splits:
        logger.info("evaluate: there are no test queries (Prepare.test_splits): nothing to measure")
    queries = {split: chosen_queries(experiment, prepared, split) for split in splits}
    own = {split: _own(experiment, prepared, split, asked) for split, asked in queries.items()}
    for split, asked in queries.items():
        if not asked:
            raise ValueError(f"split {split!r} has no query to measure on; expected one or more")
        evaluation.require_answers(evaluate.measures, asked.values(), split)
    if processes.first():
        model_dir, untrained = Path(experiment.model_dir), experiment.untrained.values()
        kinds.write_untrained(model_dir, untrained, evaluate.search.depth)
    values: dict[str, dict[str, Values]] = {}
    for system in experiment.measured:
        runs = {s: kept_runs.path_of(experiment, system, s, bool(own[s])) for s in splits}
        kept_runs.search(experiment, prepared, system, opened, queries, runs, own)
        if processes.first():
            values[system] = {
                split: _measure(experiment, prepared, queries[split], split, path)
                for split, path in runs.items()
            }
            for split, path in runs.items():
                _copy(path, folder / f"{system}.{split}.trec")
    if processes.first():
        _report(experiment, folder, values)


def _report(
    experiment: Experiment | DenseExperiment, folder: Path, values: dict[str, dict[str, Values]]
) -> None:
    """Writes and prints what was measured: system -> split -> its values."""
    splits, names = experiment.prepare.test_splits, experiment.evaluate.measures
    measured = {
        system: {
            split: evaluation.means(
                {name: by_measure[name] for name in names if name in by_measure}
            )
            for split, by_measure in by_split.items()
        }
        for system, by_split in values.items()
    }
    _write_json(folder / "metrics.json", measured)
    compared = {split: _compare(values, split, experiment.pairs) for split in splits}
    described = {
        split: [{"systems": pair, **asdict(c)} for pair, c in comparisons]
        for split, comparisons in compared.items()
    }
    _write_json(folder / "comparisons.json", described)
    first = {s: of_splits[splits[0]] if splits else {} for s, of_splits in values.items()}
    _plot(experiment, folder, first)
    _show(measured, compared)
    for line in (*_choices(experiment), *plan_weight.readable(folder)):
        display.wide_console().print(line, soft_wrap=True)


def chosen_queries(
    experiment: Experiment | DenseExperiment, prepared: Prepared, split: str
) -> dict[str, Query]:
    """qid -> query, at most Evaluate.max_queries of them, as Evaluate.variation has them."""
    queries, settings = prepared.queries(split), experiment.evaluate
    qids = chosen_of(list(queries), settings.max_queries, settings.seed)
    return {qid: settings.variation.of(queries[qid]) for qid in qids}


def chosen_of(qids: list[str], most: int | None, seed: int) -> list[str]:
    """At most so many of the qids, in their order."""
    if not most or most >= len(qids):
        return qids
    keep = np.sort(np.random.default_rng(seed).choice(len(qids), most, replace=False))
    return [qids[i] for i in keep]


def first_test_split(experiment: Experiment | DenseExperiment) -> str:
    """The first split to measure on. Raises ValueError where there is none."""
    for split in experiment.prepare.test_splits:
        return split
    raise ValueError(
        f"{experiment.model_dir} has no test split to measure on "
        f"({type(experiment.prepare).__name__}.test_splits)"
    )


def _measure(
    experiment: Experiment | DenseExperiment,
    prepared: Prepared,
    queries: dict[str, Query],
    split: str,
    path: Path,
) -> Values:
    """Every measure of a run that is asked for, compared or plotted. A split without judgements has
    only measures of answers."""
    settings, qrels = experiment.evaluate, prepared.qrels(split)
    names = dict.fromkeys((*settings.measures, *COMPARED, *_plotted(settings.search.depth)))
    of_answers = [name for name in names if evaluation.answer_cutoff(name) is not None]
    of_judgements = [name for name in names if name not in of_answers] if qrels else []

    def text(pid: str) -> str:
        return prepared.store[prepared.store.index_of(pid)].text

    values: Values = {}
    lacking = 0
    for run in kept_runs.read(path, queries):
        of_run: Values = {}
        lacking += sum(not passages for passages in run.values())
        if of_answers:
            asked = [queries[qid] for qid in run]
            of_run |= evaluation.answer_hits(run, asked, text, of_answers)
        if of_judgements:
            grades = {qid: qrels[qid] for qid in run}
            of_run |= evaluation.per_query(
                run, grades, of_judgements, min_relevance=settings.min_relevance
            )
        for name, by_query in of_run.items():
            values.setdefault(name, {}).update(by_query)
    if lacking:
        logger.warning(
            "evaluate: %s has no passages for %s of %s queries of split %r, which count as 0",
            *(path.name.partition(".")[0], f"{lacking:,}", f"{len(queries):,}", split),
        )
    return values


def _copy(run: Path, shown: Path) -> None:
    """Copies a run for people to read. Older versions made the shown file another name of the kept
    run, so that it is removed, and not written into."""
    shown.unlink(missing_ok=True)
    shutil.copyfile(run, shown)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _compare(
    values: dict[str, dict[str, Values]], split: str, pairs: Iterable[tuple[str, str]]
) -> list[tuple[str, evaluation.Comparison]]:
    """(systems, comparison) with a paired test over the queries, for every pair of which both are
    measured, by COMPARED and every measure of answers."""
    return [
        (
            f"{a} against {b}",
            evaluation.compare(
                name, *([*values[system][split][name].values()] for system in (a, b))
            ),
        )
        for a, b in pairs
        if a in values and b in values
        for name in values[a][split]
        if name in COMPARED or evaluation.answer_cutoff(name) is not None
    ]


def _plotted(depth: int) -> dict[str, int]:
    """Measure -> k of the points of the plot."""
    return {f"Success@{k}": k for k in (1, 5, 10, 20, 50, 100) if k <= depth}


def _plot(
    experiment: Experiment | DenseExperiment, folder: Path, values: dict[str, Values]
) -> None:
    """Draws both plots. values: system -> the values of the first test split."""
    points = _plotted(experiment.evaluate.search.depth)
    curves = {}
    for system, by_measure in values.items():
        means = evaluation.means({name: by_measure[name] for name in points if name in by_measure})
        curves[system] = {points[name]: mean for name, mean in means.items()}
    if any(curves.values()):  # the split has judgements
        title = f"Success@k, {first_test_split(experiment)}"
        plots.success_at_k(curves, folder / "success_at_k.png", title=title)
    model_dir = Path(experiment.model_dir)
    # What is not trained has no curve, but a colour: the others have theirs in both plots.
    trained = experiment.systems
    rows = {
        s: metrics.read_jsonl(model_dir / s / "metrics.jsonl") if s in trained else ()
        for s in values
    }
    plots.training_curves(rows, folder / "training_curves.png")


def _show(measured: Any, compared: Any) -> None:
    console = display.wide_console()
    for split, comparisons in compared.items():
        by_system = {system: by_split[split] for system, by_split in measured.items()}
        console.print(evaluation.measures_table(by_system, title=split))
        shown = {"RR@10", *[c.measure for _, c in comparisons if c.measure not in COMPARED][:1]}
        for pair, comparison in comparisons:
            if comparison.measure in shown:
                line = f"{pair.replace(' against', ' and')}: {comparison}"
                console.print(line, soft_wrap=True)


def _choices(experiment: Experiment | DenseExperiment) -> Iterator[str]:
    """What was chosen of each training run that is measured, and on how many questions."""
    stages = dict.fromkeys(s for system in experiment.systems for s in experiment.training(system))
    for stage in stages:
        if choice := validation.readable(Path(experiment.model_dir) / stage):
            yield f"{stage}: {choice}"


def _settings(experiment: Experiment | DenseExperiment) -> dict[str, Any]:
    """The settings of the stage. A plan that is None is left out, so that older stages stay."""
    plan = {} if experiment.plan is None else {"plan": experiment.plan}
    return {"evaluate": experiment.evaluate, **plan}


def _upstream(experiment: Experiment | DenseExperiment) -> tuple[str, ...]:
    """The stages of what is measured; `generate` comes before the others anyway."""
    return tuple(system for system in experiment.systems if system != "generate")


def _check(experiment: Experiment | DenseExperiment) -> None:
    """Raises ValueError where measures cannot be taken, or the prepared corpus is too small for the
    plan."""
    if not kinds.TRAINED[experiment.kind].together:
        one_process(experiment)
    check_measures(experiment)
    report = Path(experiment.model_dir) / PREPARE / "report.json"
    if experiment.plan is not None and report.is_file():
        with kept.reading(report):
            check_corpus(experiment.plan, kept.read_json(report)["passages"])


STAGE = Stage("evaluate", evaluate, settings=_settings, upstream=_upstream, check=_check)
