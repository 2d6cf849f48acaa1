"""Measures of TREC runs, whatever made them."""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator
from pathlib import Path

from dgr_jax import display, evaluation
from dgr_jax.corpora import trec
from dgr_jax.corpora.types import ScoredPassage

logger = logging.getLogger(__name__)


def measure_runs(paths: list[str], qrels_path: str, min_relevance: int) -> None:
    """Print the measures of TREC runs against a qrels file (TREC, or BEIR's .tsv).

    Raises ValueError for a file without judgements, a run that is given twice, and a run that is
    empty or has no query of the judgements; says what else may not be as it was meant.
    """
    judged = trec.qrels_in_memory(trec.qrels(qrels_path))
    if not judged:
        raise ValueError(f"--qrels={qrels_path}: found no judgement; expected qid, 0, pid, grade")
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
        measured[name] = evaluation.evaluate(run, judged, min_relevance=min_relevance)
    title = _names([qrels_path])[qrels_path]
    display.wide_console().print(evaluation.measures_table(measured, title=title))


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
