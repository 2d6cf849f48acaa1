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
from dgr_jax.corpora import store, trec
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Query
from dgr_jax.data import examples, loading
from dgr_jax.data.examples import Part
from dgr_jax.data.rules import measured_splits
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.dense_experiment import DenseExperiment, DensePrepare
from dgr_jax.experiment import Experiment, Prepare
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.records import RECORD, read_record, write_record
from dgr_jax.retrieval.view_indexes import ViewIndexes
from dgr_jax.shipped import resources
from dgr_jax.stages import generation_data, identifiers, judged
from dgr_jax.stages.generation_data import Opened, Work
from dgr_jax.stages.identifiers import Identified
from dgr_jax.stages.judged import Judged
from dgr_jax.training import arrays

logger = logging.getLogger(__name__)


def prepare(
    experiment: Experiment,
    folder: Path,
    everywhere: Callable[[Work, Iterable[Part]], None] | None = None,
) -> None:
    """Make MODEL_DIR/prepare, with a TFDS dataset and by the collection's SeqIO tasks where
    TensorFlow and SeqIO are installed; no later stage needs them.

    everywhere: makes the generation examples on workers, see `generation_data.write`.
    """
    settings = experiment.prepare
    passages, found = read(experiment, folder)
    with _part("identifiers"):
        if isinstance(settings.identifiers, Multiview):
            made = identifiers.views(
                settings, folder, passages, found.asked(measured_splits(settings))
            )
        else:
            made = identifiers.docids(settings, folder, passages)
    train = settings.train_split
    opened = Opened(
        passages,
        made,
        found.queries.get(train, {}),
        found.qrels.get(train, []),
        judged.test_texts(settings, folder),
    )
    with _part("examples"):
        counts = generation_data.write(Work(settings, folder), opened, everywhere)
    vocabulary = made.vocabulary
    _follow_tasks(settings, folder, made)
    report = {
        "passages": len(passages),
        "queries": {split: len(queries) for split, queries in found.queries.items()},
        "queries_cut": cut(vocabulary, found.queries, settings.query_length),
        "inputs_cut": generation_data.by_source(opened.counts, examples.INPUTS),
        "qrels": {split: len(qrels) for split, qrels in found.qrels.items()},
        **found.report,
        "copies_of_test_queries": opened.counts[generation_data.COPIES],
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


def read(experiment: Experiment | DenseExperiment, folder: Path) -> tuple[PassageStore, Judged]:
    """Writes passages/, queries and judgements (see `judged.write`) and spiece.model; -> the
    passages, and what is asked of them.

    Raises ValueError for judgements that cannot be used, and for a single passage.
    """
    settings, collection = experiment.prepare, experiment.collection
    if settings.splits:
        collection.check(settings.splits)
    with _part("passages"):
        passages = store.write(collection.passages(), folder / "passages")
        found = judged.read(collection, settings, passages)
    if len(passages) < 2:
        raise ValueError(
            f"the collection has one passage, {passages.pids[0]!r}, expected two or more, for a "
            "student to choose from and a teacher to order"
        )
    judged.write(folder, found)
    if not settings.train_splits:
        owner, sources = type(settings).__name__, " and ".join(settings.sources.rates())
        logger.info(
            "prepare: there are no labels: what is learned from is %s, and a teacher orders "
            "passages for these (%s)",
            sources.replace("_", "-"),
            f"{owner}.{'train_split' if owner == 'Prepare' else 'train_splits'}",
        )
    learned = {
        q.qid: q.text for split in settings.train_splits for q in found.queries[split].values()
    }
    with _part("vocabulary"):
        texts = itertools.chain((p.contents for p in passages), learned.values())
        settings.vocabulary.write(folder, texts)
    return passages, found


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
        return judged.queries(self.folder, split)

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """qid -> pid -> relevance of a split; {} of one that has answers instead."""
        return trec.qrels_in_memory(judged.qrels(self.folder, split))


def export(experiment: Experiment | DenseExperiment, target: str) -> None:
    """Copy the prepare stage, without its TFDS dataset, to MODEL_DIR `target` on its way elsewhere.

    There every later stage runs without TensorFlow and without the collection.
    """
    origin = Path(experiment.model_dir) / "prepare"
    folder = Path(target) / "prepare"
    if read_record(folder):
        raise ValueError(f"--export={target}: there is an experiment already ({folder / RECORD})")
    with writer_lock.held(experiment.model_dir), writer_lock.held(target):
        kept.whole(origin)
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
        ", ".join(
            [f"{report['passages']:,} passages"]
            + [f"{n:,} {split} queries" for split, n in report["queries"].items()]
        )
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
    for source, counted in report["inputs_cut"].items():
        if counted["cut"] and not source.startswith("labelled"):
            length = "passage_length" if source == "corpus" else "query_length"
            inputs = f"{counted['inputs']:,} {source.replace('_', ' ')} inputs"
            yield (
                f"{counted['cut']:,} of {inputs} are longer than {getattr(settings, length)} "
                f"tokens and are cut, {counted['tokens_lost']:,} of {counted['tokens']:,} tokens "
                f"are lost ({type(settings).__name__}.{length})"
            )
    if copies := report["copies_of_test_queries"]:
        yield (
            f"{copies:,} pseudo-queries are copies of test queries and are left out "
            "(Sources.pseudo_query_path)"
        )
    yield from judged.readable(report, settings)
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
