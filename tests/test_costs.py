"""What a system costs, and how far it drifts from what is relevant."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dgr_jax.analysis import costs, drift
from dgr_jax.capacity import formulas
from dgr_jax.config import cli, gin_files
from dgr_jax.retrieval import exhaustive
from dgr_jax.retrieval.dense import DenseSearch, Encoder, Searcher
from dgr_jax.retrieval.exact_search import ExactSearch, Index
from dgr_jax.retrieval.generative import Search
from tests import students
from tests.reference import drift as twin
from tests.students import CONFIG

ROWS = np.concatenate([students.codes(12), students.codes(12)[:5]])  # five are shared


def test_chances_of_passages_are_those_of_their_identifiers():
    table = students.decoder(ROWS, Search(num_beams=2, depth=2, query_length=8)).table
    log_probs = np.random.default_rng(0).normal(-9, 3, (3, len(table))).astype(np.float32)
    owners = [table.passages_of(row).tolist() for row in range(len(table))]
    assert max(map(len, owners)) > 1
    found = exhaustive.of_passages(log_probs, table)
    expected = [twin.of_identifiers(row, owners, len(ROWS)) for row in log_probs.tolist()]
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-6)
    allowed = np.arange(len(ROWS)) % 2 == 0
    some = exhaustive.of_passages(log_probs, table, allowed)
    left = np.where(allowed, expected, 0)
    np.testing.assert_allclose(np.exp(some), left / left.sum(1, keepdims=True), rtol=1e-6)


def test_divergence():
    chances = np.random.default_rng(1).dirichlet(np.ones(9), 2)
    graded = drift.of_grades({4: 1, 2: 3, 8: 0, 1: -1})
    scored = drift.of_scores({0: 1.5, 5: -2.0, 7: -9000.0})
    assert dict(zip(*graded, strict=True)) == {4: 0.25, 2: 0.75}
    assert scored[1].sum() == pytest.approx(1) and scored[1][0] / scored[1][1] == pytest.approx(
        np.exp(3.5)
    )
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.where(np.arange(9) == 7, 0, chances))  # none that matters
    found = drift.divergence(log_probs, [graded, scored])
    expected = [
        twin.divergence(dict(zip(*r, strict=True)), p)
        for r, p in zip((graded, scored), chances, strict=True)
    ]
    np.testing.assert_allclose(found, expected)
    assert drift.of_grades({3: 2, 4: 1}, least=2)[0].tolist() == [3]
    with pytest.raises(ValueError, match="relevance: got no grade of 2 or more, expected one"):
        drift.of_grades({3: 1}, least=2)
    with pytest.raises(ValueError, match="relevance: got no scores"):
        drift.of_scores({})


def test_one_who_knows_nothing_drifts_by_the_size_of_the_corpus():
    uniform = np.full((1, 50), -np.log(50.0))
    assert drift.divergence(uniform, [drift.of_grades({3: 2})]) == pytest.approx(np.log(50))
    assert drift.divergence(uniform, [drift.of_grades({3: 1, 4: 1})]) == pytest.approx(np.log(25))


class Vectors(Encoder):
    """An encoder of queries that are vectors already."""

    def queries(self, tokens, search):
        return tokens.astype(np.float32)


def test_drift_of_vectors_is_that_of_the_softmax_of_their_scores(monkeypatch):
    random = np.random.default_rng(0)
    vectors, asked = random.normal(size=(30, 4)).astype(np.float32), random.normal(size=(7, 4))
    monkeypatch.setattr(Searcher, "__post_init__", lambda self: None)
    search = DenseSearch(batch_size=3)
    one = Searcher(Vectors(None, None, None), Index(vectors), search)
    scores = asked.astype(np.float32) @ vectors.T
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    found = np.concatenate(list(one.log_probs(asked)))
    np.testing.assert_allclose(np.exp(found), chances, rtol=1e-4)
    relevance = [drift.of_grades({i: 1, i + 9: 2}) for i in range(7)]
    expected = [
        twin.divergence({i: 1 / 3, i + 9: 2 / 3}, row) for i, row in enumerate(chances.tolist())
    ]
    np.testing.assert_allclose(drift.measure(one, asked, relevance), expected, rtol=1e-4)
    without = dataclasses.replace(one, index=Index(vectors, hidden=[3]))
    chances[:, 3] = 0
    found = np.exp(np.concatenate(list(without.log_probs(asked))))
    np.testing.assert_allclose(found, chances / chances.sum(1, keepdims=True), rtol=1e-4)
    small = Index(vectors, ExactSearch(storage="int8"))
    assert one.index_bytes == 30 * 4 * 4
    assert Searcher(Vectors(None, None, None), small, search).index_bytes == 30 * (4 + 4)


def test_flops_of_a_step_are_those_of_its_shapes():
    tokens = lambda *shape: np.ones(shape, np.int32)
    read, encoded = formulas.encoder_flops, formulas.encoder_flops(CONFIG, 6, 8)
    width, heads, mlp = 16, 28, 32
    layer = 4 * width * heads + 3 * width * mlp + 2 * heads * 8  # of a token; gated MLP
    assert encoded == 2 * 6 * 8 * layer
    pairs = {"encoder_input_tokens": tokens(6, 8), "passage_tokens": tokens(6, 3, 12)}
    assert costs.step_flops(CONFIG, pairs) == 3 * (encoded + read(CONFIG, 18, 12))
    examples = {"encoder_input_tokens": tokens(6, 8), "decoder_target_tokens": tokens(6, 5)}
    one = costs.step_flops(CONFIG, examples)
    written = 6 * 5 * (6 * width * heads + 3 * width * mlp + 2 * heads * (5 + 8) + width * 96)
    assert one == 3 * (encoded + 2 * (written + 6 * 8 * 2 * width * heads))
    lists = examples | {"identifier_tokens": tokens(6, 4, 2, 5)}
    both = costs.step_flops(CONFIG, {"rank_list": lists, "generation": examples})
    alone = costs.step_flops(CONFIG, {"rank_list": lists})
    assert alone > both - one > 0  # the best positive is learned with the list
    assert alone - (both - one) == pytest.approx(3 * 2 * written)
    views = {"encoder_input_tokens": tokens(6, 3, 8), "packed_tokens": tokens(6, 2, 16)}
    several = costs.step_flops(CONFIG, {"rank_list": lists | views, "generation": examples})
    written = (
        6 * 2 * 16 * (6 * width * heads + 3 * width * mlp + 2 * heads * (16 + 24) + width * 96)
    )
    read = formulas.encoder_flops(CONFIG, 18, 8) + 2 * 18 * 8 * 2 * width * heads
    assert several - one == pytest.approx(3 * (read + 2 * written))


def test_flops_before_there_is_any_data():
    load = lambda *flags: gin_files.load_experiment(
        *cli.parse(cli.parser("train", ""), ["--model_dir=m", *flags]), keep=False
    )
    docids = costs.expected_flops(load("--gin_file=quickstart.gin"))
    assert list(docids) == ["generate", "control", "distill"] and min(docids.values()) > 0
    longer = costs.expected_flops(load("--gin_file=quickstart.gin", "--gin.GENERATE_STEPS=1950"))
    assert longer["generate"] == pytest.approx(3 * docids["generate"])
    assert longer["distill"] == docids["distill"]
    dense = ("--gin_file=dense.gin", "--data_dir=d", "--gin.STEPS=100", "--gin.QUERY_LENGTH=16")
    dense += ("--gin.PASSAGE_LENGTH=16",)
    one = costs.expected_flops(load(*dense))["dense"]
    refreshed = load(*dense, "--gin_file=runs/refresh.gin", "--gin.REFRESH_STEPS=200")
    found = costs.expected_flops(refreshed)  # beside query and positive, one passage more
    assert found == {"dense": one, "refresh": pytest.approx(2 * one * 3 / 2)}
    taught = load(*dense, "--gin_file=runs/taught.gin", "--gin.TopM.size=7")
    assert costs.expected_flops(taught) == {"dense": pytest.approx(one * 8 / 2)}
    assert costs.expected_flops(load("--gin_file=dgr.gin", "--data_dir=d")) == {}


@pytest.mark.slow
def test_costs_of_a_finished_experiment(tiny_model_dir, tmp_path):
    flags = (f"--model_dir={tiny_model_dir}", "--gin.Mesh.data=-1")
    experiment = gin_files.load_experiment(*cli.parse(cli.parser("train", ""), flags), keep=False)
    found = costs.measure(experiment, "distill", relevance="qrels")
    assert list(found) == list(costs.COLUMNS) and min(found.values()) > 0
    assert costs.training_flops(experiment, "generate") < found["training PFLOP"] * 1e15
    assert costs.training_flops(experiment, "control") < found["training PFLOP"] * 1e15
    expected = costs.expected_flops(experiment)
    trained = [costs.training_flops(experiment, system) for system in ("generate", "distill")]
    assert expected["generate"] == pytest.approx(trained[0], rel=0.1)
    assert expected["distill"] == pytest.approx(trained[1] - trained[0], rel=0.1)
    run = tmp_path / "teacher.trec"
    run.write_text((tiny_model_dir / "evaluate" / "bm25.test.trec").read_text())
    taught = costs.measure(experiment, "distill", relevance=str(run))
    assert 0 < taught["drift"] != found["drift"]
    run.write_text("nobody Q0 p 1 1.0 x\n")
    with pytest.raises(ValueError, match="Study.drift: got the relevance of none of the queries"):
        costs.measure(experiment, "distill", relevance=str(run))
