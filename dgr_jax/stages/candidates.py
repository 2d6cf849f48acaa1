"""Stage candidates: the student retrieves passages for the queries that it learned from."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import processes
from dgr_jax.experiments.generative import Candidates, Experiment
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir import kept
from dgr_jax.retrieval import self_hits
from dgr_jax.retrieval.batching import BLOCK
from dgr_jax.stages import judged
from dgr_jax.stages.generation_data import source_pairs
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.student import GENERATE
from dgr_jax.stages.systems import open_system
from dgr_jax.training.arrays import write_arrays

logger = logging.getLogger(__name__)

_TextsAndQrels = tuple[dict[str, str], dict[str, dict[str, int]]]


def candidates(experiment: Experiment, folder: Path) -> None:
    """Writes candidates.npz (passages int32, scores f32 [n, depth]) and qids.json, in order.
    Identifiers of several views also give keys/, see retrieval.multiview_keys.

    Queries are retrieved in blocks that are kept, so that a cut-off stage goes on. While the device
    finishes a block, the next is tokenised. Several processes search together; the first writes.
    """
    prepared = Prepared.load(experiment.model_dir)
    asked = training_queries(experiment, prepared)
    qids, texts = list(asked.texts), list(asked.texts.values())
    own = np.array([prepared.store.index_of(q) if q in asked.own else -1 for q in qids], np.int64)
    search = experiment.candidates.search
    if asked.own:
        search = search.deeper()
    student = open_system(experiment, GENERATE.name, prepared, search)
    parts = {n: folder / f"part-{n:09d}.npz" for n in range(0, len(qids), BLOCK)}
    missing = [start for start, part in parts.items() if not _is_whole(part)]
    missing = processes.agree(missing)  # what others see may be of a moment ago
    blocks = (student.encode(prepared.vocabulary, texts[n : n + BLOCK]) for n in missing)
    candidates = student.candidates(blocks, experiment.candidates.keys)
    for start, retrieved in zip(missing, candidates, strict=True):
        if not processes.first():
            continue
        if asked.own:
            retrieved = self_hits.left_out(retrieved, own[start : start + BLOCK])
        temporary = folder / "part.partial.npz"
        arrays: dict[str, Any] = retrieved
        np.savez(temporary, **arrays)
        temporary.replace(parts[start])
        logger.info("candidates: %d/%d queries", min(start + BLOCK, len(qids)), len(qids))
    if not processes.first():
        return
    _join(folder, list(parts.values()))
    (folder / "qids.json").write_text(json.dumps(qids), encoding="utf-8")
    for part in parts.values():
        part.unlink()


def _is_whole(part: Path) -> bool:
    """Whether a part is there, and is as its checksums say."""
    if not part.is_file():
        return False
    try:
        with kept.reading(part), np.load(part) as stored:
            return all(len(stored[name]) for name in ("passages", "scores", *stored.files))
    except kept.Damaged as damage:
        logger.warning("candidates: %s; its queries are asked again", damage.what)
        return False


def _join(folder: Path, parts: Sequence[Path]) -> None:
    """Joins all parts into one candidates.npz and, where they hold keys, keys/."""
    loaded = [np.load(part) for part in parts]
    columns = ("passages", "scores")
    whole: dict[str, Any] = {n: np.concatenate([part[n] for part in loaded]) for n in columns}
    np.savez(folder / "candidates.npz", **whole)
    if named := [name for name in loaded[0].files if name not in columns]:
        write_arrays(folder / "keys", ({name: part[name] for name in named} for part in loaded))


@dataclass(frozen=True)
class TrainingQueries:
    """What the student is asked: qid -> text, qid -> pid -> relevance of its positives, and
    qid -> the source of the query. own: those that must not find the passage of their id."""

    texts: dict[str, str]
    qrels: dict[str, dict[str, int]]
    sources: dict[str, str]
    own: frozenset[str] = frozenset()


def training_queries(experiment: Experiment, prepared: Prepared) -> TrainingQueries:
    """The queries of every source in Candidates.sources, at most Candidates.max_queries of each."""
    asked = TrainingQueries({}, {}, {})
    for source in experiment.candidates.sources:
        read = _labelled if source == "labelled" else partial(_written, source)
        texts, qrels = read(experiment, prepared)
        asked.texts.update(texts)
        asked.qrels.update(qrels)
        asked.sources.update(dict.fromkeys(texts, source))
    labelled = [qid for qid, source in asked.sources.items() if source == "labelled"]
    own = judged.self_hits(experiment.prepare, labelled, prepared.store, asked.qrels)
    return replace(asked, own=own)


def _labelled(experiment: Experiment, prepared: Prepared) -> _TextsAndQrels:
    """Queries of the training split that have a positive."""
    queries = prepared.queries(experiment.prepare.train_split)
    grades = prepared.qrels(experiment.prepare.train_split)
    least = experiment.prepare.min_relevance
    qids = [qid for qid in queries if max(grades[qid].values()) >= least]
    qids = [qids[i] for i in _drawn(len(qids), experiment.candidates)]
    return {q: queries[q].text for q in qids}, {q: grades[q] for q in qids}


def _written(source: str, experiment: Experiment, prepared: Prepared) -> _TextsAndQrels:
    """Texts that the student has learned from, cut as it reads them; the passages that they are
    made of are the positives."""
    settings, vocabulary = experiment.prepare, prepared.vocabulary
    longest = settings.query_length - 1 - bool(vocabulary.views)  # EOS and the marker of a view
    tests = judged.test_texts(settings, prepared.folder)
    read = partial(source_pairs, settings, source, prepared.store, {}, (), test_queries=tests)
    least, pids = settings.min_relevance, prepared.store.pids
    count = sum(1 for _ in read())
    chosen = set(_drawn(count, experiment.candidates).tolist())
    texts, qrels = {}, {}
    for i, (text, index, _) in enumerate(read()):
        if i in chosen:
            texts[f"{source}:{i}"] = vocabulary.decode(vocabulary.encode(text)[:longest])
            qrels[f"{source}:{i}"] = {pids[index]: least}
    return texts, qrels


def _drawn(count: int, settings: Candidates) -> np.ndarray:
    """Which of `count` queries are asked, ascending."""
    if not settings.max_queries or settings.max_queries >= count:
        return np.arange(count)
    rng = np.random.default_rng(settings.seed)
    return np.sort(rng.choice(count, settings.max_queries, replace=False))


STAGE = Stage(
    "candidates", candidates, settings=fields("candidates"), upstream=after(GENERATE.name)
)
