"""A finished experiment with a plan: what evaluates it, and what answers."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.bm25 import WORDS, Bm25
from dgr_jax.retrieval.planned import Planned
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.retrieval.student_planned import PlannedByLearned, PlannedByOnePass
from dgr_jax.retrieval.student_plans import Learned, OnePass
from tests.conftest import ROOT
from tests.test_old_model_dir import KEPT

QUESTIONS = ["Why do bees dance?", "Xyzzy?"]


@pytest.fixture
def model_dir(tmp_path):
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "model"


def test_a_student_with_a_plan_answers_with_it(model_dir):
    with pytest.raises(ValueError, match="system: got 'planned', expected one of distill, "):
        Retriever.load(model_dir, system="planned")
    plan = Lexical(planned=20, num_beams=8, bm25=Bm25(k1=1.2))
    kinds.write_untrained(model_dir, [Planned("planned", plan)], depth=5)
    planned = Retriever.load(model_dir, depth=10)
    assert planned.decoder.plan == plan
    hits, nothing = planned.search(QUESTIONS, k=5)
    assert len(hits) == len(nothing) == 5
    for hit in hits + nothing:
        assert list(hit.parts) == ["plan", "log_prob"]
        total = hit.parts["plan"] + plan.weight * hit.parts["log_prob"]
        assert hit.score == pytest.approx(total, abs=1e-4)
        assert hit.identifier
    assert hits[0].parts["plan"] > 0
    assert all(hit.parts["plan"] == 0 for hit in nothing)  # no word of it is known
    run = planned.run(dict(zip("ab", QUESTIONS, strict=True)))
    assert [passage.pid for passage in run["a"]][:5] == [hit.pid for hit in hits]
    with pytest.raises(ValueError, match="k: got 30, expected at most 20: set planned"):
        Retriever.load(model_dir, depth=50).search(QUESTIONS, k=30)
    student = Retriever.load(model_dir, system="distill", depth=5, beside=[planned])
    assert student.decoder.params is planned.decoder.student.params
    assert not hasattr(student.decoder, "plan")
    (alone,) = student.search(QUESTIONS[1:], k=5)
    assert [hit.pid for hit in alone] == [hit.pid for hit in nothing]
    assert alone[0].parts == {}
    assert alone[0].score == pytest.approx(nothing[0].parts["log_prob"], abs=1e-4)


def test_settings_of_the_plan_are_those_of_the_retriever(model_dir):
    plan = Lexical(planned=20, num_beams=5)
    kinds.write_untrained(model_dir, [Planned("planned", plan)], depth=5)
    planned = Retriever.load(model_dir, planned=9, num_beams=3, weight=1.0, depth=4)
    plan, search = planned.decoder.plan, planned.decoder.search
    assert (plan.planned, plan.num_beams, plan.weight) == (9, 3, 1.0)
    assert (search.num_beams, search.depth) == (3, 4)
    with pytest.raises(ValueError, match="beam: the planned retriever of .* has no such setting"):
        Retriever.load(model_dir, beam=3)
    with pytest.raises(ValueError, match="Lexical.planned: got 9999, expected at most"):
        Retriever.load(model_dir, planned=9999)
    with pytest.raises(ValueError, match="planned: got 2.5, expected a whole number"):
        Retriever.load(model_dir, planned=2.5)
    kinds.write_untrained(model_dir, [], depth=5)
    assert not hasattr(Retriever.load(model_dir).decoder, "plan")


def test_a_run_is_ranked_by_whole_identifiers(model_dir):
    """With as many beams as passages, the student alone ranks all of them."""
    student = Retriever.load(model_dir, num_beams=240, depth=240)
    queries = dict(zip("abc", [*QUESTIONS, "Who built it?"], strict=True))
    whole = student.run(queries)
    random = np.random.default_rng(0)
    given = {
        qid: [
            ScoredPassage(passages[i].pid, -float(n)) for n, i in enumerate(random.permutation(9))
        ]
        for qid, passages in whole.items()
        if qid != "c"
    }
    ranked = student.rerank(queries, given)
    assert ranked["c"] == []
    for qid in given:
        assert [p.pid for p in ranked[qid]] == [p.pid for p in whole[qid][:9]]
        np.testing.assert_allclose(
            [p.score for p in ranked[qid]], [p.score for p in whole[qid][:9]], rtol=1e-4
        )
    summed = student.rerank(queries, given, weight=0.5)["a"]
    alone = {p.pid: p.score for p in whole["a"]}
    expected = {p.pid: p.score + 0.5 * alone[p.pid] for p in given["a"]}
    assert [p.pid for p in summed] == sorted(expected, key=expected.get, reverse=True)
    few = [p.pid for p in given["a"]][::2]
    some = student.restrict(few).rerank(queries, given)["a"]
    assert [p.pid for p in some] == [p.pid for p in ranked["a"] if p.pid in few]
    with pytest.raises(
        ValueError, match="rerank: got passage 'x' for query 'a', expected passages"
    ):
        student.rerank(queries, {"a": [ScoredPassage("x", 1.0)]})
    with pytest.raises(ValueError, match="rerank: the run has no passages for the 3 queries"):
        student.rerank(queries, {"d": given["a"]})


def test_an_evaluation_of_an_older_version_says_that_it_has_no_plan(model_dir):
    """Not the one before it, that lies aside."""
    kinds.write_untrained(model_dir, [Planned("planned", Lexical(planned=20))], depth=5)
    (model_dir / "previous").mkdir(exist_ok=True)
    shutil.copytree(model_dir / "evaluate", model_dir / "previous/evaluate")
    assert list(kinds.untrained(model_dir)) == ["planned"]
    (model_dir / "evaluate/systems.json").unlink()
    assert kinds.untrained(model_dir) == {}


def reading(model_dir):
    """The student, which has read no query, is told to: it needs no other parameters."""
    path = model_dir / "distill/student.json"
    said = json.loads(path.read_text())
    said["model"]["decoder_query_tokens"] = 8
    path.write_text(json.dumps(said))
    record = json.loads((model_dir / "distill/stage.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record["files_made"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    (model_dir / "distill/stage.json").write_text(json.dumps(record))


@pytest.mark.parametrize("kind", ["sets", pytest.param("codes", marks=pytest.mark.slow)])
def test_a_student_that_plans_by_itself_answers(model_dir, kind):
    plan = (Learned if kind == "sets" else OnePass)(planned=20, num_beams=5, weight=0.7)
    system = PlannedByLearned if kind == "sets" else PlannedByOnePass
    kinds.write_untrained(model_dir, [system("planned", plan)], depth=5)
    if kind == "sets":
        message = "Experiment.plan: got Learned with a student whose decoder reads no query"
        with pytest.raises(ValueError, match=message):
            Retriever.load(model_dir)
        reading(model_dir)
    planned = Retriever.load(model_dir, depth=10)
    assert planned.decoder.plan == plan
    for hits in planned.search(QUESTIONS, k=5):
        assert len(hits) == 5
        for hit in hits:
            total = hit.parts["plan"] + plan.weight * hit.parts["log_prob"]
            assert hit.score == pytest.approx(total, abs=1e-4)
    few = [hit.pid for hit in planned.search(QUESTIONS, k=4)[0]][1:]
    some, _ = planned.restrict(few).search(QUESTIONS, k=5)
    assert sorted(hit.pid for hit in some) == sorted(few)
    queries = dict(zip("ab", QUESTIONS, strict=True))  # always two: one batch is compiled
    run = planned.run(queries)
    ranked = planned.rerank(queries, run, weight=0.5)
    assert sorted(p.pid for p in ranked["a"]) == sorted(p.pid for p in run["a"])
    alone = Retriever.load(model_dir, ranked_by="plan", planned=9)
    assert alone.decoder.plan.planned == 9
    assert [h.parts["log_prob"] for h in alone.search(QUESTIONS, k=5)[0]] == [-np.inf] * 5
    with pytest.raises(ValueError, match="loss: the planned retriever of .* has no such setting"):
        Retriever.load(model_dir, loss=None)


def test_an_experiment_alone_knows_the_systems_of_all_plans():
    """Whatever else has been imported in this process."""
    code = (
        "import dgr_jax.experiments.generative\n"
        "from dgr_jax.retrieval.planned import PlannedSystem\n"
        "print(*sorted(plan.__name__ for plan in PlannedSystem.of_plans))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["Learned", "Lexical", "OnePass", "StudentPlan"]


@pytest.mark.slow
def test_an_experiment_with_a_plan_of_its_own(tmp_path, command):
    plan = ("--gin.PLAN=@Learned()", "--gin.Learned.planned=20", "--gin.Learned.set_size=16")
    few = ("--gin.GENERATE_STEPS=3", "--gin.DISTILL_STEPS=2", "--gin.Candidates.max_queries=20")
    folder = tmp_path / "model"
    given = f"--model_dir={folder}", "--gin_file=quickstart.gin"
    command("dgr_jax.train", *given, *plan, *few)
    metrics = json.loads((folder / "evaluate/metrics.json").read_text())
    assert metrics["planned"]["test"]["RR@10"] > metrics["distill"]["test"]["RR@10"]
    assert [path.name for path in (folder / "prepare/plans").iterdir()] == ["sets-16"]
    assert type(Retriever.load(folder).decoder.plan) is Learned
    refused = command(
        "dgr_jax.train", *given, *plan, *few, "--gin.Learned.query_tokens=99", check=False
    )
    assert "Learned.query_tokens: got 99, expected at most 32, Prepare.query" in refused.stderr


@pytest.mark.slow
def test_evaluation_with_a_plan(model_dir, command):
    plan = ("--gin.Experiment.plan=@Lexical()", "--gin.Lexical.planned=20")
    command("dgr_jax.train", f"--model_dir={model_dir}", *plan)
    metrics = json.loads((model_dir / "evaluate/metrics.json").read_text())
    assert list(metrics) == ["bm25", "generate", "control", "distill", "planned"]
    assert metrics["planned"]["test"]["RR@10"] > metrics["distill"]["test"]["RR@10"]
    (kept,) = (model_dir / "prepare/plans").iterdir()
    assert kept.name.startswith("lexical-")
    # The words are those that the MODEL_DIR was begun with.
    assert Retriever.load(model_dir).decoder.plan == Lexical(planned=20, bm25=WORDS)
    refused = command(
        "dgr_jax.train",
        f"--model_dir={model_dir}",
        plan[0],
        "--gin.Lexical.planned=999",
        check=False,
    )
    assert "Lexical.planned: got 999, expected at most" in refused.stderr
    command("dgr_jax.train", f"--model_dir={model_dir}", "--gin.Experiment.plan=None")
    assert not hasattr(Retriever.load(model_dir).decoder, "plan")
