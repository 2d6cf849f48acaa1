"""Stage negatives: pools of passages to draw the negatives of each query from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dgr_jax.experiments.dense import DenseExperiment, Negatives
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.batching import BLOCK
from dgr_jax.stages.dense_prepare import (
    LABELLED,
    QIDS,
    one_process,
    qids_of,
    queries_of,
    sources,
)
from dgr_jax.stages.judged import self_hits
from dgr_jax.stages.prepared import PREPARE, Prepared
from dgr_jax.teaching import negatives as teaching

logger = logging.getLogger(__name__)

Find = Callable[[np.ndarray], np.ndarray]  # query tokens int32 [n, Q] -> passages int [n, depth]


def negatives(experiment: DenseExperiment, folder: Path) -> None:
    """Writes <source>.npy, int32 [n, depth]: passages to draw the negatives of each query from."""
    settings = experiment.negatives
    prepared = Prepared.load(experiment.model_dir)
    own = own_passages(experiment, prepared)
    write_pools(experiment, folder, settings, finder(settings, prepared, deeper=bool(own)), own)


def own_passages(experiment: DenseExperiment, prepared: Prepared) -> dict[str, np.ndarray]:
    """Source -> int32 [n, 1]: the passage that a query itself is, which it must not find; -1 where
    it is none. The result is {} where no query is a passage."""
    report = kept.read_json(prepared.folder / "report.json")
    counted = report.get("queries_that_are_passages", {})
    if "inputs_cut" in report and not counted.keys() & set(experiment.prepare.train_splits):
        return {}  # an older report has neither
    qids = kept.read_json(prepared.folder / QIDS)
    by_source = {}
    for source in sources(experiment):
        rows = by_source[source] = np.full(
            (len(queries_of(experiment, source)["query"]), 1), -1, np.int32
        )
        if not source.startswith(LABELLED):
            continue
        named = qids_of(experiment, source, qids)
        qrels = prepared.qrels(source.removeprefix(LABELLED))
        own = self_hits(experiment.prepare, named, prepared.store, qrels)
        rows[:, 0] = [prepared.store.index_of(qid) if qid in own else -1 for qid in named]
    return by_source if any((rows >= 0).any() for rows in by_source.values()) else {}


def finder(settings: Negatives, prepared: Prepared, *, deeper: bool = False) -> Find:
    """What finds passages for the pools. deeper: whether it finds one passage more, because the
    query's own may be among them and is left out."""
    if settings.source == "random":
        return lambda tokens: np.zeros((len(tokens), 0), np.int32)
    index = settings.bm25.fit(prepared.store)

    def find(tokens: np.ndarray) -> np.ndarray:
        """What BM25 finds for the queries as the encoder reads them."""
        depth = settings.skip + settings.depth + deeper
        nearest = np.full((len(tokens), depth), -1, np.int32)
        for row, ids in zip(nearest, tokens, strict=True):
            scores = index.scores(prepared.vocabulary.decode(ids.tolist()))
            best = index.best(scores, len(row))
            row[: len(best)] = [prepared.store.index_of(passage.pid) for passage in best]
        return nearest

    return find


def write_pools(
    experiment: DenseExperiment,
    folder: Path,
    settings: Negatives,
    find: Find,
    own: Mapping[str, np.ndarray],
) -> None:
    """Writes one pool for each source, a block of queries at a time. own: see `own_passages`."""
    num_passages = len(Prepared.load(experiment.model_dir).store)
    for source in sources(experiment):
        queries = queries_of(experiment, source)
        others = queries["positives"]
        if own:
            others = np.hstack([others, own[source]])
        pools = []
        for start in range(0, len(queries["positives"]), BLOCK):
            block = slice(start, start + BLOCK)
            pools.append(
                teaching.mine(
                    find(np.asarray(queries["encoder_input_tokens"][block])),
                    others[block],
                    count=settings.depth,
                    num_passages=num_passages,
                    skip=settings.skip,
                    seed=[settings.seed, start],
                )
            )
            logger.info("%s: %s, %d queries", folder.name, source, start + len(pools[-1]))
        np.save(folder / f"{source}.npy", np.concatenate(pools))


def pool_of(experiment: DenseExperiment, stage: str, source: str) -> np.ndarray:
    """int32 [n, depth]: what `write_pools` wrote."""
    with kept.reading(Path(experiment.model_dir) / stage / f"{source}.npy") as file:
        return np.load(file, mmap_mode="r", allow_pickle=False)


STAGE = Stage(
    "negatives", negatives, settings=fields("negatives"), upstream=after(PREPARE), check=one_process
)
