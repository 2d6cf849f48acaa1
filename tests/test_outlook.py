"""Sizes that are told before anything starts, against those that are found afterwards."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from dgr_jax import cli, costs, outlook, planning, train
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import suffix_array
from dgr_jax.outlook import Corpus
from dgr_jax.retrieval.generative import Retriever
from dgr_jax.stages.prepare import Prepared


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_sizes_are_those_of_an_experiment(tiny_model_dir):
    """Within a factor of two: words and tokens are taken to be those of English."""
    args, bindings = cli.parse(cli.parser("train", ""), [f"--model_dir={tiny_model_dir}"])
    experiment = cli.load_experiment(args, bindings, keep=False)
    made = Prepared.load(tiny_model_dir)
    words = np.mean([len(passage.contents.split()) for passage in made.store])
    sentences = sum(1 for p in made.store for _ in experiment.prepare.sources.sentences(p))
    pairs = sum(grade >= 2 for row in made.qrels("train").values() for grade in row.values())
    corpus = Corpus(len(made.store), words, pairs, sentences / len(made.store))
    told = {line.what: line.size for line in outlook.lines(experiment, corpus)}
    prepared = tiny_model_dir / "prepare"
    (examples,) = (what for what in told if "examples" in what)
    assert 0.5 < told["passages"] / size_of(prepared / "passages") < 2
    assert 0.5 < told["identifiers"] / size_of(prepared / "identifiers") < 2
    assert 0.5 < told["the same as token arrays"] / size_of(prepared / "arrays") < 2
    student = Retriever.load(tiny_model_dir).decoder.params
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(student))
    assert told["parameters"] == pytest.approx(held, rel=0.2)
    number = int(re.match("[0-9,]+", examples)[0].replace(",", ""))
    held = [np.load(f, mmap_mode="r") for f in (prepared / "arrays").glob("*/decoder_input*.npy")]
    assert number == pytest.approx(sum(map(len, held)), rel=0.2)
    assert Vocabulary.load(prepared).size < 10_000


def test_codes_that_are_not_set_follow_from_the_passages():
    """beir.gin sets neither their number nor their size."""
    args, bindings = cli.parse(
        cli.parser("train", ""), ["--gin_file=beir.gin", "--data_dir=d", "--model_dir=m"]
    )
    experiment = cli.load_experiment(args, bindings, keep=False)
    assert [outlook._length(experiment, Corpus(n, 50, 9, 1)) for n in (1000, 10**6)] == [3, 5]
    small, large = (planning.estimated_sizes(experiment, n) for n in (1000, 10**6))
    assert (small.levels, large.levels) == ((64, 64), (256,) * 4)
    assert large.vocab_size - small.vocab_size == 4 * 256 - 2 * 64
    flops = costs.expected_flops(experiment)
    assert all(value > 0 for value in flops.values())


def test_bytes_of_a_suffix_array():
    random = np.random.default_rng(0)
    passages = random.zipf(1.3, (300, 200)).clip(3, 30_000).astype(np.int32)
    found = suffix_array.build(passages, vocab_size=32_128).nbytes - 32_129 * 4
    assert found / passages.size == pytest.approx(outlook._SPAN, rel=0.25)


@pytest.mark.parametrize("name", ["msmarco_dgr.gin", "nq_dgr.gin", "quickstart.gin"])
def test_a_plan_starts_nothing(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    train.command([f"--gin_file={name}", "--plan", "--model_dir=m", "--corpus=21e6,100,6e4,5"])
    said = capsys.readouterr().out
    assert "estimated from 21,000,000 passages of 100 words" in said and "together" in said
    assert ("a suffix array holds 2,147,483,647 tokens" in said) == (name == "msmarco_dgr.gin")
    assert not list(tmp_path.iterdir())
    for wrong in ("1,2,3", "0,1,1,1", "a,b,c,d"):
        with pytest.raises(ValueError, match="--corpus: got .* expected PASSAGES,WORDS"):
            train.command([f"--gin_file={name}", "--plan", f"--corpus={wrong}"])
