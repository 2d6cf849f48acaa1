"""Sizes that are told before anything starts, against those that are found afterwards."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dgr_jax import train
from dgr_jax.analysis import costs
from dgr_jax.capacity import disk
from dgr_jax.capacity.counting import TAKEN, counted
from dgr_jax.capacity.sizes import estimated_sizes
from dgr_jax.config import cli, gin_files
from dgr_jax.corpora.beir import write_beir
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import suffix_array
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.stages.prepared import Prepared


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_sizes_are_those_of_an_experiment(tiny_model_dir):
    """Within a factor of two: words and tokens are taken to be those of English."""
    args, bindings = cli.parse(cli.parser("train", ""), [f"--model_dir={tiny_model_dir}"])
    experiment = gin_files.load_experiment(args, bindings, keep=False)
    made = Prepared.load(tiny_model_dir)
    words = np.mean([len(passage.contents.split()) for passage in made.store])
    sentences = sum(1 for p in made.store for _ in experiment.prepare.sources.sentences(p))
    pairs = sum(grade >= 2 for row in made.qrels("train").values() for grade in row.values())
    corpus, where = counted(experiment)
    assert where == str(tiny_model_dir / "prepare")
    asked = len({qid for qid, row in made.qrels("train").items() if 2 in row.values()})
    assert corpus == CorpusSize(
        len(made.store), round(words, 1), asked, round(sentences / len(made.store), 1), pairs
    )
    told = {line.what: line.size for line in disk.lines(experiment, corpus)}
    on_device = {line.what: line.on_device for line in disk.lines(experiment, corpus)}
    prepared = tiny_model_dir / "prepare"
    assert not (prepared / "collection" / "corpus.jsonl").exists()  # it would be empty
    (examples,) = (what for what in told if "examples" in what)
    assert 0.5 < told["passages"] / size_of(prepared / "passages") < 2
    assert 0.5 < told["240 identifiers"] / size_of(prepared / "identifiers") < 2
    assert 0.5 < told["the same as token arrays"] / size_of(prepared / "arrays") < 2
    student = Retriever.load(tiny_model_dir).decoder.params
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(student))
    assert on_device["parameters"] == pytest.approx(held, rel=0.2)
    number = int(re.match("[0-9,]+", examples)[0].replace(",", ""))
    held = [np.load(f, mmap_mode="r") for f in (prepared / "arrays").glob("*/decoder_input*.npy")]
    assert number == pytest.approx(sum(map(len, held)), rel=0.2)
    assert Vocabulary.load(prepared).size < 10_000


def test_codes_that_are_not_set_follow_from_the_passages():
    """beir.gin sets neither their number nor their size."""
    args, bindings = cli.parse(
        cli.parser("train", ""), ["--gin_file=beir.gin", "--data_dir=d", "--model_dir=m"]
    )
    experiment = gin_files.load_experiment(args, bindings, keep=False)
    small, large = (estimated_sizes(experiment, CorpusSize(n, 50, 9, 1)) for n in (1000, 10**6))
    levels = [sizes.identifiers.tables[0].levels for sizes in (small, large)]
    assert levels == [(64, 64), (256,) * 4]
    assert large.vocab_size - small.vocab_size == 4 * 256 - 2 * 64
    flops = costs.expected_flops(experiment)
    assert all(value > 0 for value in flops.values())


def test_bytes_of_a_suffix_array():
    random = np.random.default_rng(0)
    passages = random.zipf(1.3, (300, 200)).clip(3, 30_000).astype(np.int32)
    found = suffix_array.build(passages, vocab_size=32_128).nbytes - 32_129 * 4
    assert found / passages.size == pytest.approx(disk._SPAN, rel=0.25)


@pytest.mark.parametrize("name", ["msmarco_dgr.gin", "nq_dgr.gin", "quickstart.gin"])
def test_a_plan_starts_nothing(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    train.command([f"--gin_file={name}", "--plan", "--model_dir=m", "--corpus=21e6,100,6e4,5"])
    said = capsys.readouterr().out
    assert "estimated from 21,000,000 passages of 100 words" in said and "together" in said
    assert "as given by --corpus" in said
    assert ("a suffix array holds 2,147,483,647 tokens" in said) == (name == "msmarco_dgr.gin")
    assert not list(tmp_path.iterdir())
    for wrong in ("1,2,3", "0,1,1,1", "a,b,c,d", "1e13,5,5,5", "inf,5,5,5", "9,1e300,5,5"):
        with pytest.raises(ValueError, match="--corpus: got .* expected PASSAGES,WORDS"):
            train.command([f"--gin_file={name}", "--plan", f"--corpus={wrong}"])


def test_a_plan_of_a_dense_retriever(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    over = [f"--gin_file=runs/{name}.gin" for name in ("refresh", "taught")]
    files = ["--gin_file=dense.gin", *over, "--data_dir=d", "--model_dir=m"]
    train.command([*files, "--plan", "--corpus=21e6,100,6e4,5"])
    said = capsys.readouterr().out
    assert "lacks corpus.jsonl" in said and "estimated from 21,000,000 passages" in said
    experiment = load(*files)
    told = {
        f"{x.stage}: {x.what}": x for x in disk.lines(experiment, CorpusSize(21_000_000, 9, 60, 5))
    }
    dim, length = experiment.model.dim, experiment.prepare.passage_length
    assert told["prepare: passages as token arrays"].size == 21e6 * length * 4
    assert told[f"refresh: vectors of {dim} float32"].size == 21e6 * dim * 4
    assert told["negatives: 50 passages of 60 queries"].size == 60 * 50 * 4
    assert told["mine: 50 passages of 60 queries"].size == 60 * 50 * 4
    stages = list(dict.fromkeys(name.partition(":")[0] for name in told))
    assert stages == list(experiment.stages)
    held = told["evaluate: vectors in float32, 2 of 6 parts at once"]
    assert 0.8 < held.on_device / experiment.evaluate.search.index.max_device_bytes < 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def collection(tmp_path):
    """Three passages of 4, 6 and 8 words with their titles, and two training queries."""
    texts = ("one two three.", "one two three four five.", "One two three four. A b c.")
    passages = [Passage(f"p{i}", text, "title") for i, text in enumerate(texts)]
    queries = [Query("a", "x"), Query("b", "y")]
    qrels = [Qrel("a", "p0", 1), Qrel("b", "p1", 1), Qrel("b", "p2", 1), Qrel("b", "p0", 0)]
    write_beir(tmp_path / "data", passages, queries, {"train": qrels, "test": qrels[:1]})
    return tmp_path / "data"


def load(*flags):
    args, bindings = cli.parse(cli.parser("train", ""), ["--model_dir=m", *flags])
    return gin_files.load_experiment(args, bindings, keep=False)


def test_what_lies_there_is_counted(collection, tmp_path, capsys):
    beir = ("--gin_file=beir.gin", f"--data_dir={collection}", "--gin.Sources.min_sentence_words=3")
    assert counted(load(*beir)) == (CorpusSize(3, 6.0, 2, 1.3, 3), "BeirCollection")
    nothing = counted(load("--gin_file=beir.gin"))
    assert nothing == (None, "the collection lacks corpus.jsonl")
    file = tmp_path / "queries.tsv"
    file.write_text("".join(f"p0\tq{i}\n" for i in range(6)))
    assert counted(load(*beir, f"--gin.Sources.pseudo_query_path={file}"))[0].pseudo_queries == 2
    lost = "--gin.Sources.pseudo_query_path=lost.tsv"
    assert counted(load(*beir, lost))[0].pseudo_queries == TAKEN.pseudo_queries
    disk.show(load(*beir, lost), CorpusSize(3, 6.0, 2, 1.0))
    assert "lacks Sources.pseudo_query_path" in capsys.readouterr().out
    part = ("--gin.COLLECTION=@Subset()", "--gin.Subset.collection=@BeirCollection()")
    assert counted(load(*beir, *part, "--gin.Subset.size=2"))[0].passages == 2
    for lost in ("qrels/train.tsv", "corpus.jsonl"):
        (collection / lost).unlink()
        corpus, why = counted(load(*beir))
        assert (corpus and corpus.queries) == (0 if "qrels" in lost else None)
    assert why == "the collection lacks corpus.jsonl"


def test_a_plan_counts_the_embedded_collection(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    train.command(["--gin_file=quickstart.gin", "--plan"])
    said = capsys.readouterr().out
    assert "estimated from 240 passages of 81.8 words, 1,440 training queries" in said
    assert "as counted in QuickstartCollection" in said and "MB │" in said and "GB" not in said
    train.command(["--gin_file=beir.gin", "--plan"])
    said = capsys.readouterr().out
    assert f"estimated from {TAKEN.passages:,} passages" in said and "lacks corpus.jsonl" in said
    assert "those of MS MARCO, as the collection lacks corpus.jsonl" in said
    assert not list(tmp_path.iterdir())


def test_plans_fetch_nothing(monkeypatch, tmp_path):
    """ir_datasets says where the documents would lie, and whether they do."""
    there = tmp_path / "docs"
    docs = [SimpleNamespace(doc_id="1", text="a b", title="")]
    asked = [SimpleNamespace(query_id="q", text="a")]
    judged = [SimpleNamespace(query_id="q", doc_id="1", relevance=1)]
    data = SimpleNamespace(
        has_docs=lambda: True, docs_iter=lambda: iter(docs),
        docs_path=lambda force: there if not force else pytest.fail("fetched"),
        has_queries=lambda: True, queries_iter=lambda: iter(asked),
        has_qrels=lambda: True, qrels_iter=lambda: iter(judged),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=lambda name: data))
    flags = ("--gin_file=beir.gin", "--gin.COLLECTION=@IrDatasetsCollection()",
             "--gin.IrDatasetsCollection.dataset=some/set")  # fmt: skip
    assert counted(load(*flags)) == (None, "the library has not fetched some/set yet")
    there.touch()
    assert counted(load(*flags))[0] == CorpusSize(1, 2.0, 1, 0.0, 1)
    del data.docs_path
    assert counted(load(*flags))[0].passages == 1
