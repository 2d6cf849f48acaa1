"""A student that plans by itself, against its tables summed up and its identifiers scored."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from dgr_jax.models import query_tables
from dgr_jax.models.t5 import Transformer
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval import exhaustive, student_planned
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.student_planned import StudentPlannedDecoder, StudentPlanner
from dgr_jax.retrieval.student_plans import Learned, OnePass
from dgr_jax.retrieval.system import Opening
from tests import students, toy
from tests.reference import query_tables as reference

COUNT, PLANNED = 23, 8
QUERIES = students.queries(5)
SEARCH = Search(num_beams=4, depth=6, batch_size=4, query_length=8)
ROWS = {"rq": students.codes(COUNT, seed=3), "text": students.texts(COUNT, seed=3)}
PLAIN = students.CONFIG
READS = dataclasses.replace(PLAIN, decoder_query_tokens=5)
SETS = np.random.default_rng(0).integers(0, 64, (COUNT, 6)).astype(np.uint16)
SETS[7] = SETS[2]  # equal in the plan
PIDS = [f"p{i:02}" for i in np.random.default_rng(5).permutation(COUNT)]
PLANS = {
    "sets": Learned(planned=PLANNED, num_beams=PLANNED, weight=0.5, set_size=6),
    "codes": OnePass(planned=PLANNED, num_beams=PLANNED),
}


class Store:
    pids = PIDS


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """A corpus of which nothing lies on a disk."""
    monkeypatch.setattr(student_planned.Vocabulary, "load", lambda folder: None)
    opened = lambda *_, **__: SETS
    monkeypatch.setattr("dgr_jax.retrieval.set_identifiers.opened", opened)
    monkeypatch.setattr(student_planned, "_TOGETHER", 4 * 6 * 10)  # three blocks of sets


def planned_decoder(plan, kind="rq", mesh=Mesh(data=1), devices=1, **settings):
    plan = dataclasses.replace(plan, **settings)
    config = READS if isinstance(plan, Learned) else PLAIN
    student = students.decoder(ROWS[kind], SEARCH, mesh=mesh, devices=devices, config=config)
    opening = Opening(Path("nowhere"), Store(), 6, student.mesh, student.rules, None)
    return StudentPlannedDecoder.of(student, plan, StudentPlanner.of(student, plan, opening))


@functools.cache
def applied(config):
    apply = jax.jit(Transformer(config).apply, static_argnames="method")
    return functools.partial(apply, {"params": students.parameters(PLAIN)})


def plan_scores(decoder, queries=QUERIES):
    """[n, P] by the twin."""
    student, apply, members = decoder.student, applied(decoder.student.config), SETS
    encoded = apply(queries, method="encode")
    if isinstance(decoder.plan, Learned):
        table = query_tables.token_table(apply, encoded, queries)[0]
    else:
        length, vocab_size = student.index.layout.max_length, PLAIN.vocab_size
        table = query_tables.code_table(apply, encoded, queries, length, vocab_size)
        tokens = student.table.tokens[student.table.rows_of_passages()]
        members = np.where(tokens > 0, tokens + vocab_size * np.arange(tokens.shape[1]), 0)
    rows = np.asarray(table).reshape(len(queries), -1)
    return np.stack([reference.sums(row, members) for row in rows])


def expected_hits(decoder, queries=QUERIES, allowed=None):
    """[(passage, score, plan score)] of what is planned, best first."""
    student = students.decoder(rows_of(decoder), SEARCH, config=decoder.student.config)
    log_probs = np.concatenate(list(exhaustive.identifier_log_probs(student, queries)))
    rows, scores = decoder.student.table.rows_of_passages(), plan_scores(decoder, queries)
    for query in range(len(queries)):
        order = sorted(range(COUNT), key=lambda p: (-round(scores[query, p], 4), PIDS[p]))
        order = [p for p in order if allowed is None or allowed[p]][:PLANNED]
        total = [
            (
                p,
                scores[query, p] + decoder.plan.weight * log_probs[query, rows[p]],
                scores[query, p],
            )
            for p in order
        ]
        yield sorted(total, key=lambda hit: -hit[1])


def rows_of(decoder):
    return np.asarray(decoder.student.table.tokens)[decoder.student.table.rows_of_passages()]


CASES = [
    ("sets", "rq", "beams"),
    pytest.param("sets", "text", "beams", marks=pytest.mark.slow),
    ("codes", "rq", "beams"),
    pytest.param("sets", "rq", "identifiers", marks=pytest.mark.slow),
    pytest.param("codes", "text", "identifiers", marks=pytest.mark.slow),
]


BY_PLAN_OR_BEAMS = pytest.mark.parametrize(
    "ranked_by", ["plan", pytest.param("beams", marks=pytest.mark.slow)]
)


@pytest.mark.parametrize(("plan", "kind", "ranked_by"), CASES)
def test_plan_and_log_probability_are_added(plan, kind, ranked_by):
    """With as many beams as passages are planned, all of them are written."""
    decoder = planned_decoder(PLANS[plan], kind, ranked_by=ranked_by, num_beams=PLANNED)
    passages, scores = decoder.passages(QUERIES)
    hits = list(decoder.hits(QUERIES))
    for query, expected in enumerate(expected_hits(decoder)):
        expected = expected[: SEARCH.depth]
        assert passages[query].tolist() == [p for p, _, _ in expected]
        np.testing.assert_allclose(scores[query], [s for _, s, _ in expected], atol=1e-3)
        for hit, (passage, score, in_plan) in zip(hits[query], expected, strict=True):
            assert hit.passage == passage
            assert hit.parts["plan"] == pytest.approx(in_plan, abs=1e-3)
            total = hit.parts["plan"] + decoder.plan.weight * hit.parts["log_prob"]
            assert hit.score == pytest.approx(total, abs=1e-4) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("plan", PLANS)
def test_scores_of_all_passages_and_the_best_of_them(plan):
    decoder = planned_decoder(PLANS[plan], ranked_by="plan", num_beams=4)
    expected = plan_scores(decoder)
    planner = decoder.planner
    planner.vocabulary = Encodes()
    np.testing.assert_allclose(planner.scores("abcde"), expected, atol=1e-4)
    passages, scores = planner.best("abcde", 5)
    found = decoder.passages(QUERIES)
    np.testing.assert_array_equal(passages, found[0][:, :5])
    np.testing.assert_allclose(scores, found[1][:, :5], atol=1e-5)
    np.testing.assert_allclose(scores, -np.sort(-expected)[:, :5], atol=1e-4)
    assert all(hit.parts["log_prob"] == -np.inf for hits in decoder.hits(QUERIES) for hit in hits)
    assert planner.nbytes > 0
    none = planner.best("abcde", 3, np.arange(COUNT) == 4)
    assert none.passages.tolist() == [[4, -1, -1]] * 5


class Encodes:
    def encode_inputs(self, texts, length):
        return QUERIES[:, :length]


def test_equal_passages_stand_in_the_order_of_their_pids():
    decoder = planned_decoder(PLANS["sets"], ranked_by="plan", planned=COUNT, num_beams=4)
    search = dataclasses.replace(SEARCH, depth=COUNT)
    student = dataclasses.replace(decoder.student, search=search)
    decoder = dataclasses.replace(decoder, student=student)
    first, second = sorted((2, 7), key=PIDS.__getitem__)
    for row in decoder.by_pid(PIDS.__getitem__).passages(QUERIES)[0].tolist():
        assert row.index(second) == row.index(first) + 1


@pytest.mark.parametrize("plan", PLANS)
def test_only_allowed_passages_are_planned_and_nothing_is_compiled_again(plan):
    decoder = planned_decoder(PLANS[plan], num_beams=PLANNED)
    decoder.passages(QUERIES)
    compiled = decoder._search._cache_size()
    allowed = np.arange(COUNT) % 5 == 2
    few = decoder.restrict(allowed)
    passages, scores = few.passages(QUERIES)
    for query, expected in enumerate(expected_hits(few, allowed=allowed)):
        there = passages[query] >= 0
        assert passages[query][there].tolist() == [p for p, _, _ in expected]
        np.testing.assert_allclose(scores[query][there], [s for _, s, _ in expected], atol=1e-3)
    heavier = planned_decoder(PLANS[plan], num_beams=PLANNED, weight=2.0)
    assert heavier._search is few._search is decoder._search
    heavier.passages(QUERIES)
    assert decoder._search._cache_size() == compiled


@pytest.mark.slow
def test_few_beams_and_blocks():
    decoder = planned_decoder(PLANS["sets"], num_beams=3)
    passages, scores = decoder.passages(QUERIES)
    for query, expected in enumerate(expected_hits(decoder)):
        exact = {p: s for p, s, _ in expected}
        written = passages[query][:3].tolist()
        np.testing.assert_allclose(scores[query][:3], [exact[p] for p in written], atol=1e-3)
    blocks = list(decoder.passages_of_blocks([QUERIES[:2], QUERIES[2:]]))
    np.testing.assert_array_equal(np.concatenate([block[0] for block in blocks]), passages)


@BY_PLAN_OR_BEAMS
def test_one_query_alone(ranked_by):
    decoder = planned_decoder(PLANS["sets"], num_beams=4, ranked_by=ranked_by)
    alone = decoder.passages(QUERIES[:1])
    np.testing.assert_array_equal(alone[0], decoder.passages(QUERIES)[0][:1])


@BY_PLAN_OR_BEAMS
def test_the_same_passages_on_a_mesh(ranked_by):
    toy.devices(4)
    settings = dict(num_beams=4, ranked_by=ranked_by)
    alone = planned_decoder(PLANS["sets"], **settings).passages(QUERIES)
    shared = planned_decoder(PLANS["sets"], mesh=Mesh(data=2, model=2), devices=4, **settings)
    found = shared.passages(QUERIES)
    np.testing.assert_array_equal(found[0], alone[0])
    np.testing.assert_allclose(found[1], alone[1], atol=1e-4)


def test_a_student_that_reads_no_query_is_refused():
    student = students.decoder(ROWS["rq"], SEARCH)
    message = "Experiment.plan: got Learned with a student whose decoder reads no query"
    with pytest.raises(ValueError, match=message):
        PLANS["sets"].members(ROWS["rq"], student.config, None)


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        (Learned, dict(planned=5, num_beams=6), "Learned.num_beams: got 6, expected at most 5"),
        (OnePass, dict(ranked_by="x"), "OnePass.ranked_by: got 'x', expected one of"),
        (Learned, dict(set_size=0), "Learned.set_size: got 0, expected at least 1"),
        (Learned, dict(query_tokens=0), "Learned.query_tokens: got 0, expected at least 1"),
        (OnePass, dict(loss_weight=-1), "OnePass.loss_weight: got -1, expected at least 0"),
    ],
)
def test_settings_are_checked(plan, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(**settings)


def test_what_a_plan_needs_before_it_is_made():
    needed = Learned(set_size=32).sizes(1000, 50.0)
    assert (needed.disk, needed.memory, needed.planned) == (2 * 32_000, 4 * 32_000, 100)
    assert OnePass(planned=20, num_beams=4).sizes(10, 50.0)[:3] == (0, 4 * 80, 10)
    assert needed.seconds > 0
