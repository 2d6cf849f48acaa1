"""Stage prepare of a dense retriever, and what the stages after it read of it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import processes
from dgr_jax.corpora.store import PassageStore
from dgr_jax.data import direct, examples, loading
from dgr_jax.data.task_files import task_file
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiments.common import Measured
from dgr_jax.experiments.dense import DenseExperiment, DensePrepare
from dgr_jax.retrieval.batching import BLOCK
from dgr_jax.stages import generation_data
from dgr_jax.stages import prepare as generative
from dgr_jax.stages.generation_data import require_examples, source_pairs
from dgr_jax.stages.judged import Judged, test_texts
from dgr_jax.stages.prepare import read, without_tasks
from dgr_jax.stages.prepared import PREPARE, cut, write_report
from dgr_jax.training import arrays

logger = logging.getLogger(__name__)

CORPUS, QIDS = "corpus", "qids.json"
LABELLED = "labelled_"


def prepare(experiment: DenseExperiment, folder: Path) -> None:
    """Writes passages/, collection/, the vocabulary, tfds/, and in arrays/ the tokens of every
    passage (corpus) and the queries of each source with their positives. Without TensorFlow and
    SeqIO, tfds/ is left out, and the arrays are made without the tasks; no later stage needs them.
    """
    settings = experiment.prepare
    passages, judged = read(experiment, folder)
    vocabulary = Vocabulary.create(folder, extra_ids=settings.vocabulary.extra_ids)
    vocabulary.save()
    inputs: defaultdict[str, Counter[str]] = defaultdict(Counter)
    counts = _datasets(experiment, folder, passages, vocabulary, judged, inputs)
    tokens = arrays.read_arrays(folder / "arrays" / CORPUS)["passage_tokens"]
    inputs[CORPUS] = _passages_cut(passages, vocabulary, tokens)
    copies = sum(counted.pop(generation_data.COPIES, 0) for counted in inputs.values())
    report = {
        "passages": len(passages),
        "passages_that_fill_the_input": int((tokens[:, -1] > 0).sum()),
        "queries": {split: len(queries) for split, queries in judged.queries.items()},
        "queries_cut": cut(vocabulary, judged.queries, settings.query_length),
        "inputs_cut": inputs,
        "qrels": {split: len(qrels) for split, qrels in judged.qrels.items()},
        **judged.report,
        "copies_of_test_queries": copies,
        "examples": counts,
        "positives": _positives(folder, counts),
        "vocabulary": {"text": vocabulary.text_size, "size": vocabulary.size},
    }
    write_report(folder, report, settings)


def _passages_cut(
    passages: PassageStore, vocabulary: Vocabulary, tokens: np.ndarray
) -> Counter[str]:
    """Counts of passages as encoder inputs int32 [P, S], see `examples.count_inputs`. Only
    those that fill their row are looked at again."""
    blocks = (tokens[start : start + BLOCK] for start in range(0, len(tokens), BLOCK))
    lengths = np.concatenate([(np.asarray(block) > 0).sum(1) for block in blocks])
    for row in np.flatnonzero(lengths == tokens.shape[1]):
        lengths[row] = len(vocabulary.encode(passages[int(row)].contents)) + 1
    counts: Counter[str] = Counter()
    examples.count_inputs(lengths, tokens.shape[1], counts)
    return counts


def _positives(folder: Path, counts: Mapping[str, int]) -> dict[str, float]:
    """Mean number of positives of a query of each source."""
    held = {s: arrays.read_arrays(folder / "arrays" / s)["positives"] for s in counts}
    return {source: float((positives >= 0).sum(1).mean()) for source, positives in held.items()}


def _datasets(
    experiment: DenseExperiment,
    folder: Path,
    passages: PassageStore,
    vocabulary: Vocabulary,
    judged: Judged,
    inputs: Mapping[str, Counter[str]],
) -> dict[str, int]:
    """The TFDS dataset and the token arrays of its SeqIO tasks; -> examples a source.

    inputs, by source: counts are added of what is cut, and of copies of test queries left out.
    """
    prepared = loading.prepared()
    settings, most = experiment.prepare, 1
    tests = test_texts(settings, folder)

    def examples_of(source: str, counts: Counter | None = None) -> Iterator[dict[str, Any]]:
        split = source.removeprefix(LABELLED)
        if split == source:
            pairs = source_pairs(
                settings, source, passages, {}, (), test_queries=tests, counts=counts
            )
            return examples.of_positives(pairs)
        of_split = judged.queries[split], judged.qrels[split]
        return examples.of_judged(*of_split, passages, settings.min_relevance)

    def counted(source: str) -> Iterator[dict[str, Any]]:
        nonlocal most
        for example in examples_of(source, inputs[source]):
            length = len(vocabulary.encode(example["inputs"])) + 1
            examples.count_inputs([length], settings.query_length, inputs[source])
            most = max(most, len(example["positives"]))
            if source.startswith(LABELLED):
                qids[source].append(example["qid"])
            yield example

    streams = {source: counted(source) for source in sources(experiment)}
    qids: dict[str, list[str]] = {source: [] for source in streams}
    counts = prepared.write(folder / "tfds", "positives", streams, prepared.positives())
    require_examples(counts)
    (folder / QIDS).write_text(json.dumps(qids), encoding="utf-8")
    if without_tasks(settings):
        by_source = {source: examples_of(source) for source in streams}
        blocks = _direct(settings, passages, vocabulary, by_source, most)
    else:
        blocks = _of_tasks(settings, folder, passages, vocabulary, tuple(streams), most)
    for source, rows in blocks:
        arrays.write_arrays(folder / "arrays" / source, rows)
    return counts


def _direct(
    settings: DensePrepare,
    passages: PassageStore,
    vocabulary: Vocabulary,
    by_source: Mapping[str, Iterator[dict[str, Any]]],
    most: int,
) -> Iterator[tuple[str, Iterator[arrays.Features]]]:
    """(source, token arrays) of every source and the corpus, from the examples themselves."""
    for source, of in by_source.items():
        yield source, direct.positives_arrays(of, vocabulary, settings.query_length, most)
    texts = (passage.contents for passage in passages)
    yield CORPUS, direct.passage_arrays(texts, vocabulary, settings.passage_length)


def _of_tasks(
    settings: DensePrepare,
    folder: Path,
    passages: PassageStore,
    vocabulary: Vocabulary,
    source_names: tuple[str, ...],
    most: int,
) -> Iterator[tuple[str, Iterator[arrays.Features]]]:
    """The same from the SeqIO tasks that the collection's file in tasks/ registers."""
    with loading.quietly():
        from dgr_jax.data import datasets, tasks
        from dgr_jax.data.feature_converters import PassageConverter, PositivesConverter

    task_file(settings.tasks).register(
        tasks.PreparedPositives(
            folder / "tfds",
            vocabulary,
            source_names,
            lambda: ({"inputs": passage.contents} for passage in passages),
        )
    )
    lengths = {"inputs": settings.query_length, "positives": most, "grades": most, "query": 1}
    name = f"{settings.tasks}_dense"
    for source in source_names:
        yield source, datasets.arrays(f"{name}_{source}", lengths, PositivesConverter())
    length = {"inputs": settings.passage_length}
    yield CORPUS, datasets.arrays(f"{name}_corpus", length, PassageConverter())


def sources(experiment: DenseExperiment) -> dict[str, str]:
    """Every source of training queries -> its name in `Sources`."""
    settings, kinds = experiment.prepare, {}
    for name in settings.sources.rates():
        if name == "labelled":
            kinds |= {f"{LABELLED}{split}": name for split in settings.train_splits}
        else:
            kinds[name] = name
    return kinds


def one_process(experiment: Measured) -> None:
    """Raises ValueError where there are several processes."""
    if processes.count() > 1:
        raise ValueError(
            f"got {processes.count()} processes, expected one: a dense retriever is trained and "
            "searched by all devices of one process"
        )


def queries_of(experiment: DenseExperiment, source: str) -> arrays.Features:
    return arrays.read_arrays(Path(experiment.model_dir) / PREPARE / "arrays" / source)


def qids_of(
    experiment: DenseExperiment, source: str, qids: Mapping[str, Sequence[str]]
) -> list[str]:
    """The qid of each row of a source of labelled queries."""
    return [qids[source][index] for index in queries_of(experiment, source)["query"][:, 0]]


STAGE = dataclasses.replace(generative.STAGE, make=prepare)
