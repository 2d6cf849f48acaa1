"""A dense retriever as an experiment: its settings, stages and features, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from matplotlib import image

from dgr_jax import prepare, retrieve, train
from dgr_jax.capacity import disk
from dgr_jax.capacity.counting import counted
from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Mistake
from dgr_jax.corpora import store
from dgr_jax.corpora.beir import write_beir
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data import examples
from dgr_jax.data.examples import Sources
from dgr_jax.experiments.common import Evaluate, Teach, Training
from dgr_jax.experiments.dense import DenseExperiment, DensePrepare, Lists, Negatives
from dgr_jax.losses import contrastive, ranking
from dgr_jax.model_dir import records
from dgr_jax.models.dual_encoder import DualEncoderConfig
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval.dense import DenseSearch, Searcher
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.settings import describe, fingerprint
from dgr_jax.stages import dense_prepare, pipeline
from dgr_jax.stages.pipeline import stage_settings
from dgr_jax.stages.prepared import Prepared
from dgr_jax.teaching.list_recipes import TopM
from dgr_jax.teaching.teachers import Bm25Teacher
from dgr_jax.training.arrays import read_arrays
from dgr_jax.training.dense import Dense
from dgr_jax.training.optimizers import Adafactor
from tests.conftest import TINY

LOSS = contrastive.single_lh
BASE = DenseExperiment(
    model_dir="model",
    collection=QuickstartCollection(),
    prepare=DensePrepare(tasks="quickstart"),
    model=DualEncoderConfig(),
    train=Training(Dense(LOSS), Adafactor(), steps=10),
    evaluate=Evaluate(DenseSearch()),
)
TEACH = Teach(Bm25Teacher(), TopM(4))
TAUGHT = Training(Dense(LOSS, teacher_loss=ranking.kl_divergence), Adafactor(), steps=10)
SMALL = tuple(
    flag for flag in TINY[1:]
    if flag.startswith(("--gin.T5Config", "--gin.Training", "--gin.Mesh", "--gin.WARMUP",
                        "--gin.BATCH_SIZE", "--gin.DEPTH", "--gin.QUERY", "--gin.Evaluate",
                        "--gin.SentencePiece"))
)  # fmt: skip
DENSE = ("--gin_file=quickstart_dense.gin", *SMALL, "--gin.STEPS=6", "--gin.PASSAGE_LENGTH=16")


# settings and stages


def test_stages_are_those_that_the_settings_ask_for():
    assert list(BASE.stages) == ["prepare", "dense", "evaluate"]
    assert BASE.stages["dense"].upstream(BASE) == ("prepare",)
    mined = dataclasses.replace(BASE, negatives=Negatives("bm25"), refresh=BASE.train)
    assert list(mined.stages) == ["prepare", "negatives", "dense", "mine", "refresh", "evaluate"]
    assert mined.stages["evaluate"].upstream(mined) == mined.systems == ("dense", "refresh")
    for experiment in (BASE, mined):
        known = list(experiment.stages)
        for place, stage in enumerate(known):
            assert set(experiment.stages[stage].upstream(experiment)) <= set(known[:place])


def test_it_runs_in_one_process(monkeypatch):
    monkeypatch.setattr(dense_prepare.processes, "count", lambda: 2)
    for name in ("dense", "evaluate"):
        with pytest.raises(ValueError, match="got 2 processes, expected one: a dense retriever is"):
            BASE.stages[name].check(BASE)


def test_every_setting_is_read_by_a_stage():
    whole = dataclasses.replace(BASE, negatives=Negatives("bm25"), refresh=BASE.train, teach=TEACH)
    assert whole.stages["dense"].upstream(whole) == ("teach",)
    read = {name for stage in whole.stages.values() for name in stage.settings(whole)}
    names = {field.name for field in dataclasses.fields(DenseExperiment)}
    assert names - read == {"model_dir", "mesh", "further"}


@pytest.mark.parametrize(
    ("change", "made_again"),
    [
        ({"lists": Lists(positives=2)}, {"dense", "evaluate"}),
        ({"model": DualEncoderConfig(projection=16)}, {"dense", "evaluate"}),
        ({"evaluate": Evaluate(DenseSearch(depth=5))}, {"evaluate"}),
        ({"mined": Negatives("own", count=2), "mesh": Mesh(model=2)}, set()),
    ],
)
def test_a_setting_belongs_to_the_stages_that_depend_on_it(change, made_again):
    other = dataclasses.replace(BASE, **change)
    marks = lambda of: {s: fingerprint(stage_settings(of, s)) for s in of.stages}
    before, after = marks(BASE), marks(other)
    assert {stage for stage in before if before[stage] != after[stage]} == made_again


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dataclasses.replace(BASE, evaluate=Evaluate(Search())),
            r"Evaluate.search: got Search, expected @DenseSearch\(\) with a dense retriever",
        ),
        (
            lambda: dataclasses.replace(BASE, evaluate=Evaluate(DenseSearch(passage_length=9))),
            "DenseSearch.passage_length: got 9, expected 128, DensePrepare.passage_length",
        ),
        (
            lambda: dataclasses.replace(BASE, negatives=Negatives("own")),
            "Negatives.source: got 'own', expected one of in_batch, random, bm25: an encoder finds",
        ),
        (
            lambda: dataclasses.replace(BASE, refresh=BASE.train, mined=Negatives()),
            "mined/Negatives.source: got 'in_batch', expected own, bm25 or random",
        ),
        (
            lambda: dataclasses.replace(BASE, lists=Lists(weights=(1.0, 1.0))),
            r"Lists.weights: got weights \(1.0, 1.0\), expected 1, one for each of DensePrepare",
        ),
        (
            lambda: dataclasses.replace(BASE, train=TAUGHT),
            r"DenseExperiment.teach: got None, expected @Teach\(\) with Dense.teacher_loss",
        ),
        (
            lambda: dataclasses.replace(BASE, teach=TEACH),
            "Negatives.source: got 'in_batch', expected bm25 or random: passages for the teacher",
        ),
        (
            lambda: dataclasses.replace(
                BASE, teach=TEACH, negatives=Negatives("bm25"), train=TAUGHT, refresh=TAUGHT
            ),
            "DenseExperiment.refresh: got a teacher loss, expected none",
        ),
        (
            lambda: dataclasses.replace(
                BASE,
                teach=TEACH,
                negatives=Negatives("bm25"),
                prepare=DensePrepare("quickstart", sources=Sources(pseudo_queries=0)),
            ),
            "Sources.passages: got a rate, expected 0: the teacher orders passages",
        ),
        (lambda: Negatives("teacher"), "Negatives.source: got 'teacher', expected one of in_batch"),
        (
            lambda: Negatives("bm25", count=9, depth=3),
            "Negatives.depth: got 3, expected at least 9",
        ),
        (lambda: DensePrepare("t", train_splits=("a", "a")), "DensePrepare.train_splits: got"),
        (lambda: DensePrepare("t", passage_length=1), "DensePrepare.passage_length: got 1, exp"),
    ],
)
def test_settings_that_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# gin files


def load(*flags):
    args, bindings = cli.parse(cli.parser("train", ""), flags)
    return gin_files.load_experiment(args, bindings, keep=False)


def test_losses_negatives_and_a_refresh_by_a_line_each():
    experiment = load("--gin_file=dense.gin", "--gin_file=runs/refresh.gin", "--gin.NEGATIVES=bm25",
                      "--gin.LOSS=@lse_pair()", "--gin.lse_pair.temperature=2")  # fmt: skip
    loss = experiment.train.objective.loss
    assert (loss.func, loss.keywords) == (contrastive.lse_pair, {"temperature": 2.0})
    assert experiment.negatives.source == "bm25" and experiment.mined.source == "own"
    assert experiment.refresh.steps == 1000
    assert describe(experiment.refresh.objective) == describe(experiment.train.objective)
    assert experiment.train.optimizer.learning_rate != experiment.refresh.optimizer.learning_rate


@pytest.mark.parametrize("files", [("taught", "refresh"), ("refresh", "taught")])
@pytest.mark.parametrize("more", [(), ("--gin.Dense.loss=None",)])
def test_a_taught_encoder_is_refreshed_without_its_teacher(files, more):
    experiment = load(
        "--gin_file=dense.gin", *(f"--gin_file=runs/{name}.gin" for name in files), *more
    )
    assert experiment.train.objective.teacher_loss.func is ranking.kl_divergence
    assert (experiment.train.objective.loss is None) == bool(more)
    assert experiment.refresh.objective.teacher_loss is None
    assert experiment.refresh.objective.loss.func is contrastive.single_lh


def test_a_refresh_with_a_teacher_loss_is_refused_however_it_is_made():
    """Losses that gin makes are never equal, though they are the same."""
    flags = ("--gin_file=dense.gin", "--gin_file=runs/refresh.gin", "--gin_file=runs/taught.gin")
    own = "--gin.refresh/Dense.teacher_loss=@kl_divergence()"
    for more in ((), ("--gin.DenseExperiment.teach=None", "--gin.Dense.teacher_loss=None")):
        with pytest.raises(Mistake, match="^DenseExperiment.refresh: got a teacher loss"):
            load(*flags, own, *more)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(Mistake, match="No configurable matching .*lse_pear.*did you mean lse_p"):
        load("--gin_file=dense.gin", "--gin.LOSS=@lse_pear()")
    flags = ("--gin_file=dense.gin", f"--data_dir={tmp_path}", f"--model_dir={tmp_path / 'm'}")
    with pytest.raises(FileNotFoundError, match="corpus.jsonl"):
        train.command(flags)
    with pytest.raises(ValueError, match=r"unknown stage 'distill', expected one of \('prepare'"):
        train.command((*flags, "--stages=distill"))
    with pytest.raises(
        ValueError, match="^--beam_options: got a dense retriever, expected an exper"
    ):
        prepare.command((*flags, "--beam_options=--runner=DirectRunner"))
    for asked in (flags, flags[2:]):
        with pytest.raises(Mistake) as error:
            retrieve.command(asked)
        assert str(error.value) == (
            "give --query or --queries: without them the stage 'candidates' runs, and this "
            "experiment has none (its stages: prepare, start, dense, evaluate)"
        )
    (tmp_path / "m" / "prepare").mkdir()
    with pytest.raises(
        FileNotFoundError, match="no trained student in .*refresh/student.json, den"
    ):
        retrieve.command((f"--model_dir={tmp_path / 'm'}", "--query=bees"))


# features


def test_examples_of_judged_queries(tmp_path):
    passages = store.write([Passage(f"p{i}", f"text {i}", "") for i in range(4)], tmp_path / "p")
    queries = {qid: Query(qid, f"words of {qid}") for qid in ("a", "b", "c")}
    qrels = [Qrel("b", "p2", 1), Qrel("a", "p3", 1), Qrel("b", "p0", 2), Qrel("b", "p1", 0),
             Qrel("c", "p1", 0)]  # fmt: skip
    made = list(examples.of_judged(queries, qrels, passages, 1))
    assert [(e["qid"], e["positives"].tolist(), e["grades"].tolist()) for e in made] == [
        ("b", [1, 3], [2, 1]), ("a", [4], [1]),
    ]  # fmt: skip
    (made,) = examples.of_positives([("a sentence", 3, "")])
    assert made["positives"].tolist() == [4] and made["grades"].tolist() == [1]
    assert made["query"].tolist() == [1]


# whole runs


def judged_twice(folder):
    """A collection with the labels of people (few) and of an LLM (many, of two grades)."""
    collection = QuickstartCollection()
    people, test = list(collection.qrels("train"))[::4], list(collection.qrels("test"))
    write_beir(folder, collection.passages(), collection.all_queries(),
               {"train": people, "llm": collection.qrels("train"), "test": test})  # fmt: skip


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(MODEL_DIR, log): BM25 negatives, labels of two sources, several positives, a refresh."""
    folder = tmp_path_factory.mktemp("dense")
    judged_twice(folder / "data")
    done = command("dgr_jax.train", *flags(folder), "--gin.Negatives.count=2")
    return folder / "model", done.stdout + done.stderr


def flags(folder):
    return (
        *DENSE,
        "--gin_file=runs/refresh.gin",
        "--gin.REFRESH_STEPS=3",
        "--gin.COLLECTION=@BeirCollection()",
        f"--gin.BeirCollection.folder={folder / 'data'}",
        f"--model_dir={folder / 'model'}",
        "--gin.NEGATIVES=bm25",
        "--gin.Negatives.depth=8",
        "--gin.LOSS=@rand1_lh()",
        "--gin.POSITIVES=2",
        "--gin.DensePrepare.min_relevance=1",
        "--gin.DensePrepare.train_splits=('train','llm')",
        "--gin.Lists.curriculum=((0.5, 0.0, 1.0), (0.5, 1.0, 0.0))",
        "--gin.Sources.pseudo_queries=0.25",
    )


@pytest.mark.slow
def test_a_plan_tells_the_sizes_of_the_run(finished):
    folder, _ = finished
    experiment = load(f"--model_dir={folder}")
    corpus, where = counted(experiment)
    assert where == str(folder / "prepare")
    told = {(line.stage, line.what): line for line in disk.lines(experiment, corpus)}
    held = lambda *path: sum(f.stat().st_size for f in folder.joinpath(*path).rglob("*.npy"))
    vectors = f"vectors of {experiment.model.dim} float32"
    assert told["refresh", vectors].size == pytest.approx(held("refresh"), rel=0.01)
    assert told["prepare", "passages as token arrays"].size == pytest.approx(
        held("prepare", "arrays", "corpus"), rel=0.05
    )
    pools = sum(x.size for (stage, _), x in told.items() if stage == "negatives")
    assert 0.5 < pools / held("negatives") < 2


@pytest.mark.slow
def test_a_run_is_measured_beside_bm25(finished):
    folder, log = finished
    measured = json.loads((folder / "evaluate/metrics.json").read_text())
    assert list(measured) == ["bm25", "dense", "refresh"]
    compared = json.loads((folder / "evaluate/comparisons.json").read_text())["test"]
    assert {row["systems"] for row in compared} == {
        "refresh against dense", "refresh against bm25", "dense against bm25",
    }  # fmt: skip
    assert "RR@10" in log and "positives a query: labelled train " in log
    assert image.imread(folder / "evaluate/training_curves.png").std() > 0.01
    for system in ("dense", "refresh"):
        rows = (folder / "evaluate" / f"{system}.test.trec").read_text().splitlines()
        assert len(rows) == 12 * 8  # queries and depth
    first, second = (np.load(folder / s / "vectors.npy") for s in ("dense", "refresh"))
    assert first.shape == second.shape == (240, 16) and not np.allclose(first, second)


@pytest.mark.slow
def test_pools_are_negatives_of_their_query(finished):
    folder, _ = finished
    experiment = gin_files.load_experiment(
        *cli.parse(cli.parser("train", ""), (f"--model_dir={folder}",))
    )
    assert isinstance(experiment, DenseExperiment)
    assert records.is_done(folder / "mine", pipeline.settings_of(experiment)["mine"])
    for stage in ("negatives", "mine"):
        for name in ("labelled_train", "labelled_llm", "pseudo_queries"):
            held = np.load(folder / "prepare/arrays" / name / "positives.npy")
            pool = np.load(folder / stage / f"{name}.npy")
            assert pool.dtype == np.int32 and len(pool) == len(held) and (pool >= 0).all()
            assert not (pool[:, :, None] == held[:, None, :]).any()
    assert (held >= 0).sum(1).max() == 1 < held.shape[1]


@pytest.mark.slow
def test_training_reads_what_was_judged_as_search_reads_it(finished):
    """SeqIO's tokens are those of the vocabulary; passages stand in the order of the corpus."""
    folder, _ = finished
    made = Prepared.load(folder)
    qids = json.loads((folder / "prepare/qids.json").read_text())["labelled_llm"]
    read = read_arrays(folder / "prepare/arrays/labelled_llm")
    queries, judged = made.queries("llm"), made.qrels("llm")
    named = [qids[number] for number in read["query"][:, 0]]
    texts = made.vocabulary.encode_inputs([queries[qid].text for qid in named], 12)
    np.testing.assert_array_equal(read["encoder_input_tokens"], texts)
    for qid, positives, grades in zip(named, read["positives"], read["grades"], strict=True):
        found = {made.store.pids[p]: g for p, g in zip(positives, grades, strict=True) if p >= 0}
        assert found == judged[qid] and list(found.values()) == sorted(found.values())[::-1]
    tokens = np.load(folder / "prepare/arrays/corpus/passage_tokens.npy")
    expected = made.vocabulary.encode_inputs([passage.contents for passage in made.store], 16)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_a_retriever_answers_as_it_was_measured(finished, capsys):
    folder, _ = finished
    retriever = Retriever.load(folder)
    assert isinstance(retriever.decoder, Searcher)
    queries = {query.qid: query.text for query in QuickstartCollection().queries("test")}
    lines = (folder / "evaluate/refresh.test.trec").read_text().splitlines()
    expected = [line.split()[2] for line in lines if line.split()[0] == lines[0].split()[0]]
    (hits,) = retriever.search([queries[lines[0].split()[0]]], k=8)
    assert [hit.pid for hit in hits] == expected and hits[0].identifier == ""
    with pytest.raises(ValueError, match=r"k: got 9, expected at most 8: set depth \(8\) in Retr"):
        retriever.search(["bees"], k=9)
    retrieve.command((f"--model_dir={folder}", "--query=why do bees dance", "--k=3"))
    assert capsys.readouterr().out.count("\n") > 3
    with pytest.raises(ValueError, match="num_beams: the refresh retriever of .* has no such sett"):
        retrieve.command((f"--model_dir={folder}", "--query=bees", "--num_beams=4"))
    (folder.parent / "q.tsv").write_text("1\tbees\n2\towls\n")
    retrieve.command((f"--model_dir={folder}", f"--queries={folder.parent / 'q.tsv'}",
                      "--report_speed", f"--output={folder.parent / 'speed.json'}"))  # fmt: skip
    report = json.loads((folder.parent / "speed.json").read_text())
    assert (report["vectors"], report["width"], report["storage"]) == (240, 16, "float32")


@pytest.mark.slow
def test_a_teachers_lists(finished, command, tmp_path):
    """Made beside the stages that are there already; the refresh goes on without the teacher."""
    folder, _ = finished
    again = shutil.copytree(folder, tmp_path / "model", symlinks=True)
    done = command(
        "dgr_jax.train", *flags(folder.parent), "--gin_file=runs/taught.gin",
        f"--model_dir={again}",
        "--gin.Negatives.count=2", "--gin.Sources.pseudo_queries=0", "--gin.TopM.size=4",
    )  # fmt: skip
    assert "teach: labelled_llm: 100.0% of" in done.stderr
    listed, relevant = (
        np.load(again / f"teach/labelled_llm/{name}.npy") for name in ("passages", "positives")
    )
    assert listed.shape[1] == 4 and len(listed) == len(relevant)
    hits = (listed[:, :, None] == relevant[:, None, :]) & (relevant[:, None, :] >= 0)
    assert hits.any((1, 2)).all()  # the teacher puts a judged passage first
    rows = [json.loads(row) for row in (again / "dense/metrics.jsonl").read_text().splitlines()]
    assert all(row["valid_lists"] > 0.9 and row["teacher_loss"] > 0 for row in rows)
    rows = [json.loads(row) for row in (again / "refresh/metrics.jsonl").read_text().splitlines()]
    assert rows and not any("teacher_loss" in row for row in rows)
    measured = json.loads((again / "evaluate/metrics.json").read_text())
    assert list(measured) == ["bm25", "dense", "refresh"]
