"""The stages of a dense retriever: prepare, negatives, teach, start, dense, mine, refresh,
evaluate."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dgr_jax import partitioning
from dgr_jax.corpora.store import PassageStore
from dgr_jax.data import direct, examples, loading
from dgr_jax.data.task_files import task_file
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment, DensePrepare, Negatives
from dgr_jax.model_dir import kept
from dgr_jax.models.dual_encoder import DualEncoder, start_from
from dgr_jax.retrieval import dense as retrieval
from dgr_jax.retrieval.batching import BLOCK
from dgr_jax.retrieval.dense import DenseSearch, Encoder
from dgr_jax.retrieval.kinds import write_student
from dgr_jax.retrieval.system import System
from dgr_jax.stages import generation_data, student, training_run, validation
from dgr_jax.stages.evaluate import evaluate
from dgr_jax.stages.generation_data import require_examples, source_pairs
from dgr_jax.stages.judged import Judged, self_hits, test_texts
from dgr_jax.stages.prepare import read, without_tasks
from dgr_jax.stages.prepared import Prepared, cut, write_report
from dgr_jax.stages.start import parameters as corpus_params
from dgr_jax.stages.start import start as corpus_start
from dgr_jax.stages.systems import assembled, open_system
from dgr_jax.stages.systems import params as trained_params
from dgr_jax.stages.teach import CandidateLists, readable, taught
from dgr_jax.stages.training_run import Later
from dgr_jax.teaching.list_recipes import RankLists
from dgr_jax.teaching.negatives import mine as mined
from dgr_jax.teaching.teachers import Coverage
from dgr_jax.training import arrays
from dgr_jax.training.lists import ListSource, Phases, TaughtLists
from dgr_jax.training.source import MixtureSource, Source

logger = logging.getLogger(__name__)

CORPUS, QIDS = "corpus", "qids.json"
_LABELLED = "labelled_"

Find = Callable[[np.ndarray], np.ndarray]  # query tokens int32 [n, Q] -> passages int [n, depth]


def prepare(experiment: DenseExperiment, folder: Path) -> None:
    """Writes passages/, collection/, the vocabulary, tfds/, and in arrays/ the tokens of every
    passage (corpus) and the queries of each source with their positives. Without TensorFlow and
    SeqIO, tfds/ is left out, and the arrays are made without the tasks; no later stage needs them.
    """
    settings = experiment.prepare
    passages, found = read(experiment, folder)
    vocabulary = Vocabulary.create(folder, extra_ids=settings.vocabulary.extra_ids)
    vocabulary.save()
    inputs: defaultdict[str, Counter[str]] = defaultdict(Counter)
    counts = _datasets(experiment, folder, passages, vocabulary, found, inputs)
    tokens = arrays.read_arrays(folder / "arrays" / CORPUS)["passage_tokens"]
    inputs[CORPUS] = _passages_cut(passages, vocabulary, tokens)
    copies = sum(counted.pop(generation_data.COPIES, 0) for counted in inputs.values())
    report = {
        "passages": len(passages),
        "passages_that_fill_the_input": int((tokens[:, -1] > 0).sum()),
        "queries": {split: len(queries) for split, queries in found.queries.items()},
        "queries_cut": cut(vocabulary, found.queries, settings.query_length),
        "inputs_cut": inputs,
        "qrels": {split: len(qrels) for split, qrels in found.qrels.items()},
        **found.report,
        "copies_of_test_queries": copies,
        "examples": counts,
        "positives": _positives(folder, counts),
        "vocabulary": {"text": vocabulary.text_size, "size": vocabulary.size},
    }
    write_report(folder, report, settings)


def _passages_cut(
    passages: PassageStore, vocabulary: Vocabulary, tokens: np.ndarray
) -> Counter[str]:
    """Counts of passages as encoder inputs int32 [P, S], see `examples.count_inputs`. Those alone
    that fill their row are looked at again."""
    blocks = (tokens[start : start + BLOCK] for start in range(0, len(tokens), BLOCK))
    lengths = np.concatenate([(np.asarray(block) > 0).sum(1) for block in blocks])
    for row in np.flatnonzero(lengths == tokens.shape[1]):
        lengths[row] = len(vocabulary.encode(passages[row].contents)) + 1
    counts: Counter[str] = Counter()
    examples.count_inputs(lengths, tokens.shape[1], counts)
    return counts


def _positives(folder: Path, counts: Mapping[str, int]) -> dict[str, float]:
    """Mean number of positives of a query of each source."""
    held = {s: arrays.read_arrays(folder / "arrays" / s)["positives"] for s in counts}
    return {source: float((found >= 0).sum(1).mean()) for source, found in held.items()}


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
        split = source.removeprefix(_LABELLED)
        if split == source:
            rules = {"test_queries": tests, "counts": counts}
            return examples.of_positives(source_pairs(settings, source, passages, {}, (), **rules))
        of_split = judged.queries[split], judged.qrels[split]
        return examples.of_judged(*of_split, passages, settings.min_relevance)

    def counted(source: str) -> Iterator[dict[str, Any]]:
        nonlocal most
        for example in examples_of(source, inputs[source]):
            length = len(vocabulary.encode(example["inputs"])) + 1
            examples.count_inputs([length], settings.query_length, inputs[source])
            most = max(most, len(example["positives"]))
            if source.startswith(_LABELLED):
                qids[source].append(example["qid"])
            yield example

    streams = {source: counted(source) for source in sources(experiment)}
    qids: dict[str, list[str]] = {source: [] for source in streams}
    counts = prepared.write(folder / "tfds", "positives", streams, prepared.positives())
    require_examples(counts)
    (folder / QIDS).write_text(json.dumps(qids), encoding="utf-8")
    if without_tasks(settings):
        made = {source: examples_of(source) for source in streams}
        blocks = _direct(settings, passages, vocabulary, made, most)
    else:
        blocks = _of_tasks(settings, folder, passages, vocabulary, tuple(streams), most)
    for source, rows in blocks:
        arrays.write_arrays(folder / "arrays" / source, rows)
    return counts


def _direct(
    settings: DensePrepare,
    passages: PassageStore,
    vocabulary: Vocabulary,
    made: Mapping[str, Iterator[dict[str, Any]]],
    most: int,
) -> Iterator[tuple[str, Iterator[arrays.Features]]]:
    """(source, token arrays) of every source and the corpus, from the examples themselves."""
    for source, of in made.items():
        yield source, direct.positives_arrays(of, vocabulary, settings.query_length, most)
    texts = (passage.contents for passage in passages)
    yield CORPUS, direct.passage_arrays(texts, vocabulary, settings.passage_length)


def _of_tasks(
    settings: DensePrepare,
    folder: Path,
    passages: PassageStore,
    vocabulary: Vocabulary,
    made: tuple[str, ...],
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
            made,
            lambda: ({"inputs": passage.contents} for passage in passages),
        )
    )
    lengths = {"inputs": settings.query_length, "positives": most, "grades": most, "query": 1}
    name = f"{settings.tasks}_dense"
    for source in made:
        yield source, datasets.arrays(f"{name}_{source}", lengths, PositivesConverter())
    length = {"inputs": settings.passage_length}
    yield CORPUS, datasets.arrays(f"{name}_corpus", length, PassageConverter())


def sources(experiment: DenseExperiment) -> dict[str, str]:
    """Every source of training queries -> its name in `Sources`."""
    settings, found = experiment.prepare, {}
    for name in settings.sources.rates():
        if name == "labelled":
            found |= {f"{_LABELLED}{split}": name for split in settings.train_splits}
        else:
            found[name] = name
    return found


def negatives(experiment: DenseExperiment, folder: Path) -> None:
    """Writes <source>.npy, int32 [n, depth]: passages to draw the negatives of each query from."""
    settings = experiment.negatives
    made = Prepared.load(experiment.model_dir)
    own = _own(experiment, made)
    _write_pools(experiment, folder, settings, _finder(settings, made, deeper=bool(own)), own)


def _own(experiment: DenseExperiment, made: Prepared) -> dict[str, np.ndarray]:
    """Source -> int32 [n, 1], the passage that a query itself is and must not find, -1 for most; {}
    where there is none."""
    report = kept.read_json(made.folder / "report.json")
    counted = report.get("queries_that_are_passages", {})
    if "inputs_cut" in report and not counted.keys() & set(experiment.prepare.train_splits):
        return {}  # an older report has neither
    qids = kept.read_json(made.folder / QIDS)
    found = {}
    for source in sources(experiment):
        rows = found[source] = np.full(
            (len(_queries(experiment, source)["query"]), 1), -1, np.int32
        )
        if not source.startswith(_LABELLED):
            continue
        named = _named(experiment, source, qids)
        qrels = made.qrels(source.removeprefix(_LABELLED))
        own = self_hits(experiment.prepare, named, made.store, qrels)
        rows[:, 0] = [made.store.index_of(qid) if qid in own else -1 for qid in named]
    return found if any((rows >= 0).any() for rows in found.values()) else {}


def _named(
    experiment: DenseExperiment, source: str, qids: Mapping[str, Sequence[str]]
) -> list[str]:
    """The qid of each row of a source of labelled queries."""
    return [qids[source][number] for number in _queries(experiment, source)["query"][:, 0]]


def _finder(settings: Negatives, made: Prepared, *, deeper: bool = False) -> Find:
    """deeper: by a passage, as the query's own may be found and is left out."""
    if settings.source == "random":
        return lambda tokens: np.zeros((len(tokens), 0), np.int32)
    index = settings.bm25.fit(made.store)

    def find(tokens: np.ndarray) -> np.ndarray:
        """What BM25 finds for the queries as the encoder reads them."""
        depth = settings.skip + settings.depth + deeper
        found = np.full((len(tokens), depth), -1, np.int32)
        for row, ids in zip(found, tokens, strict=True):
            scores = index.scores(made.vocabulary.decode(ids.tolist()))
            best = index.best(scores, len(row))
            row[: len(best)] = [made.store.index_of(passage.pid) for passage in best]
        return found

    return find


def _write_pools(
    experiment: DenseExperiment,
    folder: Path,
    settings: Negatives,
    find: Find,
    own: Mapping[str, np.ndarray],
) -> None:
    """One pool a source, of queries in blocks; own: see `_own`."""
    number = len(PassageStore(Path(experiment.model_dir) / "prepare" / "passages"))
    for source in sources(experiment):
        queries = _queries(experiment, source)
        others = queries["positives"]
        if own:
            others = np.hstack([others, own[source]])
        pools = []
        for start in range(0, len(queries["positives"]), BLOCK):
            block = slice(start, start + BLOCK)
            pools.append(
                mined(
                    find(np.asarray(queries["encoder_input_tokens"][block])),
                    others[block],
                    count=settings.depth,
                    num_passages=number,
                    skip=settings.skip,
                    seed=[settings.seed, start],
                )
            )
            logger.info("%s: %s, %d queries", folder.name, source, start + len(pools[-1]))
        np.save(folder / f"{source}.npy", np.concatenate(pools))


def _pool(experiment: DenseExperiment, stage: str, source: str) -> np.ndarray:
    """int32 [n, depth]: what `_write_pools` wrote."""
    with kept.reading(Path(experiment.model_dir) / stage / f"{source}.npy") as file:
        return np.load(file, mmap_mode="r", allow_pickle=False)


def _queries(experiment: DenseExperiment, source: str) -> arrays.Features:
    return arrays.read_arrays(Path(experiment.model_dir) / "prepare" / "arrays" / source)


def teach(experiment: DenseExperiment, folder: Path) -> None:
    """Writes a folder of token arrays for each split: rank lists that the teacher has ordered of
    the pool and the positives of each query; and report.json, see `stages.teach`."""
    made = Prepared.load(experiment.model_dir)
    qids = kept.read_json(made.folder / QIDS)
    own, report = _own(experiment, made), {}
    for source in sources(experiment):
        pool = _pool(experiment, "negatives", source)
        queries = _queries(experiment, source)
        named = _named(experiment, source, qids)
        lists, coverage = _ranked(experiment, made, source, named, pool)
        names = ("encoder_input_tokens", "positives")
        rows = {name: queries[name][lists.query_rows] for name in names}
        if own:  # no positives, as no list holds them; but no negatives in lists of others either
            itself = own[source][lists.query_rows]
            rows["positives"] = np.hstack([rows["positives"], itself])
        scores = lists.teacher_scores.astype(np.float32)
        arrays.write_arrays(
            folder / source, [rows | {"passages": lists.passages, "teacher_scores": scores}]
        )
        report[source] = {"teacher": coverage.report(), "lists": lists.report}
        for line in readable({source: report[source]["teacher"]}, lists.report):
            logger.info("teach: %s", line)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _ranked(
    experiment: DenseExperiment, made: Prepared, source: str, qids: list[str], pool: np.ndarray
) -> tuple[RankLists, Coverage]:
    split, coverage = source.removeprefix(_LABELLED), Coverage()
    queries, qrels = made.queries(split), made.qrels(split)
    lists = taught(
        experiment.teach,
        {qid: queries[qid].text for qid in qids},
        coverage=dict.fromkeys(qids, coverage),
        candidates=CandidateLists(qids, pool, made.store.pids),
        store=made.store,
        qrels=qrels,
        min_relevance=experiment.prepare.min_relevance,
        self_hits=self_hits(experiment.prepare, qids, made.store, qrels),
    )
    return lists, coverage


def dense(experiment: DenseExperiment, folder: Path) -> None:
    """Train the encoder, and embed all passages."""
    initial = None if experiment.initial is None else _initial(experiment)
    _train(experiment, folder, experiment.train, initial)


def batches(experiment: DenseExperiment, stage: str) -> Source:
    """What a training stage learns from, step by step."""
    if stage == "refresh":
        lists = _lists(experiment, experiment.refresh, "mine", experiment.mined)
        return Later(lists, experiment.train.steps)
    if experiment.teach is not None:
        return _taught(experiment)
    pool = experiment.negatives if "negatives" in experiment.stages else None
    return _lists(experiment, experiment.train, "negatives", pool)


def mine(experiment: DenseExperiment, folder: Path) -> None:
    """Writes pools as `negatives` does, of what the trained encoder finds."""
    settings = experiment.mined
    made = Prepared.load(experiment.model_dir)
    own = _own(experiment, made)
    find = _finder(settings, made, deeper=bool(own)) if settings.source != "own" else None
    if find is None:
        depth = settings.skip + settings.depth + _most(experiment) + bool(own)
        depth = min(depth, len(made.store))
        student = open_system(experiment, "dense", made, _search(experiment, depth=depth))
        find = lambda tokens: student.passages(tokens)[0]
    _write_pools(experiment, folder, settings, find, own)


def _most(experiment: DenseExperiment) -> int:
    """Positives of a query at most; such as are found are left out."""
    return max(_queries(experiment, source)["positives"].shape[1] for source in sources(experiment))


def refresh(experiment: DenseExperiment, folder: Path) -> None:
    """Train on from the trained encoder with the mined negatives, and embed all passages."""
    start = trained_params(experiment, "dense", Prepared.load(experiment.model_dir))
    _train(experiment, folder, experiment.refresh, start)


def _lists(
    experiment: DenseExperiment, settings: Training, stage: str, pool: Negatives | None
) -> ListSource:
    """Batches of a training run, with negatives from the pools of a stage."""
    tasks = {}
    for source in sources(experiment):
        tasks[source] = dict(_queries(experiment, source))
        if pool is not None:
            tasks[source]["negatives"] = _pool(experiment, stage, source)
    for source, own in _own(experiment, Prepared.load(experiment.model_dir)).items():
        tasks[source]["own"] = own
    corpus = _queries(experiment, CORPUS)["passage_tokens"]
    lists = experiment.lists
    return ListSource(
        Phases(list(_phases(experiment, settings, tasks))),
        corpus,
        positives=lists.positives,
        negatives=pool.count if pool else 0,
        seed=settings.seed,
        fixed=lists.fixed,
        grade_weights=lists.grade_weights,
    )


def _taught(experiment: DenseExperiment) -> TaughtLists:
    """Batches of the teacher's lists."""
    folder = Path(experiment.model_dir) / "teach"
    tasks = {source: arrays.read_arrays(folder / source) for source in sources(experiment)}
    corpus = _queries(experiment, CORPUS)["passage_tokens"]
    return TaughtLists(Phases(list(_phases(experiment, experiment.train, tasks))), corpus)


def _phases(
    experiment: DenseExperiment, settings: Training, tasks: Mapping[str, arrays.Features]
) -> Iterator[tuple[int, MixtureSource]]:
    """(steps, mixture) of each phase of the curriculum."""
    rates, splits = experiment.prepare.sources.rates(), experiment.prepare.train_splits
    phases = experiment.lists.phases(len(splits))
    ends = np.round(np.cumsum([share for share, _ in phases]) * experiment.train.steps).astype(int)
    for (_, weights), (begin, end) in zip(phases, itertools.pairwise([0, *ends]), strict=True):
        of_split = {
            f"{_LABELLED}{s}": w / sum(weights) for s, w in zip(splits, weights, strict=True)
        }
        mixed = {
            name: rates[kind] * of_split.get(name, 1.0)
            for name, kind in sources(experiment).items()
        }
        used = {name: (tasks[name], rate) for name, rate in mixed.items() if rate}
        yield int(end - begin), MixtureSource(used, settings.batch_size, settings.seed)


def _initial(experiment: DenseExperiment) -> Any:
    """Parameters with embeddings from the passages, or with the encoder of a published T5;
    projections are new."""
    vocabulary = Vocabulary.load(Path(experiment.model_dir) / "prepare")
    config = experiment.sized(vocabulary.size)
    if "start" in experiment.stages:
        return corpus_params(experiment, DualEncoder(config), experiment.train.seed)
    key = jax.random.key(experiment.train.seed)
    new = nn.unbox(partitioning.boxed_params(DualEncoder(config), key))
    return start_from(new, student.initial_params(experiment, config.t5, vocabulary))


def _train(experiment: DenseExperiment, folder: Path, settings: Training, initial: Any) -> None:
    """Train, embed, and leave what `Retriever.load` needs."""
    made = Prepared.load(experiment.model_dir)
    config = experiment.sized(made.vocabulary.size)

    def embedded(params: Any, search: DenseSearch, at: Path) -> System:
        _embed(experiment, params, made, search, at)
        return assembled(experiment, at, params, search, made)

    opened = validation.in_passing(embedded, folder)
    validated = validation.of(experiment, settings, made, opened)
    source = batches(experiment, folder.name)
    training_run.train(
        experiment, folder, folder.name, settings, DualEncoder(config), source, initial, validated
    )
    params = trained_params(experiment, folder.name, made)
    _embed(experiment, params, made, _search(experiment), folder)
    systems = experiment.systems
    write_student(folder, experiment.kind, config, experiment.evaluate.search, systems)


def _embed(
    experiment: DenseExperiment, params: Any, made: Prepared, search: DenseSearch, folder: Path
) -> None:
    """Writes the vectors of all passages, by the encoder with these parameters."""
    mesh, rules = partitioning.make_mesh(experiment.mesh), experiment.mesh.rules
    encoder = Encoder(experiment.sized(made.vocabulary.size), params, mesh, rules)
    path, encode_inputs = folder / retrieval.VECTORS, made.vocabulary.encode_inputs
    retrieval.embed(encoder, made.store, encode_inputs, path, search)


def _search(experiment: DenseExperiment, **settings: Any) -> DenseSearch:
    """Lengths of texts as they are prepared; the rest has no effect on vectors."""
    prepare = experiment.prepare
    return DenseSearch(
        query_length=prepare.query_length, passage_length=prepare.passage_length, **settings
    )


MAKERS: dict[str, Callable[[DenseExperiment, Path], None]] = {
    "prepare": prepare,
    "start": corpus_start,
    "negatives": negatives,
    "teach": teach,
    "dense": dense,
    "mine": mine,
    "refresh": refresh,
    "evaluate": evaluate,
}
