"""The stages of the experiment that writes pseudo-queries: prepare, generate, sample."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora import checks, lines, store
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Qrel
from dgr_jax.data.same_text import normalised
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.display import listed
from dgr_jax.experiments.common import with_vocabulary
from dgr_jax.experiments.pseudo_queries import PseudoQueries
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir.kept import Damaged, entry, read_json
from dgr_jax.models.t5 import Transformer
from dgr_jax.retrieval import trained
from dgr_jax.retrieval.sampling import Sampler
from dgr_jax.stages.inputs import check_collection, of_collection
from dgr_jax.stages.training_run import check_batches, train
from dgr_jax.training import arrays
from dgr_jax.training.source import ArraySource

logger = logging.getLogger(__name__)

FILE = "pseudo_queries.tsv"
_BLOCK = 2048  # passages sampled, filtered and kept together
_PAIRS = 1024  # pairs tokenised together


@dataclass(frozen=True)
class PreparedPairs:
    """What the prepare stage left, opened."""

    folder: Path

    @cached_property
    def store(self) -> PassageStore:
        return PassageStore(self.folder / "passages")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.folder)

    @cached_property
    def test_queries(self) -> frozenset[str]:
        """The queries of the test splits, `normalised`."""
        return frozenset(read_json(self.folder / "test_queries.json", list))

    @classmethod
    def of(cls, experiment: PseudoQueries) -> PreparedPairs:
        return cls(Path(experiment.model_dir) / PREPARE.name)


def prepare(experiment: PseudoQueries, folder: Path) -> None:
    """Writes passages/, the vocabulary, test_queries.json, pairs/ (token arrays) and report.json.

    A pair whose query is a copy of a test query is left out, and counted.
    """
    settings, collection = experiment.prepare, experiment.collection
    collection.check((settings.train_split, *settings.test_splits))
    passages = store.write(collection.passages(), folder / "passages")
    texts = {query.qid: query.text for query in collection.queries(settings.train_split)}
    where = f"qrels of split {settings.train_split!r}"
    judged = checks.check_qrels(
        collection.qrels(settings.train_split), texts, passages, where=where
    )
    counts: Counter = Counter()
    qrels, counts["repeated_judgements"] = checks.judged_once(judged.kept, where=where)
    tests = {
        normalised(query.text)
        for split in settings.test_splits
        for query in collection.queries(split)
    }
    (folder / "test_queries.json").write_text(json.dumps(sorted(tests)), encoding="utf-8")
    corpus = itertools.chain((p.contents for p in passages), texts.values())
    settings.vocabulary.write(folder, corpus)
    vocabulary = Vocabulary.create(folder, extra_ids=settings.vocabulary.extra_ids)
    vocabulary.save()
    pairs = _pairs(experiment, passages, texts, qrels, tests, counts)
    features = _features(experiment, vocabulary, passages, pairs, counts)
    arrays.write_arrays(folder / "pairs", features)
    _report(folder, {"passages": len(passages), "test_queries": len(tests), **counts})


def _pairs(
    experiment: PseudoQueries,
    passages: PassageStore,
    texts: dict[str, str],
    qrels: list[Qrel],
    tests: set[str],
    counts: Counter,
) -> Iterator[tuple[int, str]]:
    """(passage index, query) of every positive, without copies of test queries. Raises ValueError
    when there is none."""
    settings = experiment.prepare
    for qrel in qrels:
        if qrel.relevance < settings.min_relevance or not texts[qrel.qid].strip():
            continue
        if normalised(texts[qrel.qid]) in tests:
            counts["pairs_with_copies_of_test_queries"] += 1
            continue
        counts["pairs"] += 1
        yield passages.index_of(qrel.pid), texts[qrel.qid]
    if not counts["pairs"]:
        raise ValueError(
            f"split {settings.train_split!r} has no pair to learn from: no relevance of "
            f"{settings.min_relevance} or more (Pairs.min_relevance) of a query that is in no test "
            f"split; {counts['pairs_with_copies_of_test_queries']} are copies of test queries"
        )


def _features(
    experiment: PseudoQueries,
    vocabulary: Vocabulary,
    passages: PassageStore,
    pairs: Iterator[tuple[int, str]],
    counts: Counter,
) -> Iterator[dict[str, np.ndarray]]:
    """Model features of the pairs in blocks, as GenerationConverter makes them."""
    settings = experiment.prepare
    filling = np.zeros(len(passages), bool)  # a passage has several pairs, and counts once
    while block := list(itertools.islice(pairs, _PAIRS)):
        rows, queries = zip(*block, strict=True)
        texts = [passages[row].contents for row in rows]
        inputs = vocabulary.encode_inputs(texts, settings.passage_length)
        targets = vocabulary.encode_inputs(queries, settings.query_length)
        filling[np.array(rows)[inputs[:, -1] > 0]] = True
        counts["passages_that_fill_the_input"] = int(filling.sum())
        counts["queries_that_fill_the_target"] += int((targets[:, -1] > 0).sum())
        yield {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.float32),
        }


def generate(experiment: PseudoQueries, folder: Path) -> None:
    """Learn to write the query of a passage."""
    vocabulary = PreparedPairs.of(experiment).vocabulary
    model = Transformer(with_vocabulary(experiment.model, vocabulary.size))
    train(experiment, folder, folder.name, experiment.generate, model, batches(experiment))


def batches(experiment: PseudoQueries) -> ArraySource:
    """What the stage `generate` learns from, step by step."""
    pairs, settings = PreparedPairs.of(experiment).folder / "pairs", experiment.generate
    return ArraySource(pairs, settings.batch_size, settings.seed)


def sample(experiment: PseudoQueries, folder: Path) -> None:
    """Writes pseudo_queries.tsv (pid, text) and report.json.

    Passages are sampled in blocks that are kept, so that a cut-off stage goes on. While the device
    samples, the block before is filtered and written.
    """
    prepared = PreparedPairs.of(experiment)
    starts = range(0, len(prepared.store), _BLOCK)
    missing = [start for start in starts if not _is_whole(folder, start)]
    length = experiment.prepare.passage_length
    blocks = ((start, _inputs(prepared, start, length)) for start in missing)
    speeds = []
    begin = time.perf_counter()
    for start, sequences in zip(
        missing, _sampler(experiment, prepared).sequences(blocks), strict=True
    ):
        _write_block(folder, prepared, start, sequences)
        now = time.perf_counter()
        speeds.append(sequences.shape[0] * sequences.shape[1] / (now - begin))
        begin = now
        done = f"{min(start + _BLOCK, len(prepared.store)):,}/{len(prepared.store):,} passages"
        remark = ", compilation included" if start == missing[0] else ""
        logger.info("sample: %s, %.0f queries a second%s", done, speeds[-1], remark)
    _join(folder, prepared, starts, speeds)


def _sampler(experiment: PseudoQueries, prepared: PreparedPairs) -> Sampler:
    config = with_vocabulary(experiment.model, prepared.vocabulary.size)
    mesh = partitioning.make_mesh(experiment.mesh)
    folder = prepared.folder.parent / GENERATE.name
    params = trained.params(folder, Transformer(config), mesh, experiment.mesh.rules)
    length, text_size = experiment.prepare.query_length, prepared.vocabulary.text_size
    return Sampler(
        *(config, params, experiment.sample, length, text_size, mesh), experiment.mesh.rules
    )


def _inputs(prepared: PreparedPairs, start: int, length: int) -> np.ndarray:
    """Encoder inputs int32 [n, Q] of a block of passages."""
    stop = min(start + _BLOCK, len(prepared.store))
    texts = [prepared.store[i].contents for i in range(start, stop)]
    return prepared.vocabulary.encode_inputs(texts, length)


def _counted(folder: Path, start: int) -> Path:
    """What counts a block; it is there when the block is whole."""
    return folder / f"part-{start:09d}.json"


def _is_whole(folder: Path, start: int) -> bool:
    """Whether a block is there as it was written."""
    path = _counted(folder, start)
    if not path.is_file():
        return False
    try:
        block, texts = read_json(path), path.with_suffix(".tsv")
        if isinstance(block.get("counts"), dict) and texts.is_file():
            written = entry(texts)
            if written == block.get("texts", written):
                return True
    except Damaged:
        pass
    logger.warning("sample: %s or its .tsv is damaged; its passages are sampled again", path)
    return False


def _write_block(folder: Path, prepared: PreparedPairs, start: int, sequences: np.ndarray) -> None:
    """Writes the pseudo-queries of a block, int32 [n, S, T], then its counts."""
    counts: Counter = Counter()
    copied: set[str] = set()
    with lines.writing(_counted(folder, start).with_suffix(".tsv")) as handle:
        for pid, rows in zip(prepared.store.pids[start : start + _BLOCK], sequences, strict=True):
            texts = (prepared.vocabulary.decode(row.tolist()) for row in rows)
            for text in kept(texts, prepared.test_queries, counts, copied):
                handle.write(f"{pid}\t{text}\n".encode())
    texts = entry(_counted(folder, start).with_suffix(".tsv"))
    written = json.dumps({"counts": counts, "copied": sorted(copied), "texts": texts})
    with lines.writing(_counted(folder, start)) as handle:
        handle.write(written.encode())


def kept(
    texts: Iterable[str], test_queries: frozenset[str], counts: Counter, copied: set[str]
) -> list[str]:
    """The samples of one passage that are different queries, and none of the test queries.

    Two texts are the same when they are so `normalised`; test_queries are normalised already.
    counts: samples, without_end_or_text, repeated, copies_of_test_queries and pseudo_queries (kept)
    are added to; copied: the test queries that were met are added.
    """
    queries: dict[str, str] = {}
    for text in texts:
        text = " ".join(text.split())
        same = normalised(text)
        counts["samples"] += 1
        if not text:
            counts["without_end_or_text"] += 1
        elif same in test_queries:
            counts["copies_of_test_queries"] += 1
            copied.add(same)
        elif same in queries:
            counts["repeated"] += 1
        else:
            queries[same] = text
    counts["pseudo_queries"] += len(queries)
    counts["passages_without_any"] += not queries
    return list(queries.values())


def _join(
    folder: Path, prepared: PreparedPairs, starts: Iterable[int], speeds: list[float]
) -> None:
    """Writes all blocks as one file, and their report; then the blocks go."""
    counts: Counter = Counter()
    copied: set[str] = set()
    with lines.writing(folder / FILE) as handle:
        for start in starts:
            block = json.loads(_counted(folder, start).read_text(encoding="utf-8"))
            counts.update(block["counts"])
            copied.update(block["copied"])
            with _counted(folder, start).with_suffix(".tsv").open("rb") as part:
                shutil.copyfileobj(part, handle)
    report: dict[str, Any] = {"passages": len(prepared.store), **counts}
    report |= {"test_queries": len(prepared.test_queries), "test_queries_copied": len(copied)}
    if speeds:  # the first block also compiles
        report["queries_per_second"] = round(float(np.median(speeds[1:] or speeds)), 1)
    _report(folder, report)
    for start in starts:
        _counted(folder, start).unlink()
        _counted(folder, start).with_suffix(".tsv").unlink()
    logger.info("sample: %s holds them, for Sources.pseudo_query_path", folder / FILE)


def _report(folder: Path, report: dict[str, Any]) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    logger.info("%s: %s", folder.name, listed(report))


PREPARE = Stage(
    "prepare",
    prepare,
    settings=fields("collection", "prepare"),
    reads=of_collection,
    check=check_collection,
    alone=True,
)
GENERATE = Stage(
    "generate",
    generate,
    settings=fields("model", "generate"),
    upstream=after(PREPARE.name),
    check=lambda e: check_batches(e, "generate", e.generate, "batch_size"),
    batches=batches,
)
SAMPLE = Stage("sample", sample, settings=fields("sample"), upstream=after(GENERATE.name))
