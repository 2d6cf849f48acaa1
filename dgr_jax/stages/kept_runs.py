"""Runs of systems on the test splits, which are kept: what is asked again is not searched again.

A run of a trained system lies beside its checkpoints, that of another one beside what it is made
of, at last the passages. It is named by what is asked.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from dgr_jax import processes
from dgr_jax.corpora import trec
from dgr_jax.corpora.types import Query, ScoredPassage
from dgr_jax.corpora.variations import Variation
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.model_dir import kept
from dgr_jax.model_dir.records import read_record
from dgr_jax.retrieval import self_hits
from dgr_jax.retrieval.batching import BLOCK, scored_passages
from dgr_jax.retrieval.system import System
from dgr_jax.settings import describe, fingerprint
from dgr_jax.stages.prepared import Prepared

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Run = dict[str, list[ScoredPassage]]


def path_of(experiment: Experiment | DenseExperiment, system: str, split: str, own: bool) -> Path:
    """The file of a system's run. own: whether queries are passages, which are left out of it."""
    evaluate, model_dir = experiment.evaluate, Path(experiment.model_dir)
    untrained = experiment.untrained.get(system)
    made_of = experiment.made_of(system)
    asked, *rest = untrained.asked(evaluate.search) if untrained else (evaluate.search,)
    drawn = evaluate.seed if evaluate.max_queries else 0
    # The folder of the first one is another when it is trained again.
    others = [read_record(model_dir / name).get("fingerprint") for name in made_of[1:]]
    named = [asked, evaluate.max_queries, drawn, *["without self-hits"] * own, *rest, *others]
    named += [evaluate.variation] * (evaluate.variation != Variation())
    home = (*made_of, "prepare")[0]
    return model_dir / home / "runs" / f"{system}.{split}-{fingerprint(describe(named))}.trec"


def search(
    experiment: Experiment | DenseExperiment,
    prepared: Prepared,
    system: str,
    opened: Callable[[str], System],
    queries: Mapping[str, dict[str, Query]],
    runs: Mapping[str, Path],
    own: Mapping[str, frozenset[str]],
) -> None:
    """Writes the runs (by split) that are not there yet, or have changed since they were written.

    own: the queries of each split that must not find the passage of their id.
    """
    first = processes.first()
    absent = [split for split, path in runs.items() if not _is_kept(path)] if first else None
    absent = processes.agree(absent)
    untrained = experiment.untrained.get(system)
    if not absent or (untrained and not untrained.together and not first):
        return
    depth, student = experiment.evaluate.search.depth, opened(system)
    for split in absent:
        texts = {qid: query.text for qid, query in queries[split].items()}
        blocks = retrieved(student, prepared, texts)
        if any(own.values()):
            blocks = _without_self_hits(blocks, own[split], depth, f"{system} on {split}")
        if first:
            lists = (rank_list for run in blocks for rank_list in trec.rank_lists(run))
            written = runs[split].with_name(f"{runs[split].stem}.partial.trec")
            trec.write_run(written, lists, tag=f"dgr_jax-{system}")
            kept.adopt(written, runs[split])
        else:
            collections.deque(blocks, maxlen=0)


def _is_kept(path: Path) -> bool:
    """Whether a run is there as it was written."""
    if not path.is_file():
        return False
    try:
        listed = kept.is_listed(path)
    except kept.Damaged as damage:
        logger.warning("evaluate: %s; searched again", damage.what)
        return False
    if not listed and path.stat().st_nlink > 1:
        logger.info("evaluate: %s has another name, and may be edited; searched again", path)
        return False
    return True


def _without_self_hits(
    runs: Iterator[Run], own: frozenset[str], depth: int, name: str
) -> Iterator[Run]:
    """Blocks of a run without the queries' own passages, whose number is logged."""
    hits = 0
    for run in runs:
        hits += sum(p.pid == qid for qid in own & run.keys() for p in run[qid])
        yield self_hits.without(run, own, depth)
    if hits:
        logger.info("evaluate: %s: %s queries found themselves, left out", name, f"{hits:,}")


def _blocks(queries: Mapping[str, Item]) -> Iterator[dict[str, Item]]:
    items = list(queries.items())
    return (dict(items[start : start + BLOCK]) for start in range(0, len(items), BLOCK))


def retrieved(student: System, prepared: Prepared, queries: dict[str, str]) -> Iterator[Run]:
    """The run of a system in blocks."""
    encoded = (student.encode(prepared.vocabulary, list(b.values())) for b in _blocks(queries))
    retrieved = student.passages_of_blocks(encoded)
    for block, passages in zip(_blocks(queries), retrieved, strict=True):
        yield scored_passages(list(block), *passages, prepared.store.pids)


def read(path: Path, queries: Mapping[str, Query]) -> Iterator[Run]:
    """A run in blocks of the queries that it was made for; those without passages have no line."""
    lists = trec.runs(path)
    following = next(lists, None)
    for block in _blocks(queries):
        run: Run = {}
        for qid in block:
            run[qid] = []
            if following is not None and following.qid == qid:
                run[qid] = list(following.passages)
                following = next(lists, None)
        yield run
