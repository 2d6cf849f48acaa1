"""Examples of passages that were added to an index, and of those that a student knows: what it
learns from when it is refreshed.

Axis letters: P passages of a version, E examples, T identifier length, C codes of a level.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage
from dgr_jax.data import examples
from dgr_jax.data.examples import Sources
from dgr_jax.data.same_text import normalised
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept
from dgr_jax.settings import from_described
from dgr_jax.stages import judged
from dgr_jax.training.arrays import Features, read_arrays

LEARNED = "learned.json"  # beside the checkpoints of a refreshed student
_BLOCK = 1024


def learned(student: Path) -> dict[str, str]:
    """pid -> digest of the passages that a student has learned besides those of the prepare stage;
    {}: it was not refreshed."""
    path = student / LEARNED
    if not path.is_file():
        return {}
    with kept.reading(path):
        return dict(kept.read_json(path))


def digest(passage: Passage, identifier: np.ndarray) -> str:
    """What tells the contents and the identifier of a passage, int32 [T], from others."""
    text = json.dumps([passage.title, passage.text, identifier[identifier > 0].tolist()])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Slices:
    """The passages of a version of the index, by what a student knows of them.

    prepared: folder of the prepare stage; index: of the version; student: of who begins.
    settings: those of the prepare stage, as it has recorded them.
    """

    prepared: Path
    index: Path
    student: Path
    settings: Mapping[str, Any]

    @cached_property
    def store(self) -> PassageStore:
        """The passages."""
        return PassageStore(self.index / "passages")

    @cached_property
    def table(self) -> IdentifierTable:
        """Their identifiers."""
        return IdentifierTable.load(self.index / "identifiers")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """That of the student."""
        return Vocabulary.load(self.prepared)

    @cached_property
    def _first(self) -> PassageStore:
        return PassageStore(self.prepared / "passages")

    @cached_property
    def _first_table(self) -> IdentifierTable:
        return IdentifierTable.load(self.prepared / "identifiers")

    @cached_property
    def known(self) -> np.ndarray:
        """int8 [P]: 2 for a passage of the prepare stage, 1 for one that was learned after that, 0
        for one that was not learned."""
        first, later = self._first, learned(self.student)
        before, now = _identifiers(self._first_table), _identifiers(self.table)
        known = np.zeros(len(self.store), np.int8)
        for index, passage in enumerate(self.store):
            mark = digest(passage, now[index])
            if passage.pid in first:
                place = first.index_of(passage.pid)
                known[index] = 2 * (digest(first[place], before[place]) == mark)
            if later.get(passage.pid) == mark:
                known[index] = known[index] or 1
        return known

    def all_learned(self) -> dict[str, str]:
        """pid -> digest, as `learned` of a student that has learned all passages."""
        chosen, rows = np.flatnonzero(self.known < 2), _identifiers(self.table)
        return {self.store.pids[i]: digest(self.store[i], rows[i]) for i in chosen.tolist()}

    def sources(self, pseudo_query_path: str) -> Sources:
        """Where texts of passages that came later are from: as in the prepare stage, but for labels
        and, where there is no file, sentences."""
        own = from_described(Sources, self.settings["sources"], str(self.prepared))
        rate = own.pseudo_queries
        if pseudo_query_path or not own.passages + own.pseudo_queries:
            rate = rate or 1.0
        return dataclasses.replace(
            own, labelled=0.0, pseudo_queries=rate, pseudo_query_path=pseudo_query_path
        )

    def of_passages(self, chosen: np.ndarray, sources: Sources) -> dict[str, Features]:
        """Source -> features of the texts of passages, int [n]; sources without a text are not
        there."""
        tests = self._test_queries() if sources.pseudo_query_path else frozenset()
        passages: Any = [self.store[index] for index in chosen.tolist()]
        features = {}
        for source in sources.rates():
            if source == "pseudo_queries" and sources.pseudo_query_path:
                given = examples.pairs(source, sources, store=self.store, test_queries=tests)
                asked = set(chosen.tolist())
                pairs = (pair for pair in given if pair[1] in asked)
            else:
                given = examples.pairs(source, sources, store=passages)
                pairs = ((text, int(chosen[place]), qid) for text, place, qid in given)
            held = list(examples.of_docids(pairs, self.store, self.table))
            if held:
                starts = range(0, len(held), _BLOCK)
                features[source] = _joined([self._features(held[s : s + _BLOCK]) for s in starts])
        return features

    def _features(self, held: Any) -> Features:
        length = self.table.tokens.shape[1]
        return examples.features(held, self.vocabulary, int(self.settings["query_length"]), length)

    def _test_queries(self) -> frozenset[str]:
        """The queries that are tested on, `normalised`: no pseudo-query may copy them."""
        named = [*self.settings.get("test_splits", ()), self.settings.get("validation_split", "")]
        return frozenset(
            normalised(query.text)
            for split in filter(None, named)
            for query in judged.queries(self.prepared, split).values()
        )

    def before(self, source: str, count: int, seed: int) -> Features | None:
        """Features of at most `count` examples of the prepare stage, drawn by the seed; None where
        there are none. Those of passages that have gone are left out."""
        if not (self.prepared / "arrays" / source).is_dir():
            return None
        arrays = read_arrays(self.prepared / "arrays" / source)
        rows = np.flatnonzero(self._stays(arrays["decoder_target_tokens"]))
        drawn = np.sort(np.random.default_rng([seed, 4]).permutation(len(rows))[:count])
        if not len(drawn):
            return None
        return self._wide({name: values[rows[drawn]] for name, values in arrays.items()})

    def _stays(self, targets: np.ndarray) -> np.ndarray:
        """bool [E]: whether the passage of an identifier of the prepare stage is there still."""
        table = self._first_table
        pids = (self.store.pids[index] for index in np.flatnonzero(self.known == 2).tolist())
        staying = np.zeros(len(self._first), bool)
        staying[[self._first.index_of(pid) for pid in pids]] = True
        rows = table.lookup(targets)
        return staying[table.passages[table.offsets[np.maximum(rows, 0)]]] & (rows >= 0)

    def _wide(self, features: Features) -> Features:
        """Features whose identifiers are as long as those of the version."""
        more = self.table.tokens.shape[1] - features["decoder_target_tokens"].shape[1]
        return {
            name: np.pad(values, ((0, 0), (0, more))) if name.startswith("decoder") else values
            for name, values in features.items()
        }


def blocks_of(features: Features) -> Iterator[Features]:
    """The same in blocks of at most so many examples."""
    count = len(next(iter(features.values())))
    for start in range(0, count, _BLOCK):
        yield {name: values[start : start + _BLOCK] for name, values in features.items()}


def shares(rates: Mapping[str, float], total: float) -> dict[str, float]:
    """Rates of the same proportions whose sum is `total`."""
    return {name: total * rate / math.fsum(rates.values()) for name, rate in rates.items()}


def _identifiers(table: IdentifierTable) -> np.ndarray:
    """int32 [P, T]: the identifier of each passage, 0 of one that has none."""
    rows = table.rows_of_passages()
    return np.where(rows[:, None] >= 0, table.tokens[np.maximum(rows, 0)], 0)


def _joined(blocks: list[Features]) -> Features:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
