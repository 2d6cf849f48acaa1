"""The experiment that writes pseudo-queries: its pairs, its guard, its file, and going on."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dgr_jax import pseudo_queries, train
from dgr_jax.config import bound, cli, configurables, gin_files
from dgr_jax.config.mistakes import Mistake
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data.examples import pseudo_queries as read_pseudo_queries
from dgr_jax.data.vocabulary import SentencePiece, Vocabulary
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.pseudo_queries import Pairs, PseudoQueries
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval.sampling import Sampling
from dgr_jax.settings import fingerprint
from dgr_jax.stages import pipeline
from dgr_jax.stages import pseudo_queries as stage
from dgr_jax.stages.pipeline import stage_settings
from dgr_jax.training.arrays import read_arrays
from dgr_jax.training.objectives import Generation
from dgr_jax.training.optimizers import Adafactor
from tests.conftest import TINY

PASSAGES = [
    Passage("p1", "The bee dances to show where flowers are.", "Bees"),
    Passage("p2", "Granite is an igneous rock of coarse grains.", "Granite"),
    Passage("p3", "Rust is iron that met water and air.", "Rust"),
]
TRAINING = [
    Query("a", "why do bees dance"),
    Query("b", "what is granite"),
    Query("c", "How does iron rust?"),
    Query("d", "what eats iron"),
]
TESTS = [Query("t", "what is GRANITE?"), Query("u", "who dances")]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A BEIR folder: one training query is a copy of a test query, one is judged as no answer."""
    folder = tmp_path_factory.mktemp("data")
    qrels = {
        "train": [Qrel("a", "p1", 1), Qrel("b", "p2", 1), Qrel("c", "p3", 1), Qrel("d", "p3", 0)],
        "test": [Qrel("t", "p2", 1), Qrel("u", "p1", 1)],
    }
    write_beir(folder, PASSAGES, TRAINING + TESTS, qrels)
    return BeirCollection(str(folder))


def experiment_on(collection, folder, **settings):
    return PseudoQueries(
        model_dir=str(folder),
        collection=collection,
        prepare=Pairs(SentencePiece(size=120), passage_length=16, query_length=8, **settings),
        model=T5Config(),
        generate=Training(Generation(), Adafactor(), steps=1),
        sample=Sampling(number=3),
    )


# pairs


def test_pairs_are_passages_with_the_queries_they_answer(collection, tmp_path):
    stage.prepare(experiment_on(collection, tmp_path), tmp_path)
    vocabulary = Vocabulary.load(tmp_path)
    pairs = read_arrays(tmp_path / "pairs")
    assert pairs["encoder_input_tokens"].shape == (2, 16)
    inputs, targets = pairs["encoder_input_tokens"], pairs["decoder_target_tokens"]
    for passage, query, read, written in zip(
        (PASSAGES[0], PASSAGES[2]), (TRAINING[0], TRAINING[2]), inputs, targets, strict=True
    ):
        assert passage.contents.lower().startswith(vocabulary.decode(read.tolist()))
        assert query.text.lower().startswith(vocabulary.decode(written.tolist()))
    assert (pairs["decoder_input_tokens"][:, 1:] == targets[:, :-1]).all()
    assert (pairs["decoder_loss_weights"] == (targets > 0)).all()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pairs"] == 2
    assert report["pairs_with_copies_of_test_queries"] == 1
    assert report["test_queries"] == 2


def test_a_passage_of_several_pairs_fills_the_input_once(tmp_path):
    long = Passage("p1", "The bee dances to show where flowers are and tells how far they are.")
    queries = [Query(f"q{i}", f"why do bees dance {i}") for i in range(4)]
    qrels = [Qrel(query.qid, "p1", 1) for query in queries]
    tests = [Qrel("t", "p2", 1)]
    train = [*qrels, qrels[0]]  # judged twice
    data = tmp_path / "data"
    write_beir(data, [long, PASSAGES[1]], queries + TESTS, {"train": train, "test": tests})
    stage.prepare(experiment_on(BeirCollection(str(data)), tmp_path), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passages"], report["pairs"], report["repeated_judgements"]) == (2, 4, 1)
    assert report["passages_that_fill_the_input"] == 1


def test_no_pair_to_learn_from(collection, tmp_path):
    with pytest.raises(ValueError) as caught:
        stage.prepare(experiment_on(collection, tmp_path, min_relevance=2), tmp_path)
    assert str(caught.value) == (
        "split 'train' has no pair to learn from: no relevance of 2 or more (Pairs.min_relevance) "
        "of a query that is in no test split; 0 are copies of test queries"
    )


@pytest.mark.parametrize("name", ["passage_length", "query_length"])
def test_lengths_that_cannot_be(name):
    with pytest.raises(ValueError, match=rf"^Pairs.{name}: got 1, expected at least 2, EOS coun"):
        Pairs(**{name: 1})


# the guard


def test_samples_that_are_kept():
    counts, copied = Counter(), set()
    texts = ["Why, bees?", "why  bees", "", " WHO dances!", "what is it", "who dances", "why bees"]
    kept = stage.kept(texts, frozenset({"who dances", "other"}), counts, copied)
    assert kept == ["Why, bees?", "what is it"]
    assert copied == {"who dances"}
    assert counts == {
        "samples": 7,
        "without_end_or_text": 1,
        "copies_of_test_queries": 2,
        "repeated": 2,
        "pseudo_queries": 2,
        "passages_without_any": 0,
    }
    assert stage.kept(["who dances"], frozenset({"who dances"}), counts, copied) == []
    assert counts["passages_without_any"] == 1


# the file


class Killed(BaseException):
    """Ends a stage in the middle, as a signal does."""


class Parrot:
    """Writes of every passage its title, a test query, and more words the later its block is."""

    def __init__(self, vocabulary, dies_at=None):
        self._vocabulary, self._dies_at = vocabulary, dies_at

    def sequences(self, blocks):
        for start, tokens in blocks:
            if start == self._dies_at:
                raise Killed
            texts = [
                [
                    self._vocabulary.decode(row.tolist()).split()[0],
                    "who dances",
                    "rock " * (start + 1),
                ]
                for row in tokens
            ]
            encode = self._vocabulary.encode_inputs
            yield np.stack([encode(samples, 16) for samples in texts])


@pytest.fixture
def run(collection, monkeypatch):
    """run(folder, dies_at) writes pseudo-queries with a Parrot; -> blocks that it was asked for."""

    def run(folder, dies_at=None):
        asked = []

        def sampler(experiment, made):
            parrot = Parrot(made.vocabulary, dies_at)
            sequences = parrot.sequences
            parrot.sequences = lambda blocks: sequences(
                (asked.append(start), (start, tokens))[1] for start, tokens in blocks
            )
            return parrot

        monkeypatch.setattr(stage, "_sampler", sampler)
        monkeypatch.setattr(stage, "_BLOCK", 2)
        skip = dataclasses.replace(stage.GENERATE, make=lambda *_: None)
        changed = lambda declared: skip if declared is stage.GENERATE else declared
        pipeline.run(experiment_on(collection, folder), ["sample"], changed=changed)
        return asked

    return run


def test_the_file_is_one_that_experiments_read(run, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="dgr_jax"):
        assert run(tmp_path) == [0, 2]
    path = tmp_path / "sample" / "pseudo_queries.tsv"
    found = list(read_pseudo_queries(str(path), PassageStore(tmp_path / "prepare" / "passages")))
    assert found == [(0, "bees"), (0, "rock"), (1, "granite"), (1, "rock"), (2, "rust"),
                     (2, "rock rock rock")]  # fmt: skip
    report = json.loads((tmp_path / "sample" / "report.json").read_text())
    assert report.pop("queries_per_second") > 0
    assert report == {
        "passages": 3,
        "samples": 9,
        "copies_of_test_queries": 3,
        "pseudo_queries": 6,
        "passages_without_any": 0,
        "test_queries": 2,
        "test_queries_copied": 1,
    }
    assert any("3 copies of test queries" in line for line in caplog.messages)
    speeds = [line for line in caplog.messages if " queries a second" in line]
    assert [line[:20] for line in speeds] == ["sample: 2/3 passages", "sample: 3/3 passages"]
    assert [line.endswith("included") for line in speeds] == [True, False]
    files = sorted(path.name for path in (tmp_path / "sample").iterdir())
    assert files == ["pseudo_queries.tsv", "report.json", "stage.json"]
    assert run(tmp_path) == []  # done already


def test_a_killed_stage_goes_on_with_the_blocks_that_lack(run, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "killed", dies_at=2)
    assert run(tmp_path / "killed") == [2]
    run(tmp_path / "whole")
    read = [(tmp_path / f / "sample/pseudo_queries.tsv").read_text() for f in ("killed", "whole")]
    assert read[0] == read[1]
    reports = [json.loads((tmp_path / f / "sample/report.json").read_text())
               for f in ("killed", "whole")]  # fmt: skip
    assert all(report.pop("queries_per_second") for report in reports)
    assert reports[0] == reports[1]


def test_stages_that_a_setting_belongs_to(collection):
    base = experiment_on(collection, "m")

    def marks(experiment):
        return {s: fingerprint(stage_settings(experiment, s)) for s in experiment.stages}

    for change, expected in (
        ({"sample": Sampling(number=4)}, {"sample"}),
        ({"model": T5Config(emb_dim=8)}, {"generate", "sample"}),
        ({"prepare": Pairs()}, {"prepare", "generate", "sample"}),
        ({"model_dir": "n"}, set()),
    ):
        before, after = marks(base), marks(dataclasses.replace(base, **change))
        assert {name for name in before if before[name] != after[name]} == expected
    read = {name for kind in base.stages.values() for name in kind.settings(base)}
    assert {field.name for field in dataclasses.fields(base)} - read == {"model_dir", "mesh"}


# gin

GIN = "--gin_file=pseudo_queries.gin"


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load(*arguments) -> the experiment, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)

    def load(*arguments, kind="PseudoQueries"):
        args, bindings = cli.parse(cli.parser("pseudo_queries", "..."), arguments)
        return gin_files.load_experiment(args, bindings, (kind,))

    return load


def test_the_shipped_experiment_is_read_and_read_again(load):
    first = load(GIN, "--model_dir=m", "--data_dir=d", "--gin.Sampling.number=40")
    assert (first.sample.number, first.collection) == (40, BeirCollection("d"))
    again = load("--model_dir=m")
    assert again == first
    load(GIN, "--model_dir=m", "--data_dir=d")
    import gin

    set_there = set(bound.settings(gin.config_str()))
    used = {
        (bound.winner(scope, component, key, set_there), component, key)
        for scope, component, key in bound.settings(gin.operative_config_str())
    }
    restated = {("", component, key) for component, key, _ in configurables.nested_defaults()}
    assert set_there - used - restated == set()


def test_queries_are_written_without_a_prefix_adaptive_decoder(load):
    with pytest.raises(ValueError, match="prefix_adaptive_layers: got 4, expected 0: queries are"):
        load(GIN, "--model_dir=m", "--data_dir=d", "--gin.T5Config.prefix_adaptive_layers=4")


def test_another_collection_and_size(load):
    found = load(GIN, "--gin_file=models/tiny.gin", "--model_dir=m",
                 "--gin.COLLECTION=@QuickstartCollection()")  # fmt: skip
    assert found.collection == QuickstartCollection()
    assert found.model.emb_dim == 128


def test_what_must_be_given_and_which_command_it_is_for(load):
    with pytest.raises(Mistake) as caught:
        load(GIN)
    assert str(caught.value) == "pseudo_queries.gin needs --data_dir=..., --model_dir=..."
    with pytest.raises(Mistake) as caught:
        train.command((GIN, "--model_dir=m", "--data_dir=d"))
    assert str(caught.value) == "pseudo_queries.gin is for python -m dgr_jax.pseudo_queries"
    with pytest.raises(Mistake) as caught:
        pseudo_queries.command(("--gin_file=quickstart.gin",))
    assert str(caught.value) == "quickstart.gin is for python -m dgr_jax.train"


# the whole


@pytest.mark.slow
def test_a_student_learns_to_ask(command, tmp_path):
    """Twelve passages of the embedded collection, learned by heart: what it writes of a passage is
    what was asked of it."""
    whole = QuickstartCollection()
    passages = list(whole.passages())[::20]
    pids = {passage.pid for passage in passages}
    judged = [q for q in whole.qrels("train") if q.pid in pids and q.relevance == 2]
    texts = {query.qid: query.text for query in whole.queries("train")}
    first = {qrel.pid: qrel for qrel in reversed(judged)}
    asked = [Query(qrel.qid, texts[qrel.qid]) for qrel in first.values()]
    other = Query("t", "Is this in no passage?")
    qrels = {"train": first.values(), "test": [Qrel("t", passages[0].pid, 1)]}
    write_beir(tmp_path / "data", passages, [*asked, other], qrels)
    sizes = [a for a in TINY if a.startswith("--gin.T5Config")]
    arguments = (
        GIN, f"--data_dir={tmp_path / 'data'}", f"--model_dir={tmp_path / 'm'}", *sizes,
        "--gin.T5Config.emb_dim=64", "--gin.STEPS=90", "--gin.BATCH_SIZE=12",
        "--gin.LEARNING_RATE=0.03", "--gin.WARMUP_STEPS=10", "--gin.SentencePiece.size=300",
        "--gin.Pairs.passage_length=24", "--gin.Pairs.query_length=24", "--gin.Sampling.number=4",
        "--gin.Sampling.top_k=2", "--gin.Mesh.data=1",
    )  # fmt: skip
    done = command("dgr_jax.pseudo_queries", *arguments)
    assert "queries a second" in done.stderr
    store = PassageStore(tmp_path / "m/prepare/passages")
    path = tmp_path / "m/sample/pseudo_queries.tsv"
    written: dict[str, set[str]] = {}
    for index, text in read_pseudo_queries(str(path), store):
        written.setdefault(store.pids[index], set()).add(stage.normalised(text))
    known = {pid: stage.normalised(texts[qrel.qid]) for pid, qrel in first.items()}
    right = sum(known[pid] in found for pid, found in written.items())
    assert right >= 10
    before = path.stat().st_mtime_ns
    again = command("dgr_jax.pseudo_queries", f"--model_dir={tmp_path / 'm'}")
    assert "sample: done already" in again.stderr
    assert path.stat().st_mtime_ns == before
    assert not Path(tmp_path / "m/previous").exists()
