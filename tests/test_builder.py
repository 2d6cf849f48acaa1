"""`GenerativeRetriever`: an experiment from Python, the same as that of the command."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dgr_jax
from dgr_jax import GenerativeRetriever, train
from dgr_jax.config import builder, cli, gin_files
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.irds import IrDatasetsCollection
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.subset import Subset
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.identifiers.embeddings import TfidfSvd
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.losses import ranking
from dgr_jax.models.initial import Corpus
from dgr_jax.models.t5_config import T5Config
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.settings import fingerprint
from dgr_jax.stages.pipeline import stage_settings
from dgr_jax.teaching.list_recipes import TopM
from dgr_jax.teaching.teacher import Teacher
from dgr_jax.teaching.teachers import Bm25Teacher, FusionTeacher, RunTeacher
from tests.conftest import ROOT

PASSAGES = [
    {"pid": f"p{n}", "title": f"Title {n}", "text": f"word{n} is the text of passage {n}"}
    for n in range(12)
]
QUERIES = [{"qid": f"q{n}", "text": f"which passage has word{n}"} for n in range(12)]
QRELS = {
    "train": [{"qid": f"q{n}", "pid": f"p{n}"} for n in range(9)],
    "test": [{"qid": f"q{n}", "pid": f"p{n}", "relevance": 1} for n in range(9, 12)],
}
TINY_SIZE = T5Config(
    vocab_size=0, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.0,
)  # fmt: skip
TINY_BINDINGS = {"SentencePiece.size": 60, "Experiment.control": False}


@pytest.fixture(autouse=True)
def logging_of_the_tests(monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)


def experiment(retriever: GenerativeRetriever):
    return gin_files.from_flags(retriever.flags("m"))


def fingerprints(experiment) -> dict[str, str]:
    return {s: fingerprint(stage_settings(experiment, s)) for s in experiment.stages}


def small(collection, **settings) -> GenerativeRetriever:
    """The least that can be trained."""
    usual = dict(
        size=TINY_SIZE, plan=None, initial=None, generate_steps=2, distill_steps=1, batch_size=8,
        list_batch_size=8, warmup_steps=1, query_length=8, num_beams=4, depth=4,
        identifiers=ResidualQuantization(2, 4, TfidfSvd(dim=4)),
        bindings=TINY_BINDINGS,
    )  # fmt: skip
    return GenerativeRetriever(collection, **usual | settings)


def beir_folder(folder: Path) -> Path:
    passages = (Passage(p["pid"], p["text"], p["title"]) for p in PASSAGES)
    queries = (Query(q["qid"], q["text"]) for q in QUERIES)
    qrels = {s: [Qrel(j["qid"], j["pid"], 1) for j in rows] for s, rows in QRELS.items()}
    write_beir(folder, passages, queries, qrels)
    return folder


def test_settings_are_what_was_given():
    """Also where the recipe sets others of the same kind, and where two of a kind differ."""
    teacher = FusionTeacher(teachers=(Bm25Teacher(bm25=Bm25(k1=1.2)), Bm25Teacher(own=3)))
    given = dict(
        identifiers=KMeansTree(), teacher=teacher, lists=TopM(size=5), plan=Lexical(num_beams=3),
        initial=Corpus(max_passages=7), loss=ranking.bind("ranknet", temperature=2.0),
    )  # fmt: skip
    made = experiment(
        GenerativeRetriever(
            QuickstartCollection(), recipe="laptop", size="mini", seed=7, generate_steps=11,
            learning_rate=0.5, bindings={"Candidates.max_queries": 5}, **given,
        )
    )  # fmt: skip
    assert made.collection == QuickstartCollection()
    assert made.prepare.identifiers == given["identifiers"]
    assert made.teach.teacher == teacher
    assert made.teach.lists == given["lists"]
    assert made.plan == given["plan"]
    assert made.initial == given["initial"]
    assert made.evaluate.baseline == Bm25()
    assert made.distill.objective.loss.keywords == {"temperature": 2.0}
    assert made.model.emb_dim == 256
    recipe = gin_files.from_flags(["--gin_file=laptop.gin", "--model_dir=m", "--data_dir=d"])
    assert (made.teach.seed, made.generate.steps) == (7, 11)
    assert made.distill.steps == recipe.distill.steps
    assert made.generate.optimizer.learning_rate.peak == 0.5
    assert made.candidates.max_queries == 5


def test_none_and_recipe_leave_what_the_recipe_says():
    usual = gin_files.from_flags(["--gin_file=quickstart.gin", "--model_dir=m"])
    same = experiment(GenerativeRetriever(recipe="quickstart"))
    assert fingerprints(same) == fingerprints(usual)
    assert usual.plan == Lexical(queries_weight=0.2)
    without = experiment(GenerativeRetriever(recipe="quickstart", plan=None, initial=None))
    replaced = dataclasses.replace(usual, plan=None, initial=None)
    assert fingerprints(without) == fingerprints(replaced)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("FOLDER", BeirCollection("FOLDER")),
        (Path("FOLDER"), BeirCollection("FOLDER")),
        (BeirCollection("elsewhere"), BeirCollection("elsewhere")),
        ("irds:beir/scifact", IrDatasetsCollection("beir/scifact")),
        (
            IrDatasetsCollection("cranfield", (("test", "cranfield"),)),
            IrDatasetsCollection("cranfield", (("test", "cranfield"),)),
        ),
        (Subset(QuickstartCollection(), size=9), Subset(QuickstartCollection(), size=9)),
        (PASSAGES, BeirCollection("m/collection")),
        (iter(PASSAGES), BeirCollection("m/collection")),
    ],
)
def test_collections(given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    assert experiment(GenerativeRetriever(given)).collection == expected
    assert not Path("m").exists()


class OwnTeacher(Teacher):
    def order(self, queries, pools, store):
        return ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(collection="nowhere"), "collection: no folder at 'nowhere', expected one in BEIR"),
        (dict(collection=7), "collection: got 7, expected a folder in BEIR layout, passages"),
        (dict(), "collection: got None, expected"),
        (dict(collection=PASSAGES, queries=QUERIES), "qrels: got none with queries, expected both"),
        (dict(collection=PASSAGES, qrels=QRELS), "queries: got none with qrels, expected both or"),
        (dict(collection="irds:x", queries=QUERIES), "got some beside a collection that has its"),
        (dict(collection=PASSAGES, size="huge"), "size: got 'huge', expected one of base, large"),
        (dict(collection=PASSAGES, recipe="labtop"), "labtop.gin: not found .*did you mean lapt"),
        (dict(collection=PASSAGES, generate_steps=-1), "Training.steps: got -1, expected at least"),
        (dict(collection=PASSAGES, seed=1.5), "seed: got 1.5, expected a whole number"),
        (dict(collection=PASSAGES, loss="ranknett"), "ranknett.*did you mean ranknet"),
        (dict(collection=PASSAGES, identifiers=Bm25()), "Prepare.identifiers: got Bm25, expected"),
        (dict(collection=PASSAGES, teacher=OwnTeacher()), "teacher: got OwnTeacher, expected a"),
        (
            dict(collection=PASSAGES, bindings={"Search.num_beens": 3}),
            "num_beens.*did you mean num_beams",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_done(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        GenerativeRetriever(**settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(collection=[{"pid": "a", "txt": "b"}]), "passage 1: got the fields pid, txt, expect"),
        (dict(collection=[]), "corpus.jsonl.*no passage|holds no passage|empty"),
        (dict(collection=["text"]), "passage 1: got 'text', expected a dictionary"),
        (
            dict(collection=PASSAGES, queries=QUERIES, qrels={"test": [{"qid": "q1", "pid": 1,
                 "score": 0.5}]}),
            "judgement 1: got relevance 0.5, expected a whole number",
        ),
        (dict(collection=PASSAGES + PASSAGES[:1]), "p0.* again"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read_stop_fit_before_any_stage(settings, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        small(**settings).fit(tmp_path / "m")
    made = tmp_path / "m"
    assert not [path for path in made.glob("*/stage.json") if "done" in path.read_text()]


def test_the_command_is_the_same_experiment(tmp_path, monkeypatch):
    """Its config.gin is the same, and so is every fingerprint."""
    monkeypatch.chdir(tmp_path)
    given = small(beir_folder(tmp_path / "data"), teacher=RunTeacher(path="a b"))
    words = shlex.split(given.command("one"))
    assert words[:3] == ["python", "-m", "dgr_jax.train"]
    ours = given._load(given.flags("one"), keep=True)[0]
    text = Path("one/config.gin").read_text()
    theirs = gin_files.from_flags(words[3:], keep=True)
    assert fingerprints(ours) == fingerprints(theirs)
    assert Path("one/config.gin").read_text() == text
    assert fingerprints(gin_files.from_flags(["--model_dir=one"])) == fingerprints(ours)


def files_of(model_dir: Path) -> dict[str, bytes]:
    """What an experiment made, but for what tells the time, and the folder in config.gin."""
    made = {}
    for path in sorted(model_dir.rglob("*")):
        name = str(path.relative_to(model_dir))
        if path.name == "stage.json":
            record = json.loads(path.read_text())
            made[name] = record["settings"], record["fingerprint"], record["status"]
        elif path.name == "config.gin":
            made[name] = path.read_text().replace(str(model_dir), "MODEL_DIR")
        elif path.suffix in (".npy", ".trec", ".model", ".tsv", ".jsonl") and path.is_file():
            if path.name != "metrics.jsonl":
                made[name] = path.read_bytes()
    return made


@pytest.mark.slow
def test_fit_makes_the_same_bytes_as_the_command(tmp_path):
    data = beir_folder(tmp_path / "data")
    retriever = small(data).fit(tmp_path / "python")
    train.command(small(data).flags(tmp_path / "command"))
    ours, theirs = files_of(tmp_path / "python"), files_of(tmp_path / "command")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == set()
    assert any("prepare/identifiers" in name for name in ours) and "config.gin" in ours
    (hits,) = retriever.search(["which passage has word3"], k=3)
    assert hits and {hit.pid for hit in hits} <= {p["pid"] for p in PASSAGES}


def test_progress_goes_to_stderr_unless_logging_is_set_up(capfd, monkeypatch):
    logger = logging.getLogger("dgr_jax")
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    monkeypatch.setattr(logger, "propagate", False)
    before = (logger.level, list(logger.handlers))
    with builder._told(True):
        logger.info("prepare: started")
    assert capfd.readouterr().err == "prepare: started\n"
    assert (logger.level, list(logger.handlers)) == before
    with builder._told(False):
        assert logger.handlers == before[1]


def test_the_package_offers_it_without_importing_anything_heavy():
    assert {"GenerativeRetriever", "Retriever"} <= set(dir(dgr_jax))
    code = "import dgr_jax, sys; print({'jax', 'tensorflow', 'numpy', 'gin'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
    stub = (ROOT / "dgr_jax/__init__.pyi").read_text()
    for name, module in dgr_jax._OFFERED.items():
        assert f"from dgr_jax.{module} import {name} as {name}\n" in stub
    with pytest.raises(AttributeError, match="has no attribute 'Retreiver'"):
        dgr_jax.Retreiver  # noqa: B018
