"""Measures of a finished MODEL_DIR query by query, taken again of its runs, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgr_jax import evaluation
from dgr_jax.analysis.inspection import Inspection
from dgr_jax.corpora import trec
from dgr_jax.stages.evaluate import COMPARED, chosen_of

_DRAWS = 1000


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): 95% of the bootstrap over queries. values: [queries]."""
    values, random = np.asarray(values), np.random.default_rng(0)
    means = values[random.integers(len(values), size=(_DRAWS, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def asked(made: Inspection, split: str) -> list[str]:
    """The qids that the evaluate stage has asked."""
    most, seed = made.settings.get("max_queries"), made.settings.get("seed", 0)
    return chosen_of(list(made.queries(split)), most, seed)


def per_query(made: Inspection, system: str, split: str) -> dict[str, dict[str, float]]:
    """Measure -> qid -> value: those of metrics.json, then COMPARED where there are judgements.

    The questions are those of the evaluate stage; one for which nothing was found counts as 0.
    """
    run = trec.run_in_memory(made.run(system, split))
    queries, qrels = made.queries(split), made.qrels(split)
    qids = asked(made, split)
    names = dict.fromkeys((*made.measured[system][split], *COMPARED))
    of_answers = [name for name in names if evaluation.answer_cutoff(name) is not None]
    grades = {qid: qrels[qid] for qid in qids if qid in qrels}
    values: dict[str, dict[str, float]] = {}
    if of_answers:
        text = lambda pid: made.store[made.store.index_of(pid)].text
        values |= evaluation.answer_hits(run, [queries[qid] for qid in qids], text, of_answers)
    if grades:
        of_judgements = [name for name in names if name not in of_answers]
        least = made.min_relevance
        values |= evaluation.per_query(run, grades, of_judgements, min_relevance=least)
    return values
