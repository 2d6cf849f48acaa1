"""Rows of the output embedding for passages with a token of their own, of every student that was
trained on the prepare stage."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora.store import PassageStore
from dgr_jax.data.examples import Sources
from dgr_jax.decoding.trie_build import size_class
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept
from dgr_jax.model_dir.records import STUDENT
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval import kept_rows, kinds
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.kept_rows import KeptRows
from dgr_jax.retrieval.living import incdsi
from dgr_jax.retrieval.living.change import Change
from dgr_jax.retrieval.search_programs import applied
from dgr_jax.settings import from_described, restored

logger = logging.getLogger(__name__)

_BATCH = 64  # queries that are read together


def write(change: Change) -> None:
    """Writes the rows of a version; nothing where all of its passages are those of training.

    Rows of passages that stay are kept as they were, unless they are those of another student.
    """
    if not (change.new / "identifiers" / "identifiers.json").is_file():
        return
    table = IdentifierTable.load(change.new / "identifiers")
    if table.view != "atomic":
        return
    tokens = table.tokens[table.rows_of_passages(), 0]
    later = tokens > IdentifierTable.load(change.prepared / "identifiers").tokens.max()
    for stage in change.students("docid") if later.any() else ():
        start = time.perf_counter()
        rows, states, solved = _of_student(change, stage, tokens, later)
        KeptRows(tokens[later], rows[later], states).save(change.new, stage)
        logger.info(
            "index: %s rows of %s by IncDSI, in %.1f s",
            *(f"{solved:,}", stage.name, time.perf_counter() - start),
        )


def _of_student(
    change: Change, stage: Path, tokens: np.ndarray, later: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """(rows f32 [P, D], states f32 [P, D] of the passages of a version, how many rows are new).

    tokens: int32 [P]; later: bool [P], those that came after training.
    """
    student = _Student(stage, change)
    table, new = kept_rows.of(student.params), later
    states = np.zeros((len(tokens), table.shape[1]), np.float32)
    try:
        before = kept_rows.load(change.old, stage)
    except ValueError:  # of a student that was trained again
        before = None
    if before is None:
        student.read(np.flatnonzero(~new), states)
    else:
        new = np.arange(len(tokens)) >= change.num_staying
        table = table.copy()
        table[before.tokens] = before.rows
        states[~new] = before.states[change.stay]
    rows = table[tokens]
    student.solve(rows, states, np.flatnonzero(new))
    return rows, states, int(np.count_nonzero(new))


class _Student:
    """A student on one device, and the texts of passages as it has learned from such."""

    def __init__(self, stage: Path, change: Change) -> None:
        student = kinds.read_student(stage)
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        self.params = kinds.params_of(student, stage, mesh, partitioning.RULES)
        with kept.reading(stage / STUDENT):
            config = restored(T5Config, student.model)
            self._length = restored(Search, student.search).query_length
        self._encode = change.vocabulary.encode_inputs
        self._states = _states_fn(config)
        self._settings = change.incdsi
        self._passages = PassageStore(change.new / "passages")
        sources = change.settings.get("sources")
        self._sources = from_described(Sources, sources, str(change.prepared))

    def read(self, passages: np.ndarray, states: np.ndarray) -> None:
        """Fills in the states f32 [P, D] of passages, int [n]: of the first text of each."""
        for start in range(0, len(passages), _BATCH):
            part = passages[start : start + _BATCH]
            states[part] = self._of([self._texts(index)[0] for index in part])

    def solve(self, rows: np.ndarray, states: np.ndarray, new: np.ndarray) -> None:
        """Fills in the rows and states f32 [P, D] of new passages, int [n], a block at a time; a
        block knows all passages of those before it."""
        settings, (count, width) = self._settings, rows.shape
        there = np.ones(size_class(count), bool)
        there[count:] = False
        there[new] = False
        wide = [np.pad(array, ((0, len(there) - count), (0, 0))) for array in (rows, states)]
        for start in range(0, len(new), settings.block):
            part = new[start : start + settings.block]
            texts = [self._texts(index)[: settings.queries] for index in part]
            queries = np.zeros((settings.block, settings.queries, width), np.float32)
            given = np.arange(settings.queries) < np.array(
                [[len(t)] for t in texts] + [[1]] * (settings.block - len(part))
            )
            queries[: len(part)][given[: len(part)]] = self._of([t for ts in texts for t in ts])
            solved = incdsi.solve(settings, *wide, there, queries, given)
            wide[0][part], wide[1][part] = np.asarray(solved)[: len(part)], queries[: len(part), 0]
            there[part] = True
        rows[:], states[:] = wide[0][:count], wide[1][:count]

    def _texts(self, index: int) -> list[str]:
        """What stands for queries of a passage: its title, its sentences, and its chunks."""
        passage, sources = self._passages[int(index)], self._sources
        texts = [passage.title, *sources.sentences(passage), *sources.chunks(passage)]
        return list(dict.fromkeys(filter(str.strip, texts)))

    def _of(self, texts: Sequence[str]) -> np.ndarray:
        """f32 [n, D]: the state from which the student writes the token of each text."""
        tokens, parts = self._encode(texts, self._length), []
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            padded = np.pad(part, ((0, _BATCH - len(part)), (0, 0)))
            parts.append(np.asarray(self._states(self.params, padded))[: len(part)])
        return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _states_fn(config: T5Config) -> Any:
    """The compiled (params, int32 [B, Q]) -> f32 [B, D], whose products with the rows of the
    output embedding are the logits of the first token."""

    def states(params: Any, tokens: jax.Array) -> jax.Array:
        apply = applied(config, params)
        encoded = apply(tokens, method="encode")
        start = jnp.zeros((len(tokens), 1, 1), jnp.int32)
        state = apply(encoded, tokens, start, method="decode")[:, 0, 0].astype(jnp.float32)
        return state / math.sqrt(config.emb_dim) if config.logits_via_embedding else state

    return jax.jit(states)
