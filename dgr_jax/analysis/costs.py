"""What a finished system cost to train, what it costs to search with, and how far it drifts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.analysis import drift, speed
from dgr_jax.capacity import formulas
from dgr_jax.capacity.counting import TAKEN, corpus_of
from dgr_jax.capacity.planner import planner_of
from dgr_jax.capacity.programs import ProgramShape
from dgr_jax.capacity.sizes import training_stages
from dgr_jax.corpora import trec
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.model_dir.kept import read_json
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval.kinds import read_student
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.system import System
from dgr_jax.settings import restored
from dgr_jax.stages.evaluate import chosen_queries, first_test_split
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.systems import open_system
from dgr_jax.training.arrays import read_arrays
from dgr_jax.training.refreshing import OLD

QUERIES = 200  # the most queries that are timed, and whose drift is measured

# Why `expected_flops` has nothing to say of some experiments.
UNCOUNTED = (
    "whose identifiers are of several views: how many and how long they are is known once they are "
    "prepared"
)

COLUMNS = ("training PFLOP", "index MB", "ms a query", "ms a query, batched", "drift")


def measure(
    experiment: Experiment | DenseExperiment, system: str, split: str = "", relevance: str = ""
) -> dict[str, float]:
    """COLUMNS by name: 'ms a query' is the median of one at a time; 'drift' in nats, only with
    `relevance`, see `analysis.drift`.

    PFLOP: 1e15 products and sums of the matrices, forward and backward, of all training stages of
    the system, from the shapes of their batches; of a teacher, none. Times are those of the device
    that this runs on, texts in and pids out; they and the drift are of QUERIES queries of the split
    ('': the first test split), evenly spaced.
    relevance: 'qrels', or the path of a TREC run with a teacher's scores; '': no drift.

    Raises ValueError for drift of identifiers of several views, or a run of none of the queries.
    """
    prepared = Prepared.load(experiment.model_dir)
    split = split or first_test_split(experiment)
    asked = {q: query.text for q, query in chosen_queries(experiment, prepared, split).items()}
    opened = open_system(experiment, system, prepared)
    timed = speed.measure(
        Retriever(opened, prepared.vocabulary, prepared.store), list(_spaced(asked).values())
    )
    numbers = (
        training_flops(experiment, system) / 1e15,
        opened.index_bytes / 1e6,
        timed["alone"]["latency_ms"]["p50"],
        1000 / timed["batched"]["queries_per_second"],
    )
    costs = dict(zip(COLUMNS, numbers, strict=False))
    if relevance:
        known = _relevance(experiment, prepared, split, relevance)
        texts = _spaced({qid: text for qid, text in asked.items() if qid in known})
        costs["drift"] = _drift(opened, prepared, texts, known)
    return costs


def training_flops(experiment: Experiment | DenseExperiment, system: str) -> float:
    """FLOPs of all training stages of a system, or of those that it is made of, whose data is
    there."""
    config = experiment.network(Prepared.load(experiment.model_dir).vocabulary.size)
    made_of = experiment.made_of(system)
    stages = {k: v for name in made_of for k, v in experiment.training(name).items()}
    total = 0.0
    for stage, settings in stages.items():
        batches = experiment.stages[stage].batches
        assert batches is not None  # as the stage trains
        total += settings.steps * step_flops(config, batches(experiment).batch(0))
    return total


def refresh_flops(folder: Path, settings: Training) -> float:
    """FLOPs of a refreshed student, from the folder of its stage: of its training steps, and of the
    pass in which the student before said what it knew."""
    config = restored(T5Config, read_student(folder).model)
    counts, total = read_json(folder / "report.json")["examples"], 0.0
    for name, count in counts.items():
        arrays = read_arrays(folder / "arrays" / name)
        shapes = {n: arrays[n][:1] for n in ("encoder_input_tokens", "decoder_target_tokens")}
        of_example = step_flops(config, shapes)
        share = read_json(folder / "report.json")["rates"][name]
        total += settings.steps * settings.batch_size * share * of_example
        total += count * of_example / formulas.passes(config) * (OLD in arrays)
    return total


def expected_flops(
    experiment: Experiment | DenseExperiment, corpus: CorpusSize | None = None
) -> dict[str, float]:
    """Training stage -> FLOPs as in `training_flops`, before any data is there: every text is as
    long as it may be, identifiers are what `capacity.sizes` takes them to be.

    corpus: None takes that of `planned_corpus`.
    Empty with identifiers of several views: what they are is known once they are made.
    """
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    planner = planner_of(experiment)
    sizes = planner.sizes(experiment, corpus or planned_corpus(experiment))
    shaped = planner.batches(experiment, sizes, mesh)
    if shaped is None:
        return {}
    config, batch = shaped
    return {
        stage: float(settings.steps * step_flops(config, batch(stage)))
        for stage, settings in training_stages(experiment).items()
    }


def planned_corpus(experiment: Experiment | DenseExperiment) -> CorpusSize:
    """The corpus by the settings of its collection, where these tell how many passages it has;
    otherwise as in other plans."""
    size = getattr(experiment.collection, "size", 0)
    return TAKEN._replace(passages=size) if size else corpus_of(experiment)[0]


def step_flops(config: T5Config, batch: Mapping[str, Any]) -> float:
    """FLOPs of a training step on a batch of `training.objectives` or `training.dense`, padding
    counted; optimizer, losses and the products of passage vectors are not, which are little."""
    if "passage_tokens" in batch:
        queries, passages = batch["encoder_input_tokens"], batch["passage_tokens"]
        shapes = queries.shape, (np.prod(passages.shape[:-1]), passages.shape[-1])
        forward = sum(formulas.encoder_flops(config, *shape) for shape in shapes)
    else:
        parts = {"generation": batch} if "encoder_input_tokens" in batch else dict(batch)
        alone = "generation" not in parts  # lists whose best positives are learned too
        forward = sum(_written_flops(config, part, alone) for part in parts.values())
    return formulas.passes(config) * forward


def _written_flops(config: T5Config, batch: Mapping[str, np.ndarray], positives: bool) -> float:
    """With identifiers of several views, a query is read once a view, and all of it is seen."""
    rows, *views, length = batch["encoder_input_tokens"].shape
    _, *together, longest = batch["decoder_target_tokens"].shape
    targets = int(np.prod(together))
    if "packed_tokens" in batch:
        _, targets, longest = batch["packed_tokens"].shape
        targets += positives
    elif "identifier_tokens" in batch:
        listed = batch["identifier_tokens"].shape
        targets, longest = np.prod(listed[1:-1]) + positives, listed[-1]
    seen = int(np.prod(views)) * length
    written = formulas.forward_flops(config, ProgramShape(rows, seen, targets, longest))
    written -= formulas.encoder_flops(config, rows, seen)
    return written + formulas.encoder_flops(config, rows * seen // length, length)


def _relevance(
    experiment: Experiment | DenseExperiment, prepared: Prepared, split: str, source: str
) -> dict[str, drift.Relevance]:
    """qid -> relevance distribution, of queries that have one; passages of a run that are not of
    the corpus are left out of it."""
    least = max(1, experiment.prepare.min_relevance)
    index = {pid: row for row, pid in enumerate(prepared.store.pids)}
    if source == "qrels":
        graded = {
            qid: {index[pid]: grade for pid, grade in grades.items()}
            for qid, grades in prepared.qrels(split).items()
            if max(grades.values(), default=0) >= least
        }
        return {qid: drift.of_grades(grades, least) for qid, grades in graded.items()}
    run = trec.run_in_memory(trec.runs(Path(source)))
    scored = {
        qid: {index[p.pid]: p.score for p in passages if p.pid in index}
        for qid, passages in run.items()
    }
    return {qid: drift.of_scores(scores) for qid, scores in scored.items() if scores}


def _drift(
    system: System, prepared: Prepared, texts: Mapping[str, str], known: dict[str, drift.Relevance]
) -> float:
    if not texts:
        raise ValueError("Study.drift: got the relevance of none of the queries, expected some")
    if not system.scores_all:
        raise ValueError(
            f"Study.drift: got a {type(system).__name__}, which cannot score all passages; "
            "expected one identifier a passage (Prepare.identifiers), or a dense retriever"
        )
    queries = system.encode(prepared.vocabulary, list(texts.values()))
    return float(drift.measure(system, queries, [known[qid] for qid in texts]).mean())


def _spaced(asked: Mapping[str, str]) -> dict[str, str]:
    """At most QUERIES of them, evenly spaced."""
    qids = list(asked)
    chosen = np.linspace(0, len(qids) - 1, min(QUERIES, len(qids))).round().astype(int)
    return {qids[i]: asked[qids[i]] for i in chosen}
