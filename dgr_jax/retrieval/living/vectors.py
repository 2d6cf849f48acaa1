"""Vectors of passages, of every dense retriever that was trained on the prepare stage."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora.store import PassageStore
from dgr_jax.decoding.trie_build import size_class
from dgr_jax.model_dir import kept
from dgr_jax.model_dir.records import STUDENT
from dgr_jax.retrieval import dense, exact_search, kept_vectors, kinds
from dgr_jax.retrieval.dense import VECTORS, Encoder
from dgr_jax.retrieval.living.change import Change
from dgr_jax.settings import restored

_CHUNK = 1 << 16  # rows that are copied at a time


def write(change: Change) -> None:
    """Writes the vectors of a version: those of passages that stay, as they were, and those that
    the encoder has for the others; of all, where it is another encoder than before."""
    for stage in change.students("dense"):
        folder = kept_vectors.place(change.new, stage)
        folder.mkdir(parents=True)
        try:
            old, capacity = kept_vectors.located(stage, change.old)
        except ValueError:
            student = _Student(stage)
            encode = change.vocabulary.encode_inputs
            passages = PassageStore(change.new / "passages")
            dense.embed(student.encoder, passages, encode, folder / VECTORS, student.search)
            capacity = 0
        else:
            _append(change, stage, old / VECTORS, folder / VECTORS)
        count = change.num_passages
        capacity = capacity if count <= capacity else size_class(count + count // 4)
        kept_vectors.describe(folder, stage, capacity)


class _Student:
    """An encoder on one device, and its settings."""

    def __init__(self, stage: Path) -> None:
        student = kinds.read_student(stage)
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        params = kinds.params_of(student, stage, mesh, partitioning.RULES)
        with kept.reading(stage / STUDENT):
            model = restored(dense.DualEncoderConfig, student.model)
            self.search = restored(dense.DenseSearch, student.search)
        self.encoder = Encoder(model, params, mesh)


def _append(change: Change, stage: Path, old: Path, new: Path) -> None:
    """Writes the vectors of the passages that stay, and then of those that are added."""
    vectors, stay = exact_search.open_vectors(old), np.flatnonzero(change.stay)
    shape = change.num_passages, vectors.shape[1]
    written = np.lib.format.open_memmap(new, mode="w+", dtype=vectors.dtype, shape=shape)
    for start in range(0, len(stay), _CHUNK):
        part = stay[start : start + _CHUNK]
        written[start : start + len(part)] = vectors[part]
    if change.added:
        student = _Student(stage)
        texts = [passage.contents for passage in change.added]
        tokens = change.vocabulary.encode_inputs(texts, student.search.passage_length)
        written[len(stay) :] = student.encoder.passages(tokens, student.search)
    written.flush()
    blank = dense.open_blank(old, len(vectors))
    number = np.cumsum(change.stay) - 1
    dense.name_blank(new, number[blank[change.stay[blank]]], change.num_passages)
