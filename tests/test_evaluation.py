"""Measures against loops, comparisons against full enumeration."""

import io
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from dgr_jax import evaluation, measure_names
from dgr_jax.corpora.types import Query, ScoredPassage


def run_of(**lists):
    """run_of(q1='abc') ranks passages a, b, c."""
    return {
        qid: [ScoredPassage(pid, 10.0 - i) for i, pid in enumerate(pids)]
        for qid, pids in lists.items()
    }


def random_case(seed):
    """Graded qrels with queries that the run lacks, that nothing is relevant to, and with ties."""
    rng = np.random.default_rng(seed)
    qrels, run = {}, {}
    for q in range(12):
        pids = [f"p{i}" for i in rng.permutation(30)]
        qrels[f"q{q}"] = {pid: int(rng.integers(0, 3)) for pid in pids[: rng.integers(1, 6)]}
        scores = rng.normal(size=25).round(1)
        listed = rng.permutation(pids)[: rng.integers(1, 25)]
        if q % 4:
            run[f"q{q}"] = [
                ScoredPassage(str(pid), float(s)) for pid, s in zip(listed, scores, strict=False)
            ]
    run["unjudged"] = [ScoredPassage("p1", 1.0)]
    return run, qrels


def slow_measure(name, passages, grades, least):
    measure, k = name.split("@")
    pids = [p.pid for p in sorted(passages, key=lambda p: (-p.score, p.pid))][: int(k)]
    relevant = [pid for pid, grade in grades.items() if grade >= least]
    hits = [pid in relevant for pid in pids]
    if measure == "Success":
        return float(any(hits))
    if measure == "RR":
        return 1 / (hits.index(True) + 1) if any(hits) else 0.0
    if measure == "R":
        return sum(hits) / len(relevant) if relevant else 0.0
    gain = sum(grades.get(pid, 0) / math.log2(i + 2) for i, pid in enumerate(pids))
    best = sorted(grades.values(), reverse=True)[: int(k)]
    ideal = sum(grade / math.log2(i + 2) for i, grade in enumerate(best))
    return gain / ideal if ideal else 0.0


@pytest.mark.parametrize("min_relevance", [1, 2])
def test_measures_equal_their_definitions(min_relevance):
    measures = ("Success@1", "Success@5", "RR@10", "nDCG@10", "R@5")
    for seed in range(5):
        run, qrels = random_case(seed)
        values = evaluation.per_query(run, qrels, measures, min_relevance=min_relevance)
        means = evaluation.evaluate(run, qrels, measures, min_relevance=min_relevance)
        assert list(values) == list(means) == list(measures)
        for name in measures:
            expected = [
                slow_measure(name, run.get(q, []), grades, min_relevance)
                for q, grades in qrels.items()
            ]
            assert list(values[name]) == list(qrels)
            assert list(values[name].values()) == pytest.approx(expected, abs=1e-6)
            assert means[name] == pytest.approx(sum(expected) / len(qrels), abs=1e-6)


def test_default_measures_keep_their_plain_names_at_any_threshold():
    run, qrels = run_of(q="abc"), {"q": {"a": 1, "b": 2}}
    loose = evaluation.evaluate(run, qrels)
    strict = evaluation.evaluate(run, qrels, min_relevance=2)
    assert tuple(loose) == tuple(strict) == evaluation.MEASURES
    assert (loose["Success@1"], loose["RR@10"], loose["R@100"]) == (1.0, 1.0, 1.0)
    assert (strict["Success@1"], strict["RR@10"], strict["R@100"]) == (0.0, 0.5, 1.0)
    assert loose["nDCG@10"] == strict["nDCG@10"]


def test_a_measure_that_names_its_own_threshold_keeps_it():
    run, qrels = run_of(q="ab"), {"q": {"a": 1, "b": 2}}
    values = evaluation.evaluate(run, qrels, ("Success(rel=1)@1", "Success@1"), min_relevance=2)
    assert values == {"Success(rel=1)@1": 1.0, "Success@1": 0.0}


def test_missing_queries_score_zero_and_an_empty_run_is_allowed():
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {}}
    assert evaluation.evaluate(run_of(q1="a"), qrels, ["RR@10"]) == {"RR@10": pytest.approx(1 / 3)}
    empty = evaluation.per_query({"q2": []}, qrels, ["nDCG@10"])
    assert empty == {"nDCG@10": {"q1": 0.0, "q2": 0.0, "q3": 0.0}}


def test_equal_scores_rank_by_pid_in_every_measure():
    run = {"q": [ScoredPassage(pid, 1.0) for pid in "cab"]}
    first = evaluation.evaluate(run, {"q": {"a": 1}}, ("Success@1", "RR@10", "nDCG@10"))
    assert set(first.values()) == {1.0}
    last = evaluation.evaluate(run, {"q": {"c": 1}}, ("Success@1", "RR@10", "nDCG@10"))
    assert last == {"Success@1": 0.0, "RR@10": pytest.approx(1 / 3), "nDCG@10": 0.5}


def test_scores_that_float32_cannot_tell_apart_are_told_apart():
    run = {"q": [ScoredPassage("z", 1.0 + 1e-12), ScoredPassage("a", 1.0)]}
    assert evaluation.evaluate(run, {"q": {"z": 1}}, ["Success@1"])["Success@1"] == 1.0


@pytest.mark.parametrize(
    ("run", "qrels", "options", "message"),
    [
        ({}, {}, {}, "qrels hold no query: there is nothing to measure on"),
        (
            run_of(q="aba"),
            {"q": {"a": 1}},
            {},
            "the run lists passage 'a' twice for query 'q'",
        ),
        (
            {"q": [ScoredPassage("a", math.nan)]},
            {"q": {"a": 1}},
            {},
            "the score of passage 'a' for query 'q' is NaN",
        ),
        ({}, {"q": {"a": 1}}, {"min_relevance": 0}, "min_relevance must be at least 1; got 0"),
    ],
)
def test_wrong_runs_and_qrels_are_named(run, qrels, options, message):
    with pytest.raises(ValueError) as caught:
        evaluation.evaluate(run, qrels, ["Success@1"], **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("RR", {"rel": 2}),
        ("RR@10", {"cutoff": 10, "rel": 2}),
        ("Success(rel=3)@5", {"cutoff": 5, "rel": 3}),
        ("IPrec@0.5", {"recall": 0.5, "rel": 2}),
        ("nDCG(gains={1: 3}, dcg='log2')@10", {"cutoff": 10, "gains": {1: 3}, "dcg": "log2"}),
    ],
)
def test_names_are_read_as_ir_measures_reads_them(name, params):
    measure = measure_names.usable(name, 2)
    assert (measure.NAME, measure.params) == (name.partition("@")[0].partition("(")[0], params)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Succes@5", "measure not found: Succes"),
        ("Success@0", "a cutoff below 1"),
        ("R@-1", "a cutoff below 1"),
        ("Success", "it needs cutoff"),
        ("RR(depth=3)", "unsupported params found: ['depth']"),
        *(
            (name, "a measure is written as RR, RR@10 or RR(rel=2)@10")
            for name in ("RR@ten", "Success@", "RR(10)", "RR; AP", "ir.RR@1", "RR@10@20")
        ),
    ],
)
def test_unknown_measures_are_named(name, reason):
    with pytest.raises(ValueError) as caught:
        evaluation.evaluate(run_of(q="a"), {"q": {"a": 1}}, [name])
    assert str(caught.value) == (
        f"unknown measure {name!r} ({reason}): expected a name of ir_measures such as "
        "'Success@5', 'RR@10', 'nDCG@10', 'R@100', or 'AnswerHits@5'; set `measures`"
    )


def test_measures_are_checked_before_there_is_a_run():
    evaluation.check(evaluation.MEASURES + evaluation.ANSWER_MEASURES, min_relevance=2)
    for wrong in ("Succes@5", "AnswerHit@5", "AnswerHits@0", "AnswerHits"):
        with pytest.raises(ValueError, match=f"^unknown measure '{wrong}'"):
            evaluation.check(("RR@10", wrong))


# Comparisons.


def slow_p_value(differences):
    seen = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(x >= abs(sum(differences)) - 1e-12 for x in seen) / len(seen)


def test_p_value_of_few_queries_is_exact():
    rng = np.random.default_rng(0)
    for size in (1, 4, 9):
        differences = rng.normal(0.3, 1, size).round(2)
        got = evaluation.paired_randomization_test(differences)
        assert got == pytest.approx(slow_p_value(differences))


def test_p_value_of_many_queries_is_near_the_exact_one():
    differences = np.array([1.0] * 11 + [-1.0] * 5 + [0.0] * 200)  # 16 that differ: drawn
    exact = sum(math.comb(16, k) for k in range(17) if abs(16 - 2 * k) >= 6) / 2**16
    got = evaluation.paired_randomization_test(differences)
    assert got == pytest.approx(exact, abs=0.01)
    assert got == evaluation.paired_randomization_test(differences)
    assert 0 < evaluation.paired_randomization_test(np.ones(500)) < 1e-4


def test_p_value_is_one_without_any_difference():
    assert evaluation.paired_randomization_test(np.zeros(50)) == 1.0
    assert evaluation.paired_randomization_test([]) == 1.0


def compare(run_a, run_b, qrels, measure, **settings):
    return evaluation.compare_many([run_a], [run_b], qrels, measure, **settings)


def test_compare_counts_wins_from_the_first_runs_side():
    qrels = {f"q{i}": {"a": 1} for i in range(4)}
    better = run_of(q0="ab", q1="ab", q2="ba", q3="ba")
    worse = run_of(q0="ba", q1="ba", q2="ab", q3="ba")
    got = compare(better, worse, qrels, "RR@10")
    assert (got.wins, got.losses, got.ties) == (2, 1, 1)
    assert (got.mean_a, got.mean_b, got.difference) == (0.75, 0.625, 0.125)
    assert got.p_value == slow_p_value([0.5, 0.5, -0.5, 0])
    assert str(got) == (
        "RR@10 0.7500 against 0.6250: +0.1250 (p = 1.000; 2 queries better, 1 worse, 1 equal)"
    )
    mirrored = compare(worse, better, qrels, "RR@10")
    assert (mirrored.wins, mirrored.difference, mirrored.p_value) == (1, -0.125, got.p_value)
    same = compare(better, better, qrels, "RR@10")
    assert (same.difference, same.p_value, same.ties) == (0.0, 1.0, 4)


def test_compare_many_averages_each_query_over_the_seeds():
    qrels = {f"q{i}": {"a": 1} for i in range(3)}
    seeds_a = [run_of(q0="a", q1="a"), run_of(q0="a", q2="a"), run_of(q0="a")]
    seeds_b = [run_of(q1="a"), run_of(q2="a")]
    got = evaluation.compare_many(seeds_a, seeds_b, qrels, "Success@1")
    assert got.mean_a == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert got.mean_b == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)
    assert (got.wins, got.losses, got.ties) == (1, 2, 0)
    assert got.p_value == pytest.approx(slow_p_value([1, -1 / 6, -1 / 6]))
    with pytest.raises(ValueError, match=r"^both systems need a run; got 1 and 0$"):
        evaluation.compare_many(seeds_a[:1], [], qrels, "Success@1")


def test_compare_uses_the_threshold():
    qrels = {"q": {"a": 1, "b": 2}}
    assert compare(run_of(q="ab"), run_of(q="ba"), qrels, "Success@1").wins == 0
    got = compare(run_of(q="ab"), run_of(q="ba"), qrels, "Success@1", min_relevance=2)
    assert got.losses == 1


# Tables.


def shown(table):
    console = Console(width=110, record=True, file=io.StringIO(), force_terminal=True)
    console.print(table)
    return console.export_text(styles=True)


def test_measures_table_marks_the_best_of_each_column():
    results = {
        "bm25": {"RR@10": 0.5, "Success@1": 0.9004},
        "distill": {"RR@10": 0.62, "Success@1": 0.9, "R@100": 1.0},
    }
    text = shown(evaluation.measures_table(results, title="test"))
    assert "test" in text
    header = next(line for line in text.splitlines() if "system" in line)
    assert header.index("RR@10") < header.index("Success@1") < header.index("R@100")
    bm25, distill = (next(x for x in text.splitlines() if s in x) for s in ("bm25", "distill"))
    assert "\x1b[1m0.620" in distill and "\x1b[1m0.500" not in bm25
    assert "\x1b[1m0.900" in bm25 and "\x1b[1m0.900" in distill  # equal as shown
    assert " - " in bm25


def test_importing_evaluation_pays_for_no_heavy_library():
    heavy = "{'ir_measures', 'rich', 'matplotlib', 'jax', 'tensorflow', 'pytrec_eval'}"
    code = f"import sys, dgr_jax.evaluation; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ERR@10", "gdeval takes it, which asks for query ids that are whole numbers"),
        ("nDCG(dcg='exp-log2')@10", "gdeval takes it"),
        ("RBP(p=0.8)", r"it needs cwl_eval \(pip install ir-measures\[cwl_eval\]\)"),
        ("alpha_nDCG@10", r"it needs pyndeval \(pip install ir-measures\[pyndeval\]\)"),
        ("RR(judged_only=True)@10", "no library takes it in this form"),
    ],
)
def test_measures_that_no_library_takes_are_known_before(name, reason, monkeypatch):
    import ir_measures

    for provider in ir_measures.DefaultPipeline.providers:
        absent = provider.NAME in ("cwl_eval", "pyndeval", "ranx")
        monkeypatch.setattr(provider, "is_available", lambda absent=absent: not absent)
    measure_names.usable.cache_clear()
    expected = f"measure .*cannot be taken: {reason}.*; expected another one"
    with pytest.raises(ValueError, match=expected):
        evaluation.check((name,))
    with pytest.raises(ValueError, match=expected):
        evaluation.per_query({"q": []}, {"q": {"p": 1}}, (name,))


def test_a_missing_parameter_is_named():
    with pytest.raises(ValueError, match=r"unknown measure 'BPM' \(it needs cutoff\)"):
        evaluation.check(("BPM",))


def test_there_is_no_mean_of_no_queries():
    run = {"q": [ScoredPassage("p", 1.0)]}
    hits = evaluation.answer_hits(run, [Query("q", "who")], {"p": "text"}.__getitem__)
    with pytest.raises(ValueError, match="'AnswerHits@1': got no query to average over"):
        evaluation.means(hits)
    with pytest.raises(ValueError, match="'RR': got values of 0 and 0 queries, expected the same"):
        evaluation.compare("RR", [], [])
    with pytest.raises(ValueError, match="'RR': got values of 2 and 1 queries, expected the same"):
        evaluation.compare("RR", [1, 0], [1])
