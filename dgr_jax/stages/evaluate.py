"""Stage evaluate: runs, measures, comparisons and plots of every system on the test splits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dgr_jax import evaluation, plots
from dgr_jax.corpora import trec
from dgr_jax.corpora.types import RankList, ScoredPassage
from dgr_jax.experiment import Experiment
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.generative import scored_passages
from dgr_jax.stages.prepare import Prepared
from dgr_jax.stages.students import decoder
from dgr_jax.training import metrics

Run = dict[str, list[ScoredPassage]]
STUDENTS = ("generate", "control", "distill")


def evaluate(experiment: Experiment, folder: Path) -> None:
    """Writes <system>.<split>.trec, metrics.json (system -> split -> measure), comparisons.json,
    success_at_k.png and training_curves.png, and prints the table."""
    made = Prepared.load(experiment.model_dir)
    splits = experiment.prepare.test_splits
    queries = {split: _test_queries(experiment, made, split) for split in splits}
    judged = {split: _judged(made, split, queries[split]) for split in splits}
    runs: dict[str, dict[str, Run]] = {}
    settings = experiment.evaluate
    if settings.bm25:
        bm25 = Bm25().fit(made.store)
        runs["bm25"] = {s: bm25.search(queries[s], settings.search.depth) for s in splits}
    for system in STUDENTS:
        if system != "control" or experiment.control:
            student = decoder(experiment, system, settings.search, made)
            runs[system] = {s: _retrieve(student, made, queries[s]) for s in splits}
    for system, by_split in runs.items():
        for split, run in by_split.items():
            _write_run(folder / f"{system}.{split}.trec", run, system)
    measured = {
        system: {
            split: evaluation.evaluate(
                run, judged[split], settings.measures, min_relevance=settings.min_relevance
            )
            for split, run in by_split.items()
        }
        for system, by_split in runs.items()
    }
    _write_json(folder / "metrics.json", measured)
    compared = {split: _compare(experiment, runs, split, judged[split]) for split in splits}
    described = {
        split: [{"systems": pair, **asdict(c)} for pair, c in found]
        for split, found in compared.items()
    }
    _write_json(folder / "comparisons.json", described)
    _plot(experiment, folder, runs, judged)
    _show(measured, compared)


def _test_queries(experiment: Experiment, made: Prepared, split: str) -> dict[str, str]:
    """qid -> text, at most Evaluate.max_queries of them."""
    queries = {qid: query.text for qid, query in made.queries(split).items()}
    settings = experiment.evaluate
    if not settings.max_queries or settings.max_queries >= len(queries):
        return queries
    rng = np.random.default_rng(settings.seed)
    keep = np.sort(rng.choice(len(queries), settings.max_queries, replace=False))
    qids = list(queries)
    return {qids[i]: queries[qids[i]] for i in keep}


def _judged(made: Prepared, split: str, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    return {qid: found for qid, found in made.qrels(split).items() if qid in queries}


def _retrieve(student: Any, made: Prepared, queries: dict[str, str]) -> Run:
    tokens = made.vocabulary.encode_inputs(list(queries.values()), student.search.query_length)
    return scored_passages(list(queries), *student.passages(tokens), made.store.pids)


def _write_run(path: Path, run: Run, system: str) -> None:
    lists = (RankList(qid, tuple(passages)) for qid, passages in run.items())
    trec.write_run(path, lists, tag=f"dgr_jax-{system}")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _compare(
    experiment: Experiment, runs: dict[str, dict[str, Run]], split: str, judged: Any
) -> list[tuple[str, evaluation.Comparison]]:
    """(systems, comparison) with a paired test over the queries, for every pair of interest."""
    pairs = [("distill", "generate"), ("distill", "control"), ("distill", "bm25")]
    return [
        (
            f"{a} against {b}",
            evaluation.compare(
                runs[a][split],
                runs[b][split],
                judged,
                measure,
                min_relevance=experiment.evaluate.min_relevance,
            ),
        )
        for a, b in pairs
        if a in runs and b in runs
        for measure in ("Success@1", "Success@10", "RR@10")
    ]


def _plot(experiment: Experiment, folder: Path, runs: Any, judged: Any) -> None:
    first = experiment.prepare.test_splits[0]
    ks = [k for k in (1, 5, 10, 20, 50, 100) if k <= experiment.evaluate.search.depth]
    names = [f"Success@{k}" for k in ks]
    curves = {}
    for system, by_split in runs.items():
        values = evaluation.evaluate(
            by_split[first],
            judged[first],
            names,
            min_relevance=experiment.evaluate.min_relevance,
        )
        curves[system] = {k: values[name] for k, name in zip(ks, names, strict=True)}
    plots.success_at_k(curves, folder / "success_at_k.png", title=f"Success@k, {first}")
    model_dir = Path(experiment.model_dir)
    rows = {s: _metrics(model_dir / s) for s in runs if s in STUDENTS}
    plots.training_curves(rows, folder / "training_curves.png")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return metrics.read_jsonl(folder / "metrics.jsonl")


def _show(measured: Any, compared: Any) -> None:
    console = Console()
    for split, found in compared.items():
        by_system = {system: by_split[split] for system, by_split in measured.items()}
        console.print(evaluation.measures_table(by_system, title=split))
        for pair, comparison in found:
            if comparison.measure == "RR@10":
                console.print(f"{pair.replace(' against', ' and')}: {comparison}", highlight=False)


def measure_runs(paths: list[str], qrels_path: str, min_relevance: int) -> None:
    """Print the measures of TREC runs against a qrels file (TREC, or BEIR's .tsv)."""
    judged: dict[str, dict[str, int]] = {}
    for qrel in trec.qrels(qrels_path):
        judged.setdefault(qrel.qid, {})[qrel.pid] = qrel.relevance
    measured = {}
    for path in paths:
        run = {ranked.qid: list(ranked.passages) for ranked in trec.runs(path)}
        measured[Path(path).name] = evaluation.evaluate(run, judged, min_relevance=min_relevance)
    Console().print(evaluation.measures_table(measured, title=Path(qrels_path).name))
