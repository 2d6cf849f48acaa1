"""The queries that a student is asked before it is taught, each with its positives.

A corpus gives many times as many texts to ask as it has passages. So they are held as bytes side by
side, and their ids, positives and sources are made when they are asked for.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from dgr_jax.experiments.generative import Candidates, Experiment
from dgr_jax.retrieval.batching import BLOCK
from dgr_jax.stages import judged
from dgr_jax.stages.generation_data import source_pairs
from dgr_jax.stages.prepared import Prepared
from dgr_jax.teaching.teachers import batched

Value = TypeVar("Value")
LABELLED = "labelled"


class WrittenIds:
    """The ids of the texts of a source that are asked: its name, and their places in it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.places = array("q")
        self._last: tuple[object, int] = ("", -1)  # what is asked once is asked again

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return (f"{self.source}:{place}" for place in self.places)

    def row_of(self, qid: object) -> int:
        """The row of an id; KeyError where it is none of these."""
        if qid == self._last[0] and qid:
            return self._last[1]
        source, _, place = str(qid).rpartition(":")
        if source == self.source and place.isdecimal():
            row = bisect.bisect_left(self.places, int(place))
            if row < len(self) and f"{source}:{self.places[row]}" == qid:
                self._last = qid, row
                return row
        raise KeyError(qid)


class Column(Mapping[str, Value]):
    """What is said of each id: made of its row when it is asked for."""

    def __init__(self, ids: WrittenIds, made: Callable[[int], Value]) -> None:
        self._ids, self._made = ids, made

    def __getitem__(self, qid: str) -> Value:
        return self._made(self._ids.row_of(qid))

    def __contains__(self, qid: object) -> bool:
        try:
            return self._ids.row_of(qid) >= 0
        except KeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


class Joined(Mapping[str, Value]):
    """Mappings that have no key in common, one after the other."""

    def __init__(self, parts: Sequence[Mapping[str, Value]]) -> None:
        self._parts = parts
        self._likely = 0  # the part that the last key was in

    def __getitem__(self, qid: str) -> Value:
        for place in range(self._likely, self._likely + len(self._parts)):
            place %= len(self._parts)
            try:
                value = self._parts[place][qid]
            except KeyError:
                continue
            self._likely = place
            return value
        raise KeyError(qid)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))


@dataclass(frozen=True)
class AskedOfSource:
    """The queries of one source: qid -> text, and qid -> pid -> relevance of its positives."""

    source: str
    texts: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]


class TrainingQueries:
    """What the student is asked. own: those that must not find the passage of their id."""

    def __init__(self, parts: Sequence[AskedOfSource], own: frozenset[str] = frozenset()) -> None:
        self._parts = parts
        self.own = own
        self.texts = Joined([part.texts for part in parts])
        self.qrels = Joined([part.qrels for part in parts])

    @property
    def sources(self) -> list[str]:
        """The sources, in the order of their queries."""
        return [part.source for part in self._parts]

    def by_source(self, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """qid -> the value of its source."""
        return Joined([_Same(part.texts, values[part.source]) for part in self._parts])


class _Same(Mapping[str, Value]):
    """Every key of a mapping -> one value."""

    def __init__(self, keys: Mapping[str, object], value: Value) -> None:
        self._keys, self._value = keys, value

    def __getitem__(self, qid: str) -> Value:
        if qid not in self._keys:
            raise KeyError(qid)
        return self._value

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def training_queries(experiment: Experiment, prepared: Prepared) -> TrainingQueries:
    """The queries of every source in Candidates.sources, at most Candidates.max_queries of each.

    Raises ValueError where a labelled query has the id of a text of another source.
    """
    parts, own = [], frozenset()
    for source in dict.fromkeys(experiment.candidates.sources):
        if source == LABELLED:
            part = _labelled(experiment, prepared)
            own = judged.self_hits(experiment.prepare, part.texts, prepared.store, part.qrels)
        else:
            part = _written(source, experiment, prepared)
        parts.append(part)
    for part in parts:
        others = Joined([other.texts for other in parts if other is not part])
        if part.source == LABELLED and (both := next((q for q in part.texts if q in others), "")):
            raise ValueError(
                f"split {experiment.prepare.train_split!r}: got a query of the id {both!r}, "
                "expected another, for a text of Candidates.sources has this one"
            )
    return TrainingQueries(parts, own)


def _labelled(experiment: Experiment, prepared: Prepared) -> AskedOfSource:
    """Queries of the training split that have a positive."""
    queries = prepared.queries(experiment.prepare.train_split)
    grades = prepared.qrels(experiment.prepare.train_split)
    least = experiment.prepare.min_relevance
    qids = [qid for qid in queries if max(grades[qid].values()) >= least]
    qids = [qids[i] for i in _drawn(len(qids), experiment.candidates)]
    texts = {qid: queries[qid].text for qid in qids}
    return AskedOfSource(LABELLED, texts, {qid: grades[qid] for qid in qids})


def _written(source: str, experiment: Experiment, prepared: Prepared) -> AskedOfSource:
    """Texts that the student has learned from, cut as it reads them; the passages that they are
    made of are the positives."""
    settings, vocabulary = experiment.prepare, prepared.vocabulary
    longest = settings.query_length - 1 - bool(vocabulary.views)  # EOS and the marker of a view
    tests = judged.test_texts(settings, prepared.folder)
    read = partial(source_pairs, settings, source, prepared.store, {}, (), test_queries=tests)
    placed = enumerate(read())
    if experiment.candidates.max_queries:
        chosen = np.zeros(sum(1 for _ in read()), bool)
        chosen[_drawn(len(chosen), experiment.candidates)] = True
        placed = itertools.compress(placed, chosen)
    ids, texts, passages = WrittenIds(source), _Texts(), array("i")
    for block in batched(placed, BLOCK):
        encoded = vocabulary.encode_all([text for _, (text, _, _) in block])
        for (place, (_, passage, _)), tokens in zip(block, encoded, strict=True):
            ids.places.append(place)
            texts.append(vocabulary.decode(tokens[:longest]))
            passages.append(passage)
    least, pids = settings.min_relevance, prepared.store.pids
    return AskedOfSource(
        source,
        Column(ids, texts.__getitem__),
        Column(ids, lambda row: {pids[passages[row]]: least}),
    )


class _Texts:
    """Texts side by side, as UTF-8."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self._bytes += text.encode()
        self._ends.append(len(self._bytes))

    def __getitem__(self, row: int) -> str:
        return self._bytes[self._ends[row] : self._ends[row + 1]].decode()


def _drawn(count: int, settings: Candidates) -> np.ndarray:
    """Which of `count` queries are asked, ascending."""
    if not settings.max_queries or settings.max_queries >= count:
        return np.arange(count)
    rng = np.random.default_rng(settings.seed)
    return np.sort(rng.choice(count, settings.max_queries, replace=False))
