"""How large the corpus is that lies there: what a plan counts, and what it takes for granted.

Nothing is written and nothing is fetched; a collection is read through once.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dgr_jax import ranges
from dgr_jax.corpora import lines
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.model_dir import records
from dgr_jax.stages import pipeline
from dgr_jax.stages.prepared import Prepared

logger = logging.getLogger(__name__)

_ALL = 10_000  # passages whose words are counted; of more, every hundredth
_SAY = 1_000_000  # passages after which progress is logged
_LINES = 1 << 20  # lines of a file that are counted together

PASSAGES = ranges.between(2, 2**31 - 1)  # their indices are int32
TAKEN = CorpusSize(8_800_000, 55, 500_000, 20)  # MS MARCO's, where nothing can be counted


def corpus_of(experiment: Experiment | DenseExperiment, flag: str = "") -> tuple[CorpusSize, str]:
    """The corpus of an experiment, counted where it is at hand, and how it is known.

    flag: the flag of the command line that gives another corpus; the answer names it.
    """
    corpus, where = counted(experiment)
    if corpus is not None:
        return corpus, f"as counted in {where}"
    if size := getattr(experiment.collection, "size", 0):
        owner = type(experiment.collection).__name__
        return TAKEN._replace(passages=size), f"{owner}.size, else as MS MARCO, as {where}"
    return TAKEN, f"those of MS MARCO, as {where}: give the collection, or {flag}"


def counted(experiment: Experiment | DenseExperiment) -> tuple[CorpusSize | None, str]:
    """The corpus of an experiment and where it was counted: what is prepared in MODEL_DIR, or else
    the collection; None and the reason, where neither is at hand."""
    folder = Path(experiment.model_dir) / "prepare"
    settings = pipeline.settings_of(experiment, ["prepare"])["prepare"]
    if records.is_done(folder, settings):
        prepared = Prepared.load(experiment.model_dir)
        judged = (
            (qid, grade)
            for split in experiment.prepare.train_splits
            if (prepared.folder / "collection" / "qrels" / f"{split}.tsv").is_file()
            for qid, grades in prepared.qrels(split).items()
            for grade in grades.values()
        )
        passages = _spread(prepared.store)
        return _corpus(experiment, passages, len(prepared.store), judged), str(folder)
    if why := _is_absent(experiment.collection):
        return None, why
    logger.info("counting the passages of %s", type(experiment.collection).__name__)
    judged = (
        (qrel.qid, qrel.relevance)
        for split in experiment.prepare.train_splits
        for qrel in _judgements(experiment, split)
    )
    passages = _every(experiment.collection.passages())
    return _corpus(experiment, passages, 0, judged), type(experiment.collection).__name__


def sample(experiment: Experiment | DenseExperiment) -> list[str]:
    """The texts of at most about _ALL passages, where the corpus is at hand: evenly spaced ones of
    what is prepared, with the training queries that a plan counts; otherwise the first of the
    collection."""
    folder = Path(experiment.model_dir) / "prepare"
    if records.is_done(folder, pipeline.settings_of(experiment, ["prepare"])["prepare"]):
        store = Prepared.load(experiment.model_dir).store
        counted = getattr(getattr(experiment, "plan", None), "queries_weight", 0)
        asked = (store.queries or {}) if counted else {}
        return [" ".join([p.contents, *asked.get(p.pid, ())]) for _, p in _spread(store)]
    if _is_absent(experiment.collection):
        return []
    first = itertools.islice(experiment.collection.passages(), _ALL)
    return [passage.contents for passage in first]


def _is_absent(collection: Any) -> str:
    """Why the passages of a collection cannot be counted, blank where they can be."""
    if missing := [name for name, path in collection.inputs(()).items() if path is None]:
        return f"the collection lacks {', '.join(missing)}"
    while hasattr(collection, "collection"):  # a part of another one
        collection = collection.collection
    if not getattr(collection, "is_here", lambda: True)():
        return f"the library has not fetched {collection.dataset} yet"
    return ""


def _judgements(experiment: Experiment | DenseExperiment, split: str) -> Iterator[Any]:
    """The judgements of a split; none where it has no file."""
    if all(experiment.collection.inputs((split,)).values()):
        yield from experiment.collection.qrels(split)


def _corpus(
    experiment: Experiment | DenseExperiment,
    passages: Iterable[tuple[int, Passage]],
    num_passages: int,
    judged: Iterable[tuple[str, int]],
) -> CorpusSize:
    """The size of a corpus, from some of its passages.

    passages: those that are looked at, each with its number from 1. num_passages: how many
    there are; 0: as many as the last number. judged: (qid, relevance) of the training queries.
    """
    sources, last, seen, words, sentences = experiment.prepare.sources, 0, 0, 0, 0
    for last, passage in passages:
        if last <= _ALL or last % 100 == 0 or num_passages:
            seen += 1
            words += len(passage.contents.split())
            sentences += sum(1 for _ in sources.sentences(passage))
    num_passages = num_passages or last
    positives = [qid for qid, grade in judged if grade >= experiment.prepare.min_relevance]
    written = sentences / seen
    if sources.pseudo_query_path:
        file = lines.place(sources.pseudo_query_path)
        written = _lines(file) / num_passages if file.is_file() else TAKEN.pseudo_queries
    return CorpusSize(
        num_passages, round(words / seen, 1), len(set(positives)), round(written, 1), len(positives)
    )


def _spread(store: PassageStore) -> Iterator[tuple[int, Passage]]:
    """At most about _ALL passages of a store, evenly spaced, with their numbers from 1."""
    for index in range(0, len(store), max(1, len(store) // _ALL)):
        yield index + 1, store[index]


def _every(passages: Iterable[Passage]) -> Iterator[tuple[int, Passage]]:
    """All passages with their numbers from 1; progress is logged."""
    for count, passage in enumerate(passages, start=1):
        if count % _SAY == 0:
            logger.info("counted %s passages so far; --corpus counts none", f"{count:,}")
        yield count, passage


def _lines(path: Path) -> int:
    return sum(count for *_, count in lines.places(path, _LINES))
