"""Stage candidates: the student retrieves passages for the queries that it learned from."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dgr_jax.experiment import Candidates, Experiment
from dgr_jax.retrieval.generative import BLOCK
from dgr_jax.stages.prepare import Prepared
from dgr_jax.stages.students import decoder
from dgr_jax.training.arrays import read_arrays

logger = logging.getLogger(__name__)

_TextsAndQrels = tuple[dict[str, str], dict[str, dict[str, int]]]


def candidates(experiment: Experiment, folder: Path) -> None:
    """Writes candidates.npz (passages int32, scores f32 [n, depth]) and qids.json, in order.

    Queries are retrieved in blocks that are kept, so that a cut-off stage goes on. While the device
    finishes a block, the next is tokenised.
    """
    settings = experiment.candidates
    made = Prepared.load(experiment.model_dir)
    asked = training_queries(experiment, made)
    qids, texts = list(asked.texts), list(asked.texts.values())
    student = decoder(experiment, "generate", settings.search, made)
    parts = {n: folder / f"part-{n:09d}.npz" for n in range(0, len(qids), BLOCK)}
    missing = [start for start, part in parts.items() if not part.is_file()]
    blocks = (
        made.vocabulary.encode_inputs(texts[n : n + BLOCK], settings.search.query_length)
        for n in missing
    )
    for start, found in zip(missing, student.passages_of_blocks(blocks), strict=True):
        temporary = folder / "part.partial.npz"
        np.savez(temporary, passages=found[0], scores=found[1])
        temporary.replace(parts[start])
        logger.info("candidates: %d/%d queries", min(start + BLOCK, len(qids)), len(qids))
    loaded = [np.load(part) for part in parts.values()]
    np.savez(
        folder / "candidates.npz",
        passages=np.concatenate([part["passages"] for part in loaded]),
        scores=np.concatenate([part["scores"] for part in loaded]),
    )
    (folder / "qids.json").write_text(json.dumps(qids), encoding="utf-8")
    for part in parts.values():
        part.unlink()


@dataclass(frozen=True)
class TrainingQueries:
    """What the student is asked: qid -> text, qid -> pid -> relevance of its positives, and
    qid -> the source of the query."""

    texts: dict[str, str]
    qrels: dict[str, dict[str, int]]
    sources: dict[str, str]


def training_queries(experiment: Experiment, made: Prepared) -> TrainingQueries:
    """The queries of every source in Candidates.sources, at most Candidates.max_queries of each."""
    asked = TrainingQueries({}, {}, {})
    for source in experiment.candidates.sources:
        read = _labelled if source == "labelled" else partial(_written, source)
        texts, qrels = read(experiment, made)
        asked.texts.update(texts)
        asked.qrels.update(qrels)
        asked.sources.update(dict.fromkeys(texts, source))
    return asked


def _labelled(experiment: Experiment, made: Prepared) -> _TextsAndQrels:
    """Queries of the training split that have a positive."""
    queries = made.queries(experiment.prepare.train_split)
    judged = made.qrels(experiment.prepare.train_split)
    least = experiment.prepare.min_relevance
    qids = [qid for qid in queries if max(judged[qid].values()) >= least]
    qids = [qids[i] for i in _drawn(len(qids), experiment.candidates)]
    return {q: queries[q].text for q in qids}, {q: judged[q] for q in qids}


def _written(source: str, experiment: Experiment, made: Prepared) -> _TextsAndQrels:
    """Texts that the student has learned to map to an identifier; its passages are the positives.

    They are read from the token arrays of the source, as the student reads them.
    """
    features = read_arrays(made.folder / "arrays" / source)
    inputs, targets = features["encoder_input_tokens"], features["decoder_target_tokens"]
    least, pids = experiment.prepare.min_relevance, made.store.pids
    texts, qrels = {}, {}
    for i in _drawn(len(inputs), experiment.candidates):
        qid = f"{source}:{i}"
        texts[qid] = made.vocabulary.decode(inputs[i].tolist())
        row = int(made.table.lookup(targets[i]))
        qrels[qid] = {pids[index]: least for index in made.table.passages_of(row)}
    return texts, qrels


def _drawn(count: int, settings: Candidates) -> np.ndarray:
    """Which of `count` queries are asked, ascending."""
    if not settings.max_queries or settings.max_queries >= count:
        return np.arange(count)
    rng = np.random.default_rng(settings.seed)
    return np.sort(rng.choice(count, settings.max_queries, replace=False))
