"""Stage evaluate: what is searched, and what is read again."""

import dataclasses
import json
import logging
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax import plots
from dgr_jax.analysis import beam_losses
from dgr_jax.corpora import store, trec, words
from dgr_jax.corpora.types import Passage, Query
from dgr_jax.corpora.variations import Variation
from dgr_jax.experiments.common import Evaluate
from dgr_jax.retrieval import planned
from dgr_jax.retrieval.bm25 import WORDS, Bm25
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.retrieval.system import Opening, System
from dgr_jax.settings import fingerprint
from dgr_jax.stages import kept_runs
from dgr_jax.stages.evaluate import chosen_queries, first_test_split, search_of
from dgr_jax.stages.evaluate import measure as measure_systems
from tests import test_experiment

BLOCK = 8  # queries that are searched and measured together
PASSAGES = [Passage(f"p{i}", f"word{i}") for i in range(4)]
QUERIES = {f"q{i}": Query(f"q{i}", f"word{i % 4}") for i in range(BLOCK + 3)}
SYSTEMS = ["generate", "control", "distill"]


class Student(System):
    """Ranks the passage that a query was made of second; of the first passage it finds nothing."""

    query_length = 1

    def __init__(self, depth):
        self.depth = depth

    def passages_of_blocks(self, blocks):
        for tokens in blocks:
            right = tokens[:, :1] % 4
            found = np.concatenate([(right + 1) % 4, right, (right + 2) % 4], axis=1)
            scores = np.broadcast_to(np.array([3.0, 2.0, 1.0]), found.shape).copy()
            found[tokens[:, 0] == 0] = -1
            yield found[:, : self.depth], scores[:, : self.depth]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """settings -> (metrics of an evaluation, the systems that were searched); nothing is drawn."""
    for name in ("success_at_k", "training_curves"):
        monkeypatch.setattr(plots, name, lambda *_, **__: None)
    monkeypatch.setattr(kept_runs, "BLOCK", BLOCK)
    tokens = {query.text: i for i, query in enumerate(PASSAGES)}
    made = SimpleNamespace(
        store=store.write(PASSAGES, tmp_path / "passages"),
        vocabulary=SimpleNamespace(
            encode_inputs=lambda texts, _: np.array([[tokens[text]] for text in texts])
        ),
        queries=lambda split: QUERIES,
        qrels=lambda split: {qid: {f"p{tokens[q.text]}": 1} for qid, q in QUERIES.items()},
    )
    model_dir = tmp_path / "model"
    for stage in ("prepare", "evaluate", *SYSTEMS):
        (model_dir / stage).mkdir(parents=True)
        (model_dir / stage / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')

    def measure(failing="", depth=3, found=0, self_hits="drop", plan=None, **settings):
        """found: passages that the student finds, where it is asked for more than `depth`."""
        opened = []

        def open_student(system):
            if system == failing:
                raise OSError("lost")
            if system == "bm25":
                opening = Opening(tmp_path, made.store, found or depth, None, None, None)
                return experiment.untrained[system].open(opening)
            opened.append(system)
            return Student(found or depth)

        experiment = dataclasses.replace(
            test_experiment.BASE,
            model_dir=str(model_dir),
            plan=plan,
            prepare=dataclasses.replace(test_experiment.BASE.prepare, self_hits=self_hits),
            evaluate=Evaluate(Search(depth=depth), **{"bm25": False, **settings}),
        )
        measure_systems(experiment, model_dir / "evaluate", made, open_student)
        metrics = json.loads((model_dir / "evaluate/metrics.json").read_text())
        return metrics["generate"]["test"], opened

    measure.model_dir, measure.made, measure.tokens = model_dir, made, tokens
    return measure


def test_a_student_is_searched_once_for_what_is_asked(measured):
    found = sum(i % len(PASSAGES) != 0 for i in range(len(QUERIES)))
    metrics, opened = measured(measures=("RR@10",))
    assert opened == SYSTEMS
    assert metrics == {"RR@10": pytest.approx(found / 2 / len(QUERIES))}
    again, opened = measured(measures=("RR@10", "Success@5"))
    assert opened == []
    assert again == {**metrics, "Success@5": pytest.approx(found / len(QUERIES))}
    runs = measured.model_dir / "generate/runs"
    kept, shown = next(runs.glob("*.trec")), measured.model_dir / "evaluate/generate.test.trec"
    assert kept.read_text() == shown.read_text()
    assert kept.read_text().startswith("q1 Q0 p2 1 3.0 dgr_jax-generate\n")

    assert measured(depth=2)[1] == SYSTEMS
    assert measured(max_queries=5)[1] == SYSTEMS
    assert measured(max_queries=5, seed=1)[1] == SYSTEMS
    assert measured(seed=1)[1] == []  # all queries are asked: none are drawn
    assert len(list(runs.glob("*.trec"))) == 4


def test_an_evaluation_that_failed_goes_on_with_what_it_lacks(measured):
    with pytest.raises(OSError, match="lost"):
        measured(failing="distill")
    assert measured()[1] == ["distill"]


def test_a_student_that_was_trained_again_is_searched_again(measured, tmp_path):
    measured()
    (measured.model_dir / "distill").rename(tmp_path / "previous")
    shutil.copytree(tmp_path / "previous", measured.model_dir / "distill")
    shutil.rmtree(measured.model_dir / "distill/runs")
    assert measured()[1] == ["distill"]


def test_bm25_is_asked_once_whatever_the_students_search(measured):
    measured(bm25=True)
    runs = measured.model_dir / "prepare/runs"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*.trec")}
    assert len(before) == 1
    measured(bm25=True, min_relevance=2)
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*.trec")} == before
    measured(bm25=True, depth=2)
    assert len(list(runs.glob("*.trec"))) == 2


def test_a_plan_is_one_system_more_and_kept_with_its_settings(measured):
    plan = Lexical(planned=3, num_beams=2)
    assert measured(plan=plan)[1] == [*SYSTEMS, "planned"]
    assert measured(plan=plan)[1] == []
    assert measured()[1] == []
    assert measured(plan=dataclasses.replace(plan, weight=0.5))[1] == ["planned"]
    runs = measured.model_dir / "distill/runs"
    assert len(list(runs.glob("planned.test-*.trec"))) == 2
    compared = json.loads((measured.model_dir / "evaluate/comparisons.json").read_text())["test"]
    pairs = {tuple(c["systems"].split(" against ")) for c in compared}
    assert ("planned", "distill") in pairs and ("distill", "control") in pairs


def test_a_kept_run_of_a_plan_that_was_searched_in_another_way_is_not_read(measured, monkeypatch):
    plan = Lexical(planned=3, num_beams=2)
    with monkeypatch.context() as earlier:
        earlier.setattr(planned.Planned, "rules", ())
        assert measured(plan=plan)[1] == [*SYSTEMS, "planned"]
    assert measured(plan=plan)[1] == ["planned"]
    assert measured(plan=plan)[1] == []


def test_varied_questions_are_searched_beside_the_others(measured):
    """Each has one word: 'word1' becomes one that the student does not know."""
    unchanged, opened = measured(measures=("RR@10",))
    varied = Variation(typos=1.0)
    measured.tokens.update({varied.of(query).text: 0 for query in QUERIES.values()})
    found, opened = measured(measures=("RR@10",), variation=varied)
    assert opened == SYSTEMS
    assert found["RR@10"] < unchanged["RR@10"]
    assert measured(measures=("RR@10",)) == (unchanged, [])
    assert measured(measures=("RR@10",), variation=varied) == (found, [])
    assert len(list((measured.model_dir / "generate/runs").glob("*.trec"))) == 2


def test_a_kept_run_of_bm25_of_words_is_not_taken_for_one_of_stems(measured):
    def found(**settings):
        measured(bm25=True, measures=("RR@10",), **settings)
        run = trec.runs(measured.model_dir / "evaluate/bm25.test.trec")
        return {ranked.qid: [p.pid for p in ranked.passages] for ranked in run}

    asked = {"q0": Query("q0", "word1s"), "q1": QUERIES["q1"]}
    measured.made.queries = lambda split: asked
    measured.made.qrels = lambda split: {qid: {"p1": 1} for qid in asked}
    measured.tokens["word1s"] = 1
    runs = measured.model_dir / "prepare/runs"
    of_words = found(baseline=WORDS)
    assert of_words == {"q1": ["p1"]}
    (as_before,) = runs.glob("*.trec")  # named as before the baseline had settings
    assert as_before.name == f"bm25.test-{fingerprint([3, 0, 0, words.RULES])}.trec"
    assert found() == {"q0": ["p1"], "q1": ["p1"]}
    assert found(baseline=Bm25(k1=2.0)) == found()
    assert len(list(runs.glob("*.trec"))) == 3
    assert found(baseline=WORDS) == of_words


def test_queries_do_not_find_themselves(measured, caplog):
    """The first 4 queries are passages, of the same id: p1 to p3 find themselves second, p0 finds
    nothing. Each still has two passages."""
    caplog.set_level("INFO", logger="dgr_jax")
    own = {f"p{i}": Query(f"p{i}", f"word{i}") for i in range(4)}
    others = {"q1": QUERIES["q1"]}
    measured.made.queries = lambda split: own | others
    measured.made.qrels = lambda split: {
        qid: {f"p{(int(qid[1:]) + 2) % 4}": 1} for qid in own | others
    }
    metrics, opened = measured(depth=2, found=3, bm25=True, measures=("RR@10",))
    assert opened == SYSTEMS
    shown = measured.model_dir / "evaluate/generate.test.trec"
    run = {ranked.qid: [p.pid for p in ranked.passages] for ranked in trec.runs(shown)}
    assert run == {"p1": ["p2", "p3"], "p2": ["p3", "p0"], "p3": ["p0", "p1"], "q1": ["p2", "p1"]}
    assert metrics["RR@10"] == pytest.approx((3 * 0.5 + 0) / 5)
    baseline = trec.runs(measured.model_dir / "evaluate/bm25.test.trec")
    assert {ranked.qid for ranked in baseline} == {"q1"}
    said = "evaluate: generate on test: 3 queries found themselves, left out"
    assert said in caplog.messages
    kept = measured(depth=3, self_hits="keep", measures=("RR@10",))[0]
    assert kept["RR@10"] == pytest.approx((3 + 1) / 3 / 5)


def test_a_search_goes_deeper_for_the_queries_that_are_asked_alone(tmp_path):
    passages = store.write(PASSAGES, tmp_path / "passages")
    queries = {qid: Query(qid, "text") for qid in ("a", "p1", "b")}
    made = SimpleNamespace(store=passages, queries=lambda _: queries, qrels=lambda _: {})

    depths = set()
    for seed in range(9):
        evaluate = Evaluate(Search(depth=3), max_queries=1, seed=seed)
        experiment = dataclasses.replace(test_experiment.BASE, evaluate=evaluate)
        itself = "p1" in chosen_queries(experiment, made, "test")
        assert search_of(experiment, made).depth == 3 + itself
        depths.add(3 + itself)
    assert depths == {3, 4}


def test_without_test_splits_there_is_nothing_to_measure(measured, caplog):
    caplog.set_level("INFO", logger="dgr_jax")
    unlabelled = dataclasses.replace(test_experiment.BASE.prepare, train_split="", test_splits=())
    experiment = dataclasses.replace(
        test_experiment.BASE, model_dir=str(measured.model_dir), prepare=unlabelled
    )
    measure_systems(experiment, measured.model_dir / "evaluate", measured.made, None)
    assert caplog.messages == [
        "evaluate: there are no test queries (Prepare.test_splits): nothing to measure"
    ]
    written = json.loads((measured.model_dir / "evaluate/metrics.json").read_text())
    assert written == {system: {} for system in ("bm25", *SYSTEMS)}
    for measured_on in (
        first_test_split,
        lambda e: beam_losses.measured(e, measured.model_dir, "distill", (), "", 0),
    ):
        with pytest.raises(ValueError, match=r"no test split to measure on \(Prepare.test_split"):
            measured_on(experiment)


def _kept_and_shown(measured):
    (kept_run,) = (measured.model_dir / "generate/runs").glob("*.trec")
    return kept_run, measured.model_dir / "evaluate/generate.test.trec"


def _sorted_by_pid(path):
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))


def test_a_run_that_people_edit_is_not_the_one_that_is_kept(measured):
    before, _ = measured()
    kept_run, shown = _kept_and_shown(measured)
    _sorted_by_pid(shown)
    assert kept_run.read_text() != shown.read_text()
    assert measured() == (before, [])
    assert kept_run.read_text() == shown.read_text()


@pytest.mark.parametrize("damage", [_sorted_by_pid, lambda path: path.write_text("")])
def test_a_kept_run_that_was_changed_is_searched_again(measured, caplog, damage):
    before, _ = measured()
    kept_run, _ = _kept_and_shown(measured)
    whole = kept_run.read_text()
    damage(kept_run)
    assert measured() == (before, ["generate"])
    assert f"evaluate: {kept_run}: got " in caplog.text and "; searched again" in caplog.text
    assert kept_run.read_text() == whole
    assert measured() == (before, [])


def test_a_kept_run_of_an_older_version_is_read_unless_it_has_two_names(measured, caplog):
    before, _ = measured()
    kept_run, shown = _kept_and_shown(measured)
    for folder in measured.model_dir.glob("*/runs"):
        (folder / "files_made.json").unlink()
    assert measured() == (before, [])
    shown.unlink()
    os.link(kept_run, shown)
    _sorted_by_pid(shown)
    with caplog.at_level(logging.INFO, logger="dgr_jax"):
        assert measured() == (before, ["generate"])
    assert "has another name, and may be edited; searched again" in caplog.text


def test_queries_without_passages_are_counted_out_loud(measured, caplog):
    measured()
    lacking = sum(i % len(PASSAGES) == 0 for i in range(len(QUERIES)))
    assert caplog.messages == [
        f"evaluate: {system} has no passages for {lacking} of {len(QUERIES)} queries of split "
        "'test', which count as 0"
        for system in SYSTEMS
    ]


def test_a_split_without_queries_is_refused(measured, monkeypatch):
    monkeypatch.setitem(globals(), "QUERIES", {})
    with pytest.raises(ValueError, match="split 'test' has no query to measure on; expected one"):
        measured()


def test_what_is_shown_is_not_written_through_a_link(measured):
    measured(depth=2)
    kept_run, shown = _kept_and_shown(measured)
    before = kept_run.read_bytes()
    shown.unlink()
    os.link(kept_run, shown)
    measured(depth=3)
    assert shown.read_bytes() != before
    assert kept_run.read_bytes() == before
