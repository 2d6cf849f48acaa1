"""Stage teach: a teacher orders the candidates, and rank lists are cut from its order."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from dgr_jax.data import rank_lists
from dgr_jax.experiment import Experiment
from dgr_jax.stages.prepare import Prepared
from dgr_jax.training import arrays

logger = logging.getLogger(__name__)

_BLOCK = 2048


def teach(experiment: Experiment, folder: Path) -> None:
    """Writes rank_lists.npz (qids' rows, passages, scores, positives), their token arrays in
    rank_lists/, and report.json: the teacher's coverage and agreement, and what was left out."""
    settings, least = experiment.teach, experiment.prepare.min_relevance
    made = Prepared.load(experiment.model_dir)
    qids, candidates = _candidates(experiment, made)
    judged = made.qrels(experiment.prepare.train_split)
    queries = made.queries(experiment.prepare.train_split)
    texts = {qid: queries[qid].text for qid in qids}
    ranked, coverage = settings.teacher.rank_and_report(
        texts, candidates, made.store, judged, min_relevance=least
    )
    lists = settings.lists.select(
        ranked,
        qids=qids,
        store=made.store,
        qrels=judged,
        candidates=candidates,
        seed=settings.seed,
        min_relevance=least,
    )
    if not len(lists.passages):
        raise ValueError(
            f"no rank list could be made of {len(qids)} queries: {lists.report}; look at "
            "Teach.teacher and Teach.lists"
        )
    chosen = [texts[qids[row]] for row in lists.query_rows]
    np.savez(
        folder / "rank_lists.npz",
        texts=np.array(chosen),
        passages=lists.passages,
        teacher_scores=lists.teacher_scores,
        positives=lists.positive_passages,
    )
    arrays.write_arrays(folder / "rank_lists", _features(experiment, folder, made))
    report = {"teacher": coverage, "lists": lists.report}
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for line in _readable(coverage, lists.report):
        logger.info("teach: %s", line)


def _candidates(experiment: Experiment, made: Prepared) -> tuple[list[str], dict[str, list[str]]]:
    """qids in order, and the pids that the student found for each, best first."""
    folder = Path(experiment.model_dir) / "candidates"
    qids = json.loads((folder / "qids.json").read_text(encoding="utf-8"))
    found = np.load(folder / "candidates.npz")["passages"]
    pids = made.store.pids
    return qids, {
        qid: [pids[i] for i in row if i >= 0] for qid, row in zip(qids, found, strict=True)
    }


def load_rank_lists(folder: Path) -> dict[str, np.ndarray]:
    """Arguments of `data.rank_lists.examples` and `.features` that the teach stage left."""
    with np.load(folder / "rank_lists.npz") as stored:
        return {name: stored[name] for name in stored.files}


def _features(experiment: Experiment, folder: Path, made: Prepared):
    """Model features of all rank lists in blocks."""
    lists = load_rank_lists(folder)
    for start in range(0, len(lists["passages"]), _BLOCK):
        block = {name: values[start : start + _BLOCK] for name, values in lists.items()}
        yield rank_lists.features(
            **block | {"texts": block["texts"].tolist()},
            table=made.table,
            vocabulary=made.vocabulary,
            query_length=experiment.prepare.query_length,
        )


def _readable(coverage: dict[str, float], lists: dict[str, int]) -> list[str]:
    left_out = ", ".join(
        f"{value:,} {name.replace('_', ' ')}"
        for name, value in lists.items()
        if name not in ("queries", "lists") and value
    )
    return [
        f"{coverage['candidates_scored']:.1%} of {coverage['candidates']:,} candidates scored; a "
        f"positive is among the candidates of {coverage['positive_in_candidates']:.1%} of the "
        f"queries; the teacher alone: Success@1 {coverage['Success@1']:.3f}, "
        f"RR@10 {coverage['RR@10']:.3f}",
        f"{lists['lists']:,} rank lists of {lists['queries']:,} queries"
        + (f"; left out: {left_out}" if left_out else ""),
    ]
