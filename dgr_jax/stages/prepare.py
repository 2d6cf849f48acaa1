"""Stage prepare: collection -> passages, vocabulary, identifiers, trie, tasks, token arrays."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dgr_jax import kept, writer_lock
from dgr_jax.corpora import beir, checks, store, trec
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Collection, Qrel, Query
from dgr_jax.data import loading
from dgr_jax.data.examples import Part
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.dense_experiment import DenseExperiment, DensePrepare
from dgr_jax.experiment import Experiment, Prepare
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.records import RECORD, read_record, write_record
from dgr_jax.retrieval.view_indexes import ViewIndexes
from dgr_jax.shipped import resources
from dgr_jax.stages import generation_data, identifiers
from dgr_jax.stages.generation_data import Opened, Work
from dgr_jax.stages.identifiers import Identified
from dgr_jax.training import arrays

logger = logging.getLogger(__name__)

UNJUDGED = "unjudged"  # folder of the queries of splits without judgements, in BEIR layout


def prepare(
    experiment: Experiment,
    folder: Path,
    everywhere: Callable[[Work, Iterable[Part]], None] | None = None,
) -> None:
    """Make MODEL_DIR/prepare, with a TFDS dataset and by the collection's SeqIO tasks where
    TensorFlow and SeqIO are installed; no later stage needs them.

    everywhere: makes the generation examples on workers, see `generation_data.write`.
    """
    settings, train = experiment.prepare, experiment.prepare.train_split
    passages, queries, qrels = read(experiment, folder, (train,))
    with _part("identifiers"):
        if isinstance(settings.identifiers, Multiview):
            tested = (query for split in settings.test_splits for query in queries[split].values())
            made = identifiers.views(settings, folder, passages, tested)
        else:
            made = identifiers.docids(settings, folder, passages)
    opened = Opened(passages, made, queries[train], qrels[train])
    with _part("examples"):
        counts = generation_data.write(Work(settings, folder), opened, everywhere)
    vocabulary = made.vocabulary
    _follow_tasks(settings, folder, made)
    report = {
        "passages": len(passages),
        "queries": {split: len(found) for split, found in queries.items()},
        "queries_cut": cut(vocabulary, queries, settings.query_length),
        "qrels": {split: len(found) for split, found in qrels.items()},
        "examples": counts,
        "vocabulary": {"text": vocabulary.text_size, "size": vocabulary.size},
        "identifiers": made.report,
    }
    write_report(folder, report, settings)


def write_report(folder: Path, report: dict[str, Any], settings: Prepare | DensePrepare) -> None:
    """Writes report.json and says what is in it."""
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for line in _readable(report, settings):
        logger.info("prepare: %s", line)


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    """Logs how long a part of the stage took."""
    start = time.perf_counter()
    yield
    logger.info("prepare: %s in %.1f s", name, time.perf_counter() - start)


def read(
    experiment: Experiment | DenseExperiment, folder: Path, train: tuple[str, ...]
) -> tuple[PassageStore, dict[str, dict[str, Query]], dict[str, list[Qrel]]]:
    """Writes passages/, collection/ (queries and judgements) and spiece.model; -> the passages,
    and split -> queries by qid, and judgements of those splits that have some.

    train: splits to learn from; each must have a positive. A test split may have answers instead of
    judgements, see `evaluation.answer_hits`: its queries lie in unjudged/.
    """
    settings, collection = experiment.prepare, experiment.collection
    collection.check(settings.splits)
    with _part("passages"):
        passages = store.write(collection.passages(), folder / "passages")
        queries = {s: {q.qid: q for q in collection.queries(s)} for s in settings.splits}
    qrels = {}
    for split in settings.splits:
        if (found := _judgements(collection, split, queries[split], split in train)) is None:
            beir.write_beir(folder / UNJUDGED / split, None, queries[split].values(), {})
            continue
        where = f"qrels of split {split!r}"
        qrels[split] = checks.check_qrels(found, queries[split], passages, where=where).kept
        if not qrels[split]:
            raise ValueError(f"{where}: found none; expected a judged query or more")
    for split in train:
        if not any(qrel.relevance >= settings.min_relevance for qrel in qrels[split]):
            raise ValueError(
                f"split {split!r} has no positive: no relevance of {settings.min_relevance} or "
                f"more ({type(settings).__name__}.min_relevance)"
            )
    judged = {q.qid: q for split in qrels for q in queries[split].values()}
    beir.write_beir(folder / "collection", None, judged.values(), qrels)
    learned = {q.qid: q.text for split in train for q in queries[split].values()}
    with _part("vocabulary"):
        texts = itertools.chain((p.contents for p in passages), learned.values())
        settings.vocabulary.write(folder, texts)
    return passages, queries, qrels


def _judgements(
    collection: Collection, split: str, queries: Mapping[str, Query], learned: bool
) -> list[Qrel] | None:
    """None of a test split that has answers instead."""
    try:
        return list(collection.qrels(split))
    except FileNotFoundError:
        if learned or not any(query.answers for query in queries.values()):
            raise
    logger.info("prepare: split %r has no judgements, only answers", split)
    return None


def _follow_tasks(settings: Prepare, folder: Path, made: Identified) -> None:
    """Registers the SeqIO tasks of the dataset, by the file of the collection in tasks/: they say
    what an example is. Where one makes other features than those written, it writes them.

    Compared are the first 4,096 examples; of several files, which TFDS reads by turns, those that
    come first of the first file.
    """
    if without_tasks(settings):
        return
    with loading.quietly():
        from dgr_jax.data import datasets, prepared, tasks
        from dgr_jax.data.feature_converters import GenerationConverter

    rates = settings.sources.rates()
    task_file(settings.tasks).register(tasks.Prepared(folder / "tfds", made.vocabulary, rates))
    lengths = {"inputs": settings.query_length, "targets": made.length}
    for source in rates:
        task, written = f"{settings.tasks}_{source}", folder / "arrays" / source
        blocks = datasets.arrays(task, lengths, GenerationConverter())
        first, there = next(blocks), arrays.read_arrays(written)
        seen = prepared.in_order(folder / "tfds", generation_data.NAME, source)
        seen = min(seen, len(first["encoder_input_tokens"]))
        if not all(np.array_equal(rows[:seen], there[name][:seen]) for name, rows in first.items()):
            logger.info("prepare: %s makes features of its own", task)
            shutil.rmtree(written)
            arrays.write_arrays(written, itertools.chain([first], blocks))


def without_tasks(settings: Prepare | DensePrepare) -> bool:
    """Whether there is no SeqIO to follow tasks with: says so."""
    if reason := loading.missing():
        path = _task_path(settings.tasks)
        logger.warning(
            "prepare: writes token arrays, and neither SeqIO tasks nor a TensorFlow dataset (%s); "
            "the arrays are the same, unless %s makes features of its own",
            *(reason, path),
        )
    return bool(reason)


def _task_path(name: str) -> Path:
    folder = resources("tasks")
    there = sorted(f.stem for f in folder.glob("[a-z]*.py"))
    if name not in there:
        raise ValueError(f"Prepare.tasks: got {name!r}, expected one of {', '.join(there)}")
    return folder / f"{name}.py"


def task_file(name: str) -> ModuleType:
    """The module tasks/`name`.py, from the package or the checkout."""
    path = _task_path(name)
    spec = importlib.util.spec_from_file_location(f"dgr_jax.tasks.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Prepared:
    """What the prepare stage left, opened: `table` of docids, or `indexes` of several views; a
    dense retriever has neither."""

    folder: Path
    store: PassageStore
    vocabulary: Vocabulary
    table: IdentifierTable | None
    indexes: ViewIndexes | None

    @classmethod
    def load(cls, model_dir: str | Path, *, identifiers: bool = True) -> Prepared:
        folder = Path(model_dir) / "prepare"
        vocabulary = Vocabulary.load(folder)
        views, table, indexes = bool(vocabulary.views), None, None
        if identifiers and views:
            indexes = ViewIndexes.load(folder, vocabulary)
        elif identifiers:
            table = IdentifierTable.load(folder / "identifiers")
        return cls(folder, PassageStore(folder / "passages"), vocabulary, table, indexes)

    def queries(self, split: str) -> dict[str, Query]:
        """qid -> query of a split."""
        alone = self._unjudged(split)
        found = alone.all_queries() if alone else self._judged.queries(split)
        return {query.qid: query for query in found}

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """qid -> pid -> relevance of a split; {} of one that has answers instead."""
        return {} if self._unjudged(split) else trec.qrels_in_memory(self._judged.qrels(split))

    def _unjudged(self, split: str) -> beir.BeirCollection | None:
        folder = self.folder / UNJUDGED / split
        if not folder.is_dir():
            return None
        kept.whole(folder)
        return beir.BeirCollection(str(folder))

    @property
    def _judged(self) -> beir.BeirCollection:
        kept.whole(self.folder / "collection")
        return beir.BeirCollection(str(self.folder / "collection"))


def export(experiment: Experiment | DenseExperiment, target: str) -> None:
    """Copy the prepare stage, without its TFDS dataset, to MODEL_DIR `target` on its way elsewhere.

    There every later stage runs without TensorFlow and without the collection.
    """
    origin = Path(experiment.model_dir) / "prepare"
    kept.whole(origin)
    folder = Path(target) / "prepare"
    if read_record(folder):
        raise ValueError(f"--export={target}: there is an experiment already ({folder / RECORD})")
    with writer_lock.held(target):
        shutil.copytree(
            origin, folder, ignore=shutil.ignore_patterns("tfds", RECORD), dirs_exist_ok=True
        )
        write_record(folder, **read_record(origin))
        shutil.copyfile(Path(experiment.model_dir) / "config.gin", Path(target) / "config.gin")
    logger.info(
        "exported to %s; there: python -m dgr_jax.train --model_dir=%s", target, Path(target).name
    )


def cut(
    vocabulary: Vocabulary, queries: dict[str, dict[str, Query]], length: int
) -> dict[str, int]:
    """How many queries of each split have more tokens than fit, EOS counted."""
    return {
        split: sum(len(vocabulary.encode(query.text)) >= length for query in found.values())
        for split, found in queries.items()
    }


def _readable(report: dict[str, Any], settings: Prepare | DensePrepare) -> Iterator[str]:
    found = report.get("identifiers", {})
    yield (
        f"{report['passages']:,} passages, "
        + ", ".join(f"{n:,} {split} queries" for split, n in report["queries"].items())
        + "; examples: "
        + ", ".join(f"{n:,} {name}" for name, n in report["examples"].items())
    )
    for split, cut in report["queries_cut"].items():
        if cut:
            yield (
                f"{cut:,} of {report['queries'][split]:,} {split} queries are longer than "
                f"{settings.query_length} tokens and are cut "
                f"({type(settings).__name__}.query_length)"
            )
    if "positives" in report:
        yield f"positives a query: {_line(report['positives'])}"
    if line := _line(found):
        yield line
    for view in ("title", "body", "query", "named_passages", "drawn"):
        if view in found:
            yield f"{view.replace('_', ' ')}: {_line(found[view])}"
    for number, level in enumerate(found.get("levels", []), start=1):
        usage = (f"{key.replace('_', ' ')} {_short(value)}" for key, value in level.items())
        yield f"code {number}: {', '.join(usage)}"


def _line(report: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in report.items() if not isinstance(value, (list, dict))}
    return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in plain.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
