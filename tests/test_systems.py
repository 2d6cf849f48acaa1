"""What answers queries: one contract for every kind, and one more kind from outside the package."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import tarfile
from dataclasses import dataclass
from types import SimpleNamespace

import gin
import jax
import numpy as np
import pytest

import dgr_jax
from dgr_jax import evaluate, partitioning, plan, retrieve, train
from dgr_jax.config import cli, configurables, gin_files
from dgr_jax.corpora import store, trec
from dgr_jax.corpora.types import Passage
from dgr_jax.experiments.common import Evaluate
from dgr_jax.experiments.study import Study
from dgr_jax.model_dir import kept, records
from dgr_jax.models.dual_encoder import DualEncoderConfig
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.bm25 import Bm25, Bm25Baseline
from dgr_jax.retrieval.dense import DenseSearch, Encoder, Searcher
from dgr_jax.retrieval.exact_search import ExactSearch, Index
from dgr_jax.retrieval.generative import Decoder, Search
from dgr_jax.retrieval.multiview.search import MultiviewSearch
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.system import Opening, System, SystemSettings, checked_mask
from dgr_jax.settings import restored
from dgr_jax.stages.prepared import Prepared
from dgr_jax.studies import outstanding, report, runner
from dgr_jax.studies.grid import Grid
from tests import students, test_experiment
from tests.test_old_model_dir import KEPT

PASSAGES = [Passage(f"p{9 - i}", f"word{i % 7} and word{i % 3}") for i in range(10)]
TEXTS = ["word1 word2", "word6", "word0 word1"]


# One more kind, as somebody else would write it.


@dataclass(frozen=True)
class WeightedSum(SystemSettings):
    """A trained student and BM25: the sum of their scores, of what both have found."""

    of: str = "distill"
    weight: float = 0.5
    bm25: Bm25 = Bm25()

    @property
    def made_of(self):
        return (self.of,)

    def open(self, opening):
        words = Bm25Baseline("words", self.bm25).open(
            dataclasses.replace(opening, depth=len(opening.store))
        )
        return Sum(opening.system(self.of), words, self.weight, opening.depth)


@dataclass(frozen=True)
class Sum(System):
    student: System
    words: System
    weight: float
    depth: int

    @property
    def mesh(self):
        return self.student.mesh

    @property
    def limits(self):
        return self.student.limits | {"depth": self.depth}

    @property
    def index_bytes(self):
        return self.student.index_bytes + self.words.index_bytes

    def describe(self):
        return self.student.describe() | {"weight": self.weight}

    def encode(self, vocabulary, texts):
        parts = (part.encode(vocabulary, texts) for part in (self.student, self.words))
        return list(zip(*parts, strict=True))

    def passages(self, queries):
        tokens, texts = zip(*queries, strict=True)
        found, scores = self.student.passages(np.stack(tokens))
        also, more = self.words.passages(list(texts))
        same = found[:, :, None] == also[:, None, :]
        added = np.where(same & (found >= 0)[:, :, None], more[:, None, :], 0.0).sum(-1)
        scores = np.where(found >= 0, scores + self.weight * added, -np.inf).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.depth]
        return np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)

    def restrict(self, passage_mask):
        parts = (part.restrict(passage_mask) for part in (self.student, self.words))
        return Sum(*parts, self.weight, self.depth)


@pytest.fixture(scope="module")
def known():
    """`WeightedSum` as one line of configurables makes it known."""
    with pytest.MonkeyPatch.context() as patch:
        components = (*configurables._components(), WeightedSum)
        patch.setattr(configurables, "_components", lambda: components)
        configurables.configurables.cache_clear()
        gin_files.register()
        if "WeightedSum" not in gin.config._REGISTRY:
            made = configurables.configurables()["WeightedSum"]
            gin.external_configurable(made, name="WeightedSum", module="dgr_jax")
        yield
    configurables.configurables.cache_clear()


SUM = (
    "--gin.Evaluate.systems=(@WeightedSum(),)",
    "--gin.WeightedSum.name='sum'",
    "--gin.WeightedSum.weight=0.25",
)


@pytest.fixture(scope="module")
def measured(known, tmp_path_factory):
    """A MODEL_DIR of version 0.1, whose student.json says no kind, measured with one system more:
    no stage but evaluate runs, and no student is searched again."""
    folder = tmp_path_factory.mktemp("systems")
    with tarfile.open(KEPT) as archive:
        archive.extractall(folder, filter="data")
    folder = folder / "model"
    runs = {path: path.read_bytes() for path in folder.glob("*/runs/*.trec")}
    assert len(runs) == 4
    before = json.loads((folder / "evaluate/metrics.json").read_text())
    train.command([f"--model_dir={folder}", "--gin.Mesh.data=8", *SUM])
    assert {path: path.read_bytes() for path in runs} == runs
    return folder, before


@pytest.mark.slow
def test_one_more_kind_is_measured(measured):
    folder, before = measured
    found = json.loads((folder / "evaluate/metrics.json").read_text())
    assert {name: found[name] for name in before} == before
    assert list(found) == [*before, "sum"]
    compared = json.loads((folder / "evaluate/comparisons.json").read_text())["test"]
    pairs = dict.fromkeys(row["systems"] for row in compared)
    assert list(pairs)[-2:] == ["sum against distill", "sum against bm25"]
    (run,) = (folder / "distill/runs").glob("sum.test-*.trec")
    assert run.read_bytes() == (folder / "evaluate/sum.test.trec").read_bytes()
    written = run.stat().st_mtime_ns
    evaluate.command([f"--model_dir={folder}", "--gin.Evaluate.measures=('RR@10',)"])
    assert run.stat().st_mtime_ns == written


@pytest.mark.slow
def test_one_more_kind_answers(measured, capsys):
    """The same passages from its name alone, and from the command."""
    folder, _ = measured
    retriever = Retriever.load(folder, system="sum")
    assert type(retriever.decoder) is Sum and retriever.decoder.weight == 0.25
    texts = {q.qid: q.text for q in Prepared.load(folder).queries("test").values()}
    run = trec.run_in_memory(trec.runs(folder / "evaluate/sum.test.trec"))
    found = retriever.run({qid: texts[qid] for qid in run})
    assert {q: [p.pid for p in ps] for q, ps in found.items()} == {
        q: [p.pid for p in ps] for q, ps in run.items()
    }
    retrieve.command(
        [f"--model_dir={folder}", "--query=Why do bees dance?", "--system=sum", "--k=5"]
    )
    assert "  1. " in capsys.readouterr().out
    (hits,) = Retriever.load(folder, system="bm25", depth=3).search(["Why do bees dance?"], k=3)
    assert len(hits) == 3 and "bee" in hits[0].text and hits[0].identifier == ""
    assert Retriever.load(folder, system="sum", weight=3.0, num_beams=4).decoder.weight == 3.0
    with pytest.raises(ValueError, match=r"num_beans: the sum retriever of .* expected some of"):
        Retriever.load(folder, system="sum", num_beans=3)
    with pytest.raises(ValueError, match=r"^Search.num_beams: got 0, expected at least 1"):
        Retriever.load(folder, num_beams=0)
    with pytest.raises(ValueError, match="system: got 'some', expected one of distill, control, "
                                         "generate, bm25, sum, those of"):  # fmt: skip
        Retriever.load(folder, system="some")


@pytest.mark.slow
def test_one_more_kind_is_a_row_of_a_study(measured, tmp_path, capsys):
    """With what it costs; the stages of the experiment are there already."""
    folder, _ = measured
    study = Study(
        gin_files=(str(folder / "config.gin"),), systems=("distill", "sum"), costs=True,
        measures=("RR@10",), baseline={"system": "distill"},
    )  # fmt: skip
    grid = Grid(study, str(tmp_path / "study"), gin_files.from_flags)
    outstanding.show(grid)
    assert "1 experiments" in capsys.readouterr().out
    (run,) = grid.runs
    for stage, (_, at) in grid.state(run).items():
        at.parent.mkdir(parents=True, exist_ok=True)
        (folder / stage).rename(at)
    try:
        assert runner.run(grid) == []
        report.write(grid)
    finally:
        for stage, (_, at) in grid.state(run).items():
            at.rename(folder / stage)
    with (tmp_path / "study/table.csv").open(encoding="utf-8") as table:
        distill, added = csv.DictReader(table)
    assert added["system"] == "sum" and added["training PFLOP"] == distill["training PFLOP"]
    assert float(added["index MB"]) > float(distill["index MB"])
    assert added["RR@10 p"] != ""


def test_one_more_kind_is_planned(known, capsys):
    plan.command(["--gin_file=quickstart.gin", *SUM, "--topology=h100:1", "--passages=240"])
    assert "distill" in capsys.readouterr().out


# The contract.


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    return store.write(PASSAGES, tmp_path_factory.mktemp("passages") / "store")


class Vectors(Encoder):
    """An encoder of queries that are vectors already."""

    def queries(self, tokens, search):
        return tokens.astype(np.float32)


def docids(passages):
    search = Search(num_beams=8, depth=6, batch_size=4, query_length=8)
    return students.decoder(students.codes(len(passages)), search), students.queries(3)


def vectors(passages):
    random = np.random.default_rng(0)
    config = SimpleNamespace(t5=T5Config(vocab_size=8), dim=4)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    encoder = Vectors(config, {"a": np.zeros(3)}, mesh)
    index = Index(random.normal(size=(len(passages), 4)).astype(np.float32), ExactSearch(), mesh)
    return Searcher(encoder, index, DenseSearch(depth=6)), random.integers(1, 9, (3, 4))


def words(passages):
    opening = Opening(passages.folder, passages, 6, None, None, None)
    system = Bm25Baseline("bm25").open(opening)
    return system, system.encode(None, TEXTS)


KINDS = [docids, vectors, words]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_in_one_shape(kind, passages):
    system, queries = kind(passages)
    assert system.most_passages == min(system.limits.values()) == 6
    assert system.by_pid(passages.pid_of).most_passages == 6
    assert system.index_bytes > 0 and system.batch_size > 0 and system.mesh.size == 1
    assert json.loads(json.dumps(system.describe())) == system.describe() != {}
    found, scores = system.passages(queries)
    assert found.dtype == np.int32 and scores.dtype == np.float32
    assert found.shape == scores.shape == (3, 6) and (found[:, 0] >= 0).all()
    assert ((found < 0) == np.isneginf(scores)).all()
    hits = list(system.hits(queries))
    assert [[hit.passage for hit in row] for row in hits] == [
        [i for i in row if i >= 0] for row in found.tolist()
    ]
    assert all(hit.tokens.any() == system.writes for row in hits for hit in row)
    blocks = list(system.passages_of_blocks([queries[:2], queries[2:]]))
    np.testing.assert_array_equal(np.concatenate([block[0] for block in blocks]), found)
    (candidates,) = system.candidates([queries], 3)
    np.testing.assert_array_equal(candidates["passages"], found)
    if system.scores_all:
        log_probs = np.concatenate(list(system.log_probs(queries)))
        assert log_probs.shape == (3, len(passages))
        np.testing.assert_allclose(np.exp(log_probs).sum(1), 1, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="Bm25System cannot score all passages"):
            system.log_probs(queries)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_restricted(kind, passages):
    system, queries = kind(passages)
    mask = np.arange(len(passages)) % 2 == 1
    some = system.restrict(mask)
    found, _ = some.passages(queries)
    assert set(found[found >= 0].tolist()) <= set(np.flatnonzero(mask).tolist())
    fewer, _ = some.restrict(np.arange(len(passages)) < 6).passages(queries)
    assert set(fewer[fewer >= 0].tolist()) <= {1, 3, 5}
    every, _ = dataclasses.replace(system).passages(queries)
    assert (every % 2 == 0).any()
    name = type(system).__name__
    for wrong, message in (
        (mask[1:], rf"{name}.restrict: passage_mask must be bool of shape \[10\]; got bool of sh"),
        (mask.astype(float), rf"{name}.restrict: .* got float64 of shape \(10,\)"),
        (np.zeros(10, bool), f"{name}.restrict: passage_mask leaves no passage; expected one True"),
    ):
        with pytest.raises(ValueError, match=message):
            system.restrict(wrong)
    with pytest.raises(ValueError, match="leaves no passage"):
        some.restrict(~mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_retriever_of_any_kind_finds_some_passages_alone(kind, passages):
    system, queries = kind(passages)
    vocabulary = SimpleNamespace(
        encode_inputs=lambda texts, length: queries[: len(texts)], decode=lambda tokens: str(tokens)
    )
    retriever = Retriever(system, vocabulary, passages)
    pids = lambda found: {hit.pid for row in found.search(TEXTS, k=6) for hit in row}
    whole = pids(retriever)
    some = retriever.restrict(["p9", "p3", "p3", "p2"])
    assert pids(some) and pids(some) <= {"p9", "p3", "p2"}
    assert pids(retriever) == whole
    told = retriever.restrict(lambda passage: passage.pid != "p9" and "word0" in passage.text)
    assert pids(told) <= {p.pid for p in PASSAGES if "word0" in p.text} - {"p9"}
    assert pids(some.restrict(["p3", "p0"])) <= {"p3"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("p9", "passages: got one string 'p9', expected a list of pids"),
        (["p1", "x"], "passages: got 'x', expected pids of the 10 passages of the corpus"),
        (list("abcde"), "passages: got 'a', 'b', 'c' and 2 more, expected pids of the 10 pass"),
        ([], "passages: got none of the corpus, expected one or more"),
        (lambda _: False, "passages: got none of the corpus, expected one or more"),
    ],
)
def test_passages_that_cannot_be_chosen(given, message, passages):
    with pytest.raises(ValueError, match=message):
        Retriever(words(passages)[0], None, passages).restrict(given)


def test_the_package_offers_the_retriever():
    assert dgr_jax.Retriever is Retriever


def test_a_mask_of_all_that_is_left():
    mask = np.array([True, False, True])
    assert checked_mask(mask, 3, np.array([True, True, False]), "X").tolist() == [
        True,
        False,
        False,
    ]


# How they are written and opened.


@pytest.mark.parametrize(
    ("kind", "model", "search"),
    [
        ("docid", T5Config(vocab_size=8), Search(num_beams=3)),
        ("multiview", T5Config(vocab_size=8, mlp_activations=("relu",)), MultiviewSearch(depth=7)),
        (
            "dense",
            DualEncoderConfig(T5Config(vocab_size=8)),
            DenseSearch(index=ExactSearch("int8")),
        ),
    ],
)
def test_what_is_written_of_a_student_is_read_again(tmp_path, kind, model, search):
    kinds.write_student(tmp_path, kind, model, search, ("a", "b"))
    student = kinds.read_student(tmp_path)
    assert (student.kind, student.systems) == (kind, ("a", "b"))
    assert restored(kinds.TRAINED[kind].model_settings, student.model) == model
    assert restored(kinds.TRAINED[kind].search_settings, student.search) == search
    said = json.loads((tmp_path / "student.json").read_text())
    del said["kind"], said["systems"]  # as version 0.1 wrote it
    (tmp_path / "student.json").write_text(json.dumps(said))
    systems = ("dense",) if kind == "dense" else ("generate", "distill")
    assert kinds.read_student(tmp_path) == dataclasses.replace(student, systems=systems)
    (tmp_path / "student.json").write_text(json.dumps(said | {"kind": "oracle"}))
    with pytest.raises(kept.Damaged, match=r"got kind 'oracle', expected one of dense, docid"):
        kinds.read_student(tmp_path)


def test_the_experiments_say_which_system_is_the_best(tmp_path):
    """Also where one was made before another setting, or cannot be read."""
    write = lambda name, *systems: kinds.write_student(
        tmp_path / name, "dense", DualEncoderConfig(T5Config()), DenseSearch(), systems
    )
    assert kinds.best_first(tmp_path)[:2] == ("distill", "control")
    for name in ("dense", "refresh", "previous/dense", "more"):
        (tmp_path / name).mkdir(parents=True)
    write("dense", "dense")
    assert kinds.best_first(tmp_path) == ("dense",)
    write("refresh", "dense", "refresh")
    write("previous/dense", "dense")
    (tmp_path / "more/student.json").write_text("{")
    assert kinds.best_first(tmp_path) == ("refresh", "dense")


@pytest.mark.slow
def test_a_kind_may_answer_where_no_system_is_named(measured, monkeypatch):
    folder, _ = measured
    assert type(Retriever.load(folder).decoder) is Decoder
    monkeypatch.setattr(WeightedSum, "preferred", True)
    assert type(Retriever.load(folder).decoder) is Sum
    monkeypatch.delitem(SystemSettings.kinds, "WeightedSum")
    assert type(Retriever.load(folder).decoder) is Decoder


def test_a_system_of_an_unknown_kind(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/stage.json").write_text("{}")
    kinds.write_untrained(tmp_path, [WeightedSum("sum", weight=2.0)], 7)
    said = kinds.untrained(tmp_path)["sum"]
    assert kinds.settings_of(said) == WeightedSum("sum", weight=2.0) and said["depth"] == 7
    with pytest.raises(ValueError, match="got a system of kind 'Other', expected one of Bm25Bas"):
        kinds.settings_of(said | {"kind": "Other"})


def test_bm25_of_words_beside_that_of_stems(known):
    experiment = loaded("--gin.PLAN=None", "--gin.Evaluate.systems=(@Bm25Baseline(),)",
                        "--gin.Bm25Baseline.name='w'",
                        "--gin.Bm25Baseline.bm25=@w/Bm25()", "--gin.w/Bm25.stemmer=''")  # fmt: skip
    assert experiment.measured == ("bm25", "generate", "control", "distill", "w")
    stems, words = (experiment.untrained[name].bm25 for name in ("bm25", "w"))
    assert stems.stemmer and words == dataclasses.replace(stems, stemmer="")
    assert experiment.pairs[-1] == ("w", "bm25")


def loaded(*flags):
    argv = ["--gin_file=quickstart.gin", "--model_dir=m", *flags]
    args, bindings = cli.parse(cli.parser("train", ""), argv)
    return gin_files.load_experiment(args, bindings, keep=False)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([WeightedSum("distill")], "WeightedSum.name: got 'distill', expected letters, digits"),
        ([WeightedSum("bm25")], "WeightedSum.name: got 'bm25'"),
        ([WeightedSum("teach")], "WeightedSum.name: got 'teach'"),
        ([WeightedSum("a b")], "WeightedSum.name: got 'a b'"),
        ([WeightedSum("a"), WeightedSum("a")], "WeightedSum.name: got 'a'"),
        ([WeightedSum("a", of="dense")], "Evaluate.systems: 'a' is made of 'dense', expected some"),
    ],
)
def test_systems_that_cannot_be_added(added, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(test_experiment.BASE, evaluate=Evaluate(Search(), systems=tuple(added)))


def test_bm25_answers_from_whole_stages_alone(tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    question = "Why do bees dance?"
    first = Retriever.load(folder, system="bm25").search([question], k=3)
    (folder / "previous").mkdir(exist_ok=True)
    shutil.copytree(folder / "evaluate", folder / "previous" / "evaluate")
    records.write_record(folder / "evaluate", status="running")  # with other settings
    assert Retriever.load(folder, system="bm25").search([question], k=3) == first
    record = records.read_record(folder / "prepare")
    records.write_record(folder / "prepare", **record | {"status": "running"})
    with pytest.raises(ValueError, match="prepare: is not whole, and .*evaluate was trained on it"):
        Retriever.load(folder, system="bm25")
