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

from dgr_jax import cli
from dgr_jax.corpora import beir, checks, store, trec
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Qrel, Query
from dgr_jax.data import loading
from dgr_jax.data.examples import Part
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiment import Experiment
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.pipeline import RECORD, read_record, write_record
from dgr_jax.retrieval.view_indexes import ViewIndexes
from dgr_jax.stages import generation_data, identifiers
from dgr_jax.stages.generation_data import Opened, Work

logger = logging.getLogger(__name__)


def prepare(
    experiment: Experiment,
    folder: Path,
    everywhere: Callable[[Work, Iterable[Part]], None] | None = None,
) -> None:
    """Make MODEL_DIR/prepare. Needs TensorFlow; no later stage does.

    everywhere: makes the generation examples on workers, see `generation_data.write`.
    """
    settings = experiment.prepare
    splits = (settings.train_split, *settings.test_splits)
    experiment.collection.check(splits)
    with _part("passages"):
        passages = store.write(experiment.collection.passages(), folder / "passages")
        queries, qrels = _read_judged(experiment, splits)
    for split in splits:
        where = f"qrels of split {split!r}"
        if not checks.check_qrels(qrels[split], queries[split], passages, where=where):
            raise ValueError(f"{where}: found none; expected a judged query or more")
    train = settings.train_split
    if not any(qrel.relevance >= settings.min_relevance for qrel in qrels[train]):
        raise ValueError(
            f"split {train!r} has no positive: no relevance of {settings.min_relevance} or more "
            "(Prepare.min_relevance)"
        )
    every_query = {q.qid: q for split in splits for q in queries[split].values()}
    beir.write_beir(folder / "collection", (), every_query.values(), qrels)
    texts = itertools.chain(
        (p.contents for p in passages), (q.text for q in queries[train].values())
    )
    with _part("vocabulary"):
        settings.vocabulary.write(folder, texts)
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
    _register(settings.tasks, folder, vocabulary, settings.sources.rates())
    report = {
        "passages": len(passages),
        "queries": {split: len(queries[split]) for split in splits},
        "queries_cut": {s: _cut(vocabulary, queries[s], settings.query_length) for s in splits},
        "qrels": {split: len(qrels[split]) for split in splits},
        "examples": counts,
        "vocabulary": {"text": vocabulary.text_size, "size": vocabulary.size},
        "identifiers": made.report,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for line in _readable(report, settings.query_length):
        logger.info("prepare: %s", line)


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    """Logs how long a part of the stage took."""
    start = time.perf_counter()
    yield
    logger.info("prepare: %s in %.1f s", name, time.perf_counter() - start)


def _read_judged(
    experiment: Experiment, splits: tuple[str, ...]
) -> tuple[dict[str, dict[str, Query]], dict[str, list[Qrel]]]:
    """Queries by qid, and judgements, of each split."""
    collection = experiment.collection
    queries = {split: {q.qid: q for q in collection.queries(split)} for split in splits}
    return queries, {split: list(collection.qrels(split)) for split in splits}


def _register(name: str, folder: Path, vocabulary: Vocabulary, rates: dict[str, float]) -> None:
    """The SeqIO tasks of the dataset, by the file of the collection in tasks/."""
    with loading.quietly():
        from dgr_jax.data import tasks

    task_file(name).register(tasks.Prepared(folder / "tfds", vocabulary, rates))


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
    """What the prepare stage left, opened: `table` of docids, or `indexes` of several views."""

    folder: Path
    store: PassageStore
    vocabulary: Vocabulary
    table: IdentifierTable | None
    indexes: ViewIndexes | None

    @classmethod
    def load(cls, model_dir: str | Path) -> Prepared:
        folder = Path(model_dir) / "prepare"
        vocabulary = Vocabulary.load(folder)
        views = bool(vocabulary.views)
        return cls(
            folder,
            PassageStore(folder / "passages"),
            vocabulary,
            table=None if views else IdentifierTable.load(folder / "identifiers"),
            indexes=ViewIndexes.load(folder, vocabulary) if views else None,
        )

    def queries(self, split: str) -> dict[str, Query]:
        """qid -> query of a split."""
        return {query.qid: query for query in self._judged.queries(split)}

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """qid -> pid -> relevance of a split."""
        return trec.qrels_in_memory(self._judged.qrels(split))

    @property
    def _judged(self) -> beir.BeirCollection:
        return beir.BeirCollection(str(self.folder / "collection"))


def export(experiment: Experiment, target: str) -> None:
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


def _cut(vocabulary: Vocabulary, queries: dict[str, Query], length: int) -> int:
    """How many queries have more tokens than fit, EOS counted."""
    return sum(len(vocabulary.encode(query.text)) >= length for query in queries.values())


def _readable(report: dict[str, Any], query_length: int) -> Iterator[str]:
    found = report["identifiers"]
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
                f"{query_length} tokens and are cut (Prepare.query_length)"
            )
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
