"""Measures of TREC runs, whatever made them: a table for people, or JSON for programs."""

from __future__ import annotations

import collections
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dgr_jax import display, evaluation
from dgr_jax.corpora import checks, trec
from dgr_jax.corpora.types import ScoredPassage

logger = logging.getLogger(__name__)


def measure_runs(
    paths: list[str],
    qrels_path: str,
    min_relevance: int,
    *,
    measures: Sequence[str] = evaluation.MEASURES,
    per_query: bool = False,
    as_json: bool = False,
) -> None:
    """Print the measures of TREC runs against a qrels file (TREC, or BEIR's .tsv), and how many of
    its queries each run has.

    per_query: also the values of each query. as_json: one JSON object, in place of tables.

    Raises ValueError for an unknown measure, a file without judgements, a run that is given twice,
    and a run that is empty or has no query of the judgements; says what else may not be as it was
    meant.
    """
    evaluation.check(measures, min_relevance=min_relevance)
    if of_answers := [name for name in measures if evaluation.answer_cutoff(name)]:
        raise ValueError(
            f"--measures: got {of_answers[0]!r}, expected measures of judgements, such as 'RR@10': "
            "qrels hold no answers"
        )
    judged = _judged(qrels_path)
    highest = max(max(grades.values()) for grades in judged.values())
    if highest < min_relevance:
        logger.warning(
            "--min_relevance=%d: the highest grade of %s is %d, so that nothing counts as relevant "
            "but for graded measures", min_relevance, qrels_path, highest,
        )  # fmt: skip
    measured = {}
    for path, name in _names(paths).items():
        run = trec.run_in_memory(trec.runs(path))
        for remark in _remarks(run, judged, path, qrels_path):
            logger.warning("%s: %s", path, remark)
        values = evaluation.per_query(run, judged, measures, min_relevance=min_relevance)
        measured[name] = _Measured(path, sum(qid in run for qid in judged), values)
    if as_json:
        said = {"qrels": qrels_path, "queries": len(judged), "min_relevance": min_relevance}
        runs = [run.described(per_query) for run in measured.values()]
        sys.stdout.write(json.dumps(said | {"runs": runs}) + "\n")
    else:
        _show(measured, _names([qrels_path])[qrels_path], len(judged), per_query)


def names(listed: str) -> tuple[str, ...]:
    """The measures of a list with commas, some of which may stand in brackets of a name."""
    return tuple(name.strip() for name in re.split(r",(?![^()]*\))", listed))


def _judged(path: str) -> dict[str, dict[str, int]]:
    """qid -> pid -> relevance; ValueError for a file without any. Pairs with several grades are
    said."""
    given = list(trec.qrels(path))  # it may be a pipe
    if not given:
        raise ValueError(f"--qrels={path}: found no judgement; expected qid, 0, pid, grade")
    try:
        checks.judged_once(given, contradictions="error", where=path)
    except ValueError as error:
        logger.warning("%s; the last grade counts", error)
    return trec.qrels_in_memory(given)


class _Measured(NamedTuple):
    """A run: how many of the judged queries it has, and measure -> qid -> value."""

    path: str
    queries: int
    values: Mapping[str, Mapping[str, float]]

    @property
    def by_query(self) -> dict[str, dict[str, float]]:
        """qid -> measure -> value."""
        qids = next(iter(self.values.values()), {})
        return {qid: {name: row[qid] for name, row in self.values.items()} for qid in qids}

    def described(self, per_query: bool) -> dict[str, Any]:
        """What is known of the run, as JSON."""
        means = evaluation.means(self.values)
        said = {"run": self.path, "queries": self.queries, "measures": means}
        return said | ({"per_query": self.by_query} if per_query else {})


def _show(measured: Mapping[str, _Measured], title: str, queries: int, per_query: bool) -> None:
    """Prints a table of the runs, and one of the queries of each where that is asked for."""
    console = display.wide_console()
    means = {name: evaluation.means(run.values) for name, run in measured.items()}
    console.print(evaluation.measures_table(means, title=title))
    for name, run in measured.items():
        console.print(f"{name}: has {run.queries:,} of the {queries:,} judged queries")
        if per_query:
            console.print(evaluation.measures_table(run.by_query, title=name, first="query"))


def _names(paths: list[str]) -> dict[str, str]:
    """Path -> what it is called: the name of its file where that says which one it is."""
    if twice := [path for path, count in collections.Counter(paths).items() if count > 1]:
        raise ValueError(f"--run={twice[0]}: got it {paths.count(twice[0])} times, expected once")
    counts = collections.Counter(Path(path).name for path in paths)
    return {
        path: Path(path).name if counts[Path(path).name] == 1 and Path(path).is_file() else path
        for path in paths
    }


def _remarks(
    run: dict[str, list[ScoredPassage]],
    judged: dict[str, dict[str, int]],
    path: str,
    qrels_path: str,
) -> Iterator[str]:
    """What may not be as it was meant; ValueError for a run that nothing can be measured of."""
    if not run:
        raise ValueError(f"--run={path}: found no passage; expected a TREC run")
    both, other = [qid for qid in run if qid in judged], next(iter(run))
    if not both:
        raise ValueError(
            f"--run={path}: found none of the {len(judged):,} queries of {qrels_path} among its "
            f"{len(run):,}, such as {other!r}; expected a run of these queries"
        )
    if lacking := len(judged) - len(both):
        yield f"lacks {lacking:,} of the {len(judged):,} judged queries, which count as 0"
    if beside := len(run) - len(both):
        yield f"{beside:,} of its {len(run):,} queries have no judgements, and are left out"
    pids = {pid for grades in judged.values() for pid in grades}
    if not any(passage.pid in pids for qid in both for passage in run[qid]):
        pid = run[both[0]][0].pid
        yield (
            f"none of its passages, such as {pid!r}, is among the {len(pids):,} judged ones; is it "
            "of another collection?"
        )
    ties = sum(len({p.score for p in run[qid]}) < len(run[qid]) for qid in both)
    if ties:
        yield (
            f"passages of {ties:,} queries have equal scores, and stand in the order of their "
            "pids; other tools may order them otherwise"
        )
