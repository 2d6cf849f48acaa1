"""Stage candidates: the student retrieves passages for its own training queries."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from dgr_jax.experiment import Experiment
from dgr_jax.stages.prepare import Prepared
from dgr_jax.stages.students import decoder

logger = logging.getLogger(__name__)

_BLOCK = 4096


def candidates(experiment: Experiment, folder: Path) -> None:
    """Writes candidates.npz (passages int32, scores f32 [n, depth]) and qids.json, in order.

    Queries are retrieved in blocks of 4,096 that are kept, so that a cut-off stage goes on.
    """
    settings = experiment.candidates
    made = Prepared.load(experiment.model_dir)
    qids, texts = training_queries(experiment, made)
    student = decoder(experiment, "generate", settings.search, made)
    parts = []
    for start in range(0, len(qids), _BLOCK):
        part = folder / f"part-{start:09d}.npz"
        if not part.is_file():
            tokens = made.vocabulary.encode_inputs(
                texts[start : start + _BLOCK], settings.search.query_length
            )
            passages, scores = student.passages(tokens)
            temporary = folder / "part.partial.npz"
            np.savez(temporary, passages=passages, scores=scores)
            temporary.replace(part)
        parts.append(part)
        logger.info("candidates: %d/%d queries", min(start + _BLOCK, len(qids)), len(qids))
    loaded = [np.load(part) for part in parts]
    np.savez(
        folder / "candidates.npz",
        passages=np.concatenate([part["passages"] for part in loaded]),
        scores=np.concatenate([part["scores"] for part in loaded]),
    )
    (folder / "qids.json").write_text(json.dumps(qids), encoding="utf-8")
    for part in parts:
        part.unlink()


def training_queries(experiment: Experiment, made: Prepared) -> tuple[list[str], list[str]]:
    """qids and texts of the training queries with a positive, at most Candidates.max_queries."""
    queries = made.queries(experiment.prepare.train_split)
    judged = made.qrels(experiment.prepare.train_split)
    least = experiment.prepare.min_relevance
    qids = [qid for qid in queries if max(judged[qid].values()) >= least]
    settings = experiment.candidates
    if settings.max_queries and settings.max_queries < len(qids):
        rng = np.random.default_rng(settings.seed)
        keep = np.sort(rng.choice(len(qids), settings.max_queries, replace=False))
        qids = [qids[i] for i in keep]
    return qids, [queries[qid].text for qid in qids]
