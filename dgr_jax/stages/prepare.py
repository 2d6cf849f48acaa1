"""Stage prepare: collection -> passages, vocabulary, identifiers, trie, tasks, token arrays."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dgr_jax import cli
from dgr_jax.corpora import beir, checks, store, trec
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Qrel, Query
from dgr_jax.data import examples, loading
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.dense_experiment import DenseExperiment, DensePrepare
from dgr_jax.experiment import Experiment, Prepare
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.pipeline import RECORD, read_record, write_record
from dgr_jax.retrieval.view_indexes import ViewIndexes
from dgr_jax.stages import identifiers
from dgr_jax.stages.identifiers import Identified
from dgr_jax.training import arrays

logger = logging.getLogger(__name__)


def prepare(experiment: Experiment, folder: Path) -> None:
    """Make MODEL_DIR/prepare. Needs TensorFlow; no later stage does."""
    settings, train = experiment.prepare, experiment.prepare.train_split
    passages, queries, qrels = read(experiment, folder, (train,))
    if isinstance(settings.identifiers, Multiview):
        tested = (query for split in settings.test_splits for query in queries[split].values())
        made = identifiers.views(settings, folder, passages, tested)
    else:
        made = identifiers.docids(settings, folder, passages)
    counts = _datasets(experiment, folder, passages, made, queries[train], qrels[train])
    vocabulary = made.vocabulary
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


def read(
    experiment: Experiment | DenseExperiment, folder: Path, train: tuple[str, ...]
) -> tuple[PassageStore, dict[str, dict[str, Query]], dict[str, list[Qrel]]]:
    """Writes passages/, collection/ (queries and judgements) and spiece.model; -> the passages,
    and split -> queries by qid, and judgements.

    train: splits to learn from; each must have a positive.
    """
    settings, collection, splits = (
        experiment.prepare,
        experiment.collection,
        experiment.prepare.splits,
    )
    collection.check(splits)
    passages = store.write(collection.passages(), folder / "passages")
    queries = {split: {q.qid: q for q in collection.queries(split)} for split in splits}
    qrels = {split: list(collection.qrels(split)) for split in splits}
    for split in splits:
        where = f"qrels of split {split!r}"
        if not checks.check_qrels(qrels[split], queries[split], passages, where=where):
            raise ValueError(f"{where}: found none; expected a judged query or more")
    for split in train:
        if not any(qrel.relevance >= settings.min_relevance for qrel in qrels[split]):
            raise ValueError(
                f"split {split!r} has no positive: no relevance of {settings.min_relevance} or "
                f"more ({type(settings).__name__}.min_relevance)"
            )
    every_query = {q.qid: q for split in splits for q in queries[split].values()}
    beir.write_beir(folder / "collection", (), every_query.values(), qrels)
    learned = {q.qid: q.text for split in train for q in queries[split].values()}
    settings.vocabulary.write(
        folder, itertools.chain((p.contents for p in passages), learned.values())
    )
    return passages, queries, qrels


def _datasets(
    experiment: Experiment,
    folder: Path,
    passages: PassageStore,
    made: Identified,
    queries: dict[str, Query],
    qrels: list[Qrel],
) -> dict[str, int]:
    """The TFDS dataset, its SeqIO tasks, and their token arrays; -> examples a source."""
    with loading.quietly():
        from dgr_jax.data import datasets, prepared, tasks
        from dgr_jax.data.feature_converters import GenerationConverter

    settings = experiment.prepare
    rates, views = settings.sources.rates(), bool(made.vocabulary.views)
    streams = {
        name: made.examples(source_pairs(settings, name, passages, queries, qrels))
        for name in rates
    }
    counts = prepared.write(folder / "tfds", "examples", streams, prepared.features(views=views))
    require_examples(counts)
    task_file(settings.tasks).register(tasks.Prepared(folder / "tfds", made.vocabulary, rates))
    lengths = {"inputs": settings.query_length, "targets": made.length}
    for name in streams:
        blocks = datasets.arrays(f"{settings.tasks}_{name}", lengths, GenerationConverter())
        arrays.write_arrays(folder / "arrays" / name, blocks)
    return counts


def require_examples(counts: Mapping[str, int]) -> None:
    """Raises ValueError for a source without any example."""
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise ValueError(
            f"source {empty[0]!r} gives no example on this collection; set Sources.{empty[0]} to 0"
        )


def source_pairs(
    settings: Prepare | DensePrepare,
    source: str,
    passages: PassageStore,
    queries: Mapping[str, Query],
    qrels: Iterable[Qrel],
) -> Iterator[tuple[str, int, str]]:
    """(text, passage index, qid) of a source of the mixture: what examples are made of."""
    return examples.pairs(
        source,
        settings.sources,
        store=passages,
        query_texts={query.qid: query.text for query in queries.values()},
        qrels=qrels,
        min_relevance=settings.min_relevance,
    )


def task_file(name: str) -> ModuleType:
    """The module tasks/`name`.py, from the package or the checkout."""
    path = cli.resources("tasks") / f"{name}.py"
    if not path.is_file():
        there = sorted(f.stem for f in path.parent.glob("[a-z]*.py"))
        raise ValueError(f"Prepare.tasks: got {name!r}, expected one of {there}")
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
        return {query.qid: query for query in self._judged.queries(split)}

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """qid -> pid -> relevance of a split."""
        return trec.qrels_in_memory(self._judged.qrels(split))

    @property
    def _judged(self) -> beir.BeirCollection:
        return beir.BeirCollection(str(self.folder / "collection"))


def export(experiment: Experiment | DenseExperiment, target: str) -> None:
    """Copy the prepare stage, without its TFDS dataset, to MODEL_DIR `target` on its way elsewhere.

    There every later stage runs without TensorFlow and without the collection.
    """
    origin = Path(experiment.model_dir) / "prepare"
    folder = Path(target) / "prepare"
    if read_record(folder):
        raise ValueError(f"--export={target}: there is an experiment already ({folder / RECORD})")
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
