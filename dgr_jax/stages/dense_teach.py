"""Stage teach of a dense retriever: a teacher orders the pools and the positives."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np

from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.stage import after
from dgr_jax.model_dir import kept
from dgr_jax.stages import dense_negatives
from dgr_jax.stages import teach as generative
from dgr_jax.stages.dense_negatives import own_passages, pool_of
from dgr_jax.stages.dense_prepare import LABELLED, QIDS, qids_of, queries_of, sources
from dgr_jax.stages.judged import self_hits
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.teach import CandidateLists, readable, taught
from dgr_jax.teaching.list_recipes import RankLists
from dgr_jax.teaching.teacher import Coverage
from dgr_jax.training import arrays

logger = logging.getLogger(__name__)


def teach(experiment: DenseExperiment, folder: Path) -> None:
    """Writes a folder of token arrays for each split: rank lists that the teacher has ordered of
    the pool and the positives of each query; and report.json, see `stages.teach`."""
    prepared = Prepared.load(experiment.model_dir)
    qids = kept.read_json(prepared.folder / QIDS)
    own, report = own_passages(experiment, prepared), {}
    for source in sources(experiment):
        pool = pool_of(experiment, dense_negatives.STAGE.name, source)
        queries = queries_of(experiment, source)
        named = qids_of(experiment, source, qids)
        lists, coverage = _ranked(experiment, prepared, source, named, pool)
        names = ("encoder_input_tokens", "positives")
        rows = {name: queries[name][lists.query_rows] for name in names}
        if own:
            # A query's own passage is in none of its lists; among these it is no negative either.
            itself = own[source][lists.query_rows]
            rows["positives"] = np.hstack([rows["positives"], itself])
        scores = lists.teacher_scores.astype(np.float32)
        arrays.write_arrays(
            folder / source, [rows | {"passages": lists.passages, "teacher_scores": scores}]
        )
        report[source] = {"teacher": coverage.report(), "lists": lists.report}
        for line in readable({source: coverage.report()}, lists.report):
            logger.info("teach: %s", line)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _ranked(
    experiment: DenseExperiment, prepared: Prepared, source: str, qids: list[str], pool: np.ndarray
) -> tuple[RankLists, Coverage]:
    assert experiment.teach is not None  # as the stage is there
    split, coverage = source.removeprefix(LABELLED), Coverage()
    queries, qrels = prepared.queries(split), prepared.qrels(split)
    lists = taught(
        experiment.teach,
        {qid: queries[qid].text for qid in qids},
        qids=qids,
        coverage=dict.fromkeys(qids, coverage),
        candidates=CandidateLists(qids, pool, prepared.store.pids),
        store=prepared.store,
        qrels=qrels,
        min_relevance=experiment.prepare.min_relevance,
        self_hits=self_hits(experiment.prepare, qids, prepared.store, qrels),
    )
    return lists, coverage


STAGE = dataclasses.replace(
    generative.STAGE, make=teach, upstream=after(dense_negatives.STAGE.name)
)
