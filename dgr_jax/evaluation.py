"""Measures of a run against judgements, and of one run against another.

In memory a run is {qid: passages, best first}, qrels are {qid: {pid: relevance}}. Every measure is
averaged over all queries of the qrels: a query that the run lacks scores 0, a query that only the
run has is left out. A run is ranked as its TREC file is (see dgr_jax.corpora.ranking). The measures
are computed from those ranks and so never meet a tie, which trec_eval and MS MARCO's script would
break in opposite ways.

`min_relevance` is the lowest grade that counts as relevant in the binary measures (Success@k,
RR@k, R@k ...). Graded measures (nDCG@k) always use the grades. The names of the measures do not
tell min_relevance, so it has to be reported beside them.

AnswerHits@k needs no judgements: it looks for the answers of the queries in the texts of the
passages, and is averaged over the queries that have answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax import display, measure_names
from dgr_jax.corpora import ranking
from dgr_jax.corpora.answers import has_answer
from dgr_jax.corpora.types import Query, ScoredPassage

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Run = Mapping[str, Sequence[ScoredPassage]]
Qrels = Mapping[str, Mapping[str, int]]

MEASURES = (
    "Success@1", "Success@5", "Success@10", "Success@20", "Success@100",
    "RR@10", "nDCG@10", "R@100",
)  # fmt: skip
ANSWER_MEASURES = ("AnswerHits@1", "AnswerHits@5", "AnswerHits@20", "AnswerHits@100")


def evaluate(
    run: Run, qrels: Qrels, measures: Sequence[str] = MEASURES, *, min_relevance: int = 1
) -> dict[str, float]:
    """The mean of each measure over all queries of the qrels.

    Args:
      run: passages of each query in any order; they are ranked by score and then by pid.
      qrels: relevance of the judged passages of each query.
      measures: names as in ir_measures: 'Success@5', 'RR@10', 'nDCG@10', 'R@100', 'AP' ...
      min_relevance: lowest grade that counts as relevant in a binary measure, unless the measure's
        name gives one, as 'Success(rel=2)@5' does.

    Returns:
      {measure: mean}, with the names as given.

    Raises:
      ValueError: unknown measure, no queries, a passage twice in a list, a score that is NaN.
    """
    return means(per_query(run, qrels, measures, min_relevance=min_relevance))


def means(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{measure: mean over the queries} of the values that `per_query` or `answer_hits` gives.

    Raises ValueError for a measure without a query to average over.
    """
    if empty := [name for name, scores in values.items() if not scores]:
        raise ValueError(
            f"measure {empty[0]!r}: got no query to average over, expected one or more"
        )
    return {name: math.fsum(scores.values()) / len(scores) for name, scores in values.items()}


def per_query(
    run: Run, qrels: Qrels, measures: Sequence[str] = MEASURES, *, min_relevance: int = 1
) -> dict[str, dict[str, float]]:
    """{measure: {qid: value}} for every query of the qrels, in their order; see `evaluate`."""
    import ir_measures

    if not qrels:
        raise ValueError("qrels hold no query: there is nothing to measure on")
    parsed = {name: measure_names.usable(name, min_relevance) for name in measures}
    ranks = {
        qid: {passage.pid: -float(i) for i, passage in enumerate(_ranked(qid, run[qid]))}
        for qid in qrels
        if qid in run
    }
    grades = {qid: {pid: int(grade) for pid, grade in row.items()} for qid, row in qrels.items()}
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in parsed.values()}
    for metric in ir_measures.iter_calc(list(values), grades, ranks):
        values[metric.measure][metric.query_id] = float(metric.value)
    return {name: dict(values[measure]) for name, measure in parsed.items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """System a against system b on the same queries. Positive difference: a is better."""

    measure: str
    mean_a: float
    mean_b: float
    difference: float
    p_value: float
    wins: int
    losses: int
    ties: int

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.mean_a:.4f} against {self.mean_b:.4f}: {self.difference:+.4f} "
            f"(p {_p_value(self.p_value)}; {self.wins} queries better, {self.losses} worse, "
            f"{self.ties} equal)"
        )


def compare(
    measure: str, a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray
) -> Comparison:
    """Compares systems a and b by one value for each query, in the same order for both.

    The p-value is that of `paired_randomization_test`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(
            f"measure {measure!r}: got values of {a.size} and {b.size} queries, expected the same "
            "queries for both systems, one or more"
        )
    differences = np.where(np.isclose(a, b, rtol=0, atol=1e-9), 0.0, a - b)
    return Comparison(
        measure=measure,
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=float(a.mean() - b.mean()),
        p_value=paired_randomization_test(differences),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
    )


def compare_many(
    runs_a: Sequence[Run],
    runs_b: Sequence[Run],
    qrels: Qrels,
    measure: str,
    *,
    min_relevance: int = 1,
) -> Comparison:
    """Compares systems a and b, each by the runs of several seeds.

    A query has one value for each system, its mean over the seeds, and the test is paired over
    queries. So it asks whether the difference holds for other queries of this kind, with these
    seeds; several seeds do not make one query count as several.

    Args:
      runs_a, runs_b: one run for each seed; the two may differ in number.
      qrels, measure, min_relevance: as in `evaluate`.
    """
    if not runs_a or not runs_b:
        raise ValueError(f"both systems need a run; got {len(runs_a)} and {len(runs_b)}")

    def mean_over_seeds(runs):
        values = [per_query(run, qrels, (measure,), min_relevance=min_relevance) for run in runs]
        return np.mean([[row[measure][qid] for qid in qrels] for row in values], axis=0)

    return compare(measure, mean_over_seeds(runs_a), mean_over_seeds(runs_b))


def paired_randomization_test(
    differences: Sequence[float] | np.ndarray, *, draws: int = 20_000, seed: int = 0
) -> float:
    """Two-sided p-value of a mean paired difference (Fisher's randomization; Smucker et al. 2007).

    If the two systems were equally good, each difference would be as likely with the other sign. p
    is the share of random sign flips whose mean is at least as far from 0 as the observed mean,
    which itself counts as one draw. With up to 14 differences that are not 0, all flips are tried.

    Returns:
      p in (0, 1]; 1 where all differences are 0. The same differences always give the same p.
    """
    differences = np.asarray(differences, np.float64)
    differences = differences[differences != 0]
    size = len(differences)
    reached = abs(differences.sum()) * (1 - 1e-9)
    if size <= 14:
        signs = 1 - 2 * (np.arange(2**size)[:, None] >> np.arange(size) & 1)
        return float((np.abs(signs @ differences) >= reached).mean())
    generator = np.random.default_rng(seed)
    count, chunk = 0, max(1, 4_000_000 // size)
    for start in range(0, draws, chunk):
        signs = generator.integers(0, 2, (min(chunk, draws - start), size), dtype=np.int8)
        sums = 2.0 * (signs @ differences) - differences.sum()
        count += int((np.abs(sums) >= reached).sum())
    return (count + 1) / (draws + 1)


# Answer strings.


def answer_hits(
    run: Run,
    queries: Iterable[Query],
    passage_text: Callable[[str], str],
    measures: Sequence[str] = ANSWER_MEASURES,
) -> dict[str, dict[str, float]]:
    """{measure: {qid: 1 or 0}}: whether one of the first k passages holds an answer (DPR's
    protocol, Karpukhin et al. 2020), for every query with answers, in their order.

    Args:
      run: passages of each query; a query that the run lacks has no hit.
      queries: queries without answers are left out.
      passage_text: the text of a pid. DPR searches the text alone, without the title.
      measures: 'AnswerHits@5' ...

    Raises ValueError for a measure of another kind.
    """
    cutoffs = {}
    for name in measures:
        if (cutoff := answer_cutoff(name)) is None:
            raise ValueError(f"unknown measure {name!r} of answers: expected 'AnswerHits@5'")
        cutoffs[name] = cutoff
    ranks = answer_ranks(run, queries, passage_text, depth=max(cutoffs.values(), default=1))
    return {
        name: {qid: float(rank is not None and rank <= k) for qid, rank in ranks.items()}
        for name, k in cutoffs.items()
    }


def answer_ranks(
    run: Run, queries: Iterable[Query], passage_text: Callable[[str], str], *, depth: int = 100
) -> dict[str, int | None]:
    """{qid: rank from 1 of the first passage that holds an answer, None if none of the first
    `depth` does}."""
    ranks = {}
    for query in queries:
        if not query.answers:
            continue
        passages = _ranked(query.qid, run.get(query.qid, ()))[:depth]
        hits = (
            rank
            for rank, passage in enumerate(passages, start=1)
            if has_answer(passage_text(passage.pid), query.answers)
        )
        ranks[query.qid] = next(hits, None)
    return ranks


def answer_cutoff(measure: str) -> int | None:
    """k of 'AnswerHits@k'; None for a measure of judgements.

    Raises ValueError where k is no number above 0.
    """
    name, _, k = measure.partition("@")
    if name != "AnswerHits":
        return None
    if not (k.isascii() and k.isdigit() and int(k) > 0):
        raise ValueError(
            f"unknown measure {measure!r}: expected a cutoff of 1 or more, such as "
            "'AnswerHits@5'; set `measures`"
        )
    return int(k)


def require_answers(measures: Sequence[str], queries: Iterable[Query], split: str) -> None:
    """Raises ValueError where a measure looks for answers and no query of the split has any.

    The queries are read up to the first with answers, and not at all without such a measure.
    """
    asked = [name for name in measures if answer_cutoff(name) is not None]
    if asked and not any(query.answers for query in queries):
        raise ValueError(
            f"Evaluate.measures: got {asked[0]!r}, expected queries with answers, which no query "
            f"of split {split!r} has; leave the measure out"
        )


def check(measures: Sequence[str], *, min_relevance: int = 1) -> None:
    """Raises ValueError for an unknown measure, and for one that cannot be computed here because
    the library for it is not installed or refuses it."""
    for name in measures:
        if answer_cutoff(name) is None:
            measure_names.usable(name, min_relevance)


# Tables for people.


def measures_table(
    results: Mapping[str, Mapping[str, float]],
    *,
    measures: Sequence[str] | None = None,
    title: str | None = None,
    first: str = "system",
) -> Table:
    """A rich table, one row a system and one column a measure; the best of a column is bold.

    Args:
      results: {system: {measure: value}}; a missing value is shown as a dash.
      measures: the columns; by default every measure, in order of appearance.
      title: the line above the table. first: the name of the first column.
    """
    from rich.table import Table

    if measures is None:
        measures = list(dict.fromkeys(name for row in results.values() for name in row))
    table = Table(title=title and display.cell(title, "italic"), title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in measures:
        table.add_column(name, justify="right", overflow="fold")
    best = {name: max(row.get(name, -math.inf) for row in results.values()) for name in measures}
    for system, row in results.items():
        table.add_row(
            display.cell(system),
            *(_cell(row.get(name), best[name], len(results)) for name in measures),
        )
    return table


def _cell(value: float | None, best: float, systems: int) -> str | Text:
    if value is None:
        return "-"
    cell = f"{value:.3f}"
    return display.cell(cell, "bold") if systems > 1 and cell == f"{best:.3f}" else cell


def _p_value(p: float) -> str:
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _ranked(qid: str, passages: Sequence[ScoredPassage]) -> list[ScoredPassage]:
    """The passages in the order of `ranking`; ValueError for a repeated pid or a score of NaN."""
    seen = set()
    for passage in passages:
        if passage.pid in seen:
            raise ValueError(f"the run lists passage {passage.pid!r} twice for query {qid!r}")
        if math.isnan(passage.score):
            raise ValueError(f"the score of passage {passage.pid!r} for query {qid!r} is NaN")
        seen.add(passage.pid)
    return ranking.best_first(passages)
