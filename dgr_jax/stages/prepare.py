"""Stage prepare: collection -> passages, vocabulary, identifiers, trie, tasks, token arrays."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import shipped
from dgr_jax.corpora import store
from dgr_jax.corpora.store import PassageStore
from dgr_jax.data import examples, loading
from dgr_jax.data.examples import Part
from dgr_jax.data.rules import measured_splits
from dgr_jax.data.task_files import _task_path, task_file
from dgr_jax.experiments.dense import DenseExperiment, DensePrepare
from dgr_jax.experiments.generative import Experiment, Prepare
from dgr_jax.experiments.stage import Stage, fields
from dgr_jax.retrieval.planned import check_corpus
from dgr_jax.stages import generation_data, identifiers, judged
from dgr_jax.stages.generation_data import Opened, Work
from dgr_jax.stages.identifiers import Identified
from dgr_jax.stages.inputs import check_collection, of_collection
from dgr_jax.stages.judged import Judged
from dgr_jax.stages.prepared import PREPARE, cut, write_report
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
    passages, splits = read(experiment, folder)
    if experiment.plan is not None:
        check_corpus(experiment.plan, len(passages))
    with _part("identifiers"):
        asked = splits.asked(measured_splits(settings))
        identified = identifiers.build(settings, folder, passages, asked)
    train = settings.train_split
    opened = Opened(
        passages,
        identified,
        splits.queries.get(train, {}),
        splits.qrels.get(train, []),
        judged.test_texts(settings, folder),
    )
    with _part("examples"):
        counts = generation_data.write(Work(settings, folder), opened, everywhere)
    vocabulary = identified.vocabulary
    _follow_tasks(settings, folder, identified)
    report = {
        "passages": len(passages),
        "queries": {split: len(queries) for split, queries in splits.queries.items()},
        "queries_cut": cut(vocabulary, splits.queries, settings.query_length),
        "inputs_cut": generation_data.by_source(opened.counts, examples.INPUTS),
        "qrels": {split: len(qrels) for split, qrels in splits.qrels.items()},
        **splits.report,
        "copies_of_test_queries": opened.counts[generation_data.COPIES],
        "examples": counts,
        "vocabulary": {"text": vocabulary.text_size, "size": vocabulary.size},
        "identifiers": identified.report,
    }
    write_report(folder, report, settings)


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
        splits = judged.read(collection, settings, passages)
    if len(passages) < 2:
        raise ValueError(
            f"the collection has one passage, {passages.pids[0]!r}, expected two or more, for a "
            "student to choose from and a teacher to order"
        )
    judged.write(folder, splits)
    judged.keep_training_queries(folder, settings)
    if not settings.train_splits:
        owner, sources = type(settings).__name__, " and ".join(settings.sources.rates())
        logger.info(
            "prepare: there are no labels: what is learned from is %s, and a teacher orders "
            "passages for these (%s)",
            sources.replace("_", "-"),
            f"{owner}.{'train_split' if owner == 'Prepare' else 'train_splits'}",
        )
    learned = {
        q.qid: q.text for split in settings.train_splits for q in splits.queries[split].values()
    }
    with _part("vocabulary"):
        texts = itertools.chain((p.contents for p in passages), learned.values())
        settings.vocabulary.write(folder, texts)
    return passages, splits


def _follow_tasks(settings: Prepare, folder: Path, identified: Identified) -> None:
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
    task_file(settings.tasks).register(
        tasks.PreparedExamples(folder / "tfds", identified.vocabulary, rates)
    )
    lengths = {"inputs": settings.query_length, "targets": identified.length}
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


def reads(experiment: Experiment | DenseExperiment) -> dict[str, Any]:
    """The files of the collection and of the settings, and the one that registers its tasks."""
    file = shipped.resources("tasks") / f"{experiment.prepare.tasks}.py"
    registered = {f"tasks/{file.name}": str(file)} if file.is_file() else {}
    return of_collection(experiment) | registered


STAGE = Stage(
    PREPARE,
    prepare,
    settings=fields("collection", "prepare"),
    reads=reads,
    check=check_collection,
    alone=True,
)
