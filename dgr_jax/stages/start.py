"""Stage start: token embeddings from the passages, and the student that begins with them.

It is a stage of experiments whose `initial` is Corpus alone, and leaves

    tokens.npy   int32 [m], those that occur in the passages
    rows.npy     f32 [m, D], their embeddings
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.sparse
from flax import linen as nn

from dgr_jax import partitioning
from dgr_jax.corpora import words
from dgr_jax.corpora.store import PassageStore
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir import kept
from dgr_jax.models import corpus_start
from dgr_jax.models.initial import Corpus
from dgr_jax.stages.prepared import PREPARE, Prepared
from dgr_jax.training import hash_random

logger = logging.getLogger(__name__)

_WORDS = 4  # a sentence that counts has at least so many
_BLOCK = 2048  # passages that are counted together
_SAY = 100_000  # passages after which it is said how far it is


def start(experiment: Experiment | DenseExperiment, folder: Path) -> None:
    """Writes the embeddings, and report.json with what they were made from."""
    assert isinstance(experiment.initial, Corpus)  # as the stage is there
    prepared = Prepared.load(experiment.model_dir)
    blocks = list(counted(prepared.store, prepared.vocabulary, experiment.initial))
    tokens, rows = corpus_start.embeddings(blocks, experiment.width)
    if experiment.initial.shuffled:
        rows = np.random.default_rng(0).permutation(rows)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "rows.npy", rows)
    report = {
        "passages": sum(block.shape[0] for block in blocks[1::2]),
        "sentences": sum(block.shape[0] for block in blocks[::2]),
        "pieces": prepared.vocabulary.pieces,
        "pieces_with_a_row": len(tokens),
        "width": experiment.width,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    logger.info(
        "start: embeddings of %s of %s pieces from %s sentences and %s passages; all others start "
        "at random",
        *(f"{report[name]:,}" for name in ("pieces_with_a_row", "pieces", "sentences", "passages")),
    )


def counted(
    store: PassageStore, vocabulary: Vocabulary, settings: Corpus
) -> Iterator[scipy.sparse.csr_array]:
    """Pieces of the sentences and of the passages, block by block of passages: two arrays each."""
    chosen = range(0, len(store), -(-len(store) // settings.max_passages))
    for first in range(0, len(chosen), _BLOCK):
        passages = [store[index] for index in chosen[first : first + _BLOCK]]
        sentences = [
            sentence
            for passage in passages
            for sentence in words.sentences(passage.text)
            if len(words.windows(sentence)[0]) >= _WORDS
        ]
        contents = [passage.contents for passage in passages]
        for texts, binary in ((sentences, True), (contents, False)):
            tokens = vocabulary.encode_all(texts)
            yield corpus_start.counted(tokens, vocabulary.pieces, binary=binary)
        done = first + len(passages)
        if done == len(chosen) or done // _SAY > first // _SAY:
            logger.info("start: counted %s of %s passages", f"{done:,}", f"{len(chosen):,}")


def after_start(*stages: str) -> Callable[[Any], tuple[str, ...]]:
    """These stages before one that trains first, and this one where there is any."""
    return lambda e: (*stages, STAGE.name) if STAGE.name in e.stages else stages


def parameters(experiment: Experiment | DenseExperiment, model: Any, seed: int) -> Any:
    """Parameters that are random by this seed, but for the embeddings, which are those of stage
    start. They lie on the experiment's mesh."""
    folder = Path(experiment.model_dir) / STAGE.name
    tokens, rows = (_load(folder / f"{name}.npy") for name in ("tokens", "rows"))
    mesh, rules = partitioning.make_mesh(experiment.mesh), experiment.mesh.rules

    def create(tokens: jax.Array, rows: jax.Array) -> Any:
        drawn = partitioning.boxed_params(model, hash_random.key(jax.random.PRNGKey(seed)))
        return corpus_start.put(nn.unbox(drawn), tokens, rows)

    abstract = partitioning.abstract_params(model, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, out_shardings=shardings)(tokens, rows)


def _load(file: Path) -> np.ndarray:
    with kept.reading(file) as opened:
        return np.load(opened, allow_pickle=False)


STAGE = Stage(
    "start",
    start,
    settings=fields("initial", "width"),
    upstream=after(PREPARE),
    alone=True,
)
