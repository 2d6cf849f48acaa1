"""Stage candidates: the student retrieves passages for the queries that it learned from."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import processes
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir import kept
from dgr_jax.retrieval import self_hits
from dgr_jax.retrieval.batching import BLOCK
from dgr_jax.stages import npz
from dgr_jax.stages.asked import training_queries
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.student import GENERATE
from dgr_jax.stages.systems import open_system
from dgr_jax.teaching.teachers import batched
from dgr_jax.training.arrays import write_arrays

logger = logging.getLogger(__name__)


def candidates(experiment: Experiment, folder: Path) -> None:
    """Writes candidates.npz (passages int32, scores f32 [n, depth]) and qids.json, in order.
    Identifiers of several views also give keys/, see retrieval.multiview_keys.

    Queries are retrieved in blocks that are kept, so that a cut-off stage goes on. While the device
    finishes a block, the next is tokenised. Several processes search together; the first writes.
    """
    prepared = Prepared.load(experiment.model_dir)
    asked = training_queries(experiment, prepared)
    search = experiment.candidates.search
    own = np.zeros(0, np.int64)
    if asked.own:
        search = search.deeper()
        rows = (prepared.store.index_of(q) if q in asked.own else -1 for q in asked.texts)
        own = np.fromiter(rows, np.int64, len(asked.texts))
    student = open_system(experiment, GENERATE.name, prepared, search)
    parts = {n: folder / f"part-{n:09d}.npz" for n in range(0, len(asked.texts), BLOCK)}
    missing = [start for start, part in parts.items() if not _is_whole(part)]
    missing = processes.agree(missing)  # what others see may be of a moment ago
    taken = _taken(asked.texts, missing)
    blocks = (student.encode(prepared.vocabulary, texts) for texts in taken)
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
        done = min(start + BLOCK, len(asked.texts))
        logger.info("candidates: %d/%d queries", done, len(asked.texts))
    if not processes.first():
        return
    _join(folder, list(parts.values()), len(asked.texts))
    (folder / "qids.json").write_text(json.dumps(list(asked.texts)), encoding="utf-8")
    for part in parts.values():
        part.unlink()


def _taken(texts: Mapping[str, str], starts: Container[int]) -> Iterator[list[str]]:
    """The texts of the blocks of BLOCK queries that begin at `starts`."""
    for place, block in enumerate(batched(texts.values(), BLOCK)):
        if place * BLOCK in starts:
            yield block


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


def _join(folder: Path, parts: Sequence[Path], queries: int) -> None:
    """Joins all parts into one candidates.npz and, where they hold keys, keys/; one part after the
    other is in memory."""
    columns = ("passages", "scores")
    with np.load(parts[0]) as first:
        shapes = {n: (first[n].dtype, (queries, *first[n].shape[1:])) for n in columns}
        keys = [name for name in first.files if name not in columns]
    rows = {n: npz.Rows(*shape, _stored(parts, n)) for n, shape in shapes.items()}
    npz.write(folder / "candidates.npz", rows)
    if keys:
        blocks = zip(*(_stored(parts, name) for name in keys), strict=True)
        write_arrays(folder / "keys", (dict(zip(keys, block, strict=True)) for block in blocks))


def _stored(parts: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    for part in parts:
        with np.load(part) as stored:
            yield stored[name]


STAGE = Stage(
    "candidates", candidates, settings=fields("candidates"), upstream=after(GENERATE.name)
)
