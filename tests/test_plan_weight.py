"""The weight of a plan, chosen on questions that are held out of training."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax import evaluation
from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage, Query
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.planned import Planned
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.retrieval.system import System
from dgr_jax.stages import plan_weight, systems
from dgr_jax.stages.prepared import Prepared
from tests import test_experiment
from tests.conftest import TINY

FREE = Lexical(planned=3, num_beams=2, weight=None)
HELD_OUT = dataclasses.replace(
    test_experiment.BASE,
    prepare=dataclasses.replace(test_experiment.BASE.prepare, validation=0.1),
    evaluate=dataclasses.replace(test_experiment.BASE.evaluate, search=Search(depth=3)),
    plan=FREE,
)
QUERIES = {f"q{i}": Query(f"q{i}", str(i)) for i in range(3)}


def test_without_held_out_questions_a_weight_is_needed():
    with pytest.raises(ValueError) as error:
        dataclasses.replace(test_experiment.BASE, plan=FREE)
    assert str(error.value) == (
        "Lexical.weight: got None without questions held out of training, expected a number, or "
        "Prepare.validation above 0, such as 0.1"
    )


@dataclasses.dataclass
class Weighed(System):
    """Finds the right passage first with a weight of .2 to .5, otherwise second."""

    plan: Lexical
    query_length = 1

    def passages_of_blocks(self, blocks):
        for tokens in blocks:
            first = 0 if 0.2 <= self.plan.weight <= 0.5 else -1
            found = (tokens + first + np.arange(3)) % 4
            yield found, np.broadcast_to(3.0 - np.arange(3), found.shape)


@pytest.fixture
def made(tmp_path):
    return SimpleNamespace(
        store=store.write((Passage(f"p{i}", str(i)) for i in range(4)), tmp_path / "passages"),
        vocabulary=SimpleNamespace(encode_inputs=lambda t, _: np.array([[int(x)] for x in t])),
        queries={"validation": QUERIES}.__getitem__,
        qrels={"validation": {qid: {f"p{qid[1]}": 1} for qid in QUERIES}}.__getitem__,
    )


def test_the_weight_is_the_best_of_the_held_out_questions(made, tmp_path, monkeypatch):
    opened = []

    def open_system(experiment, name, prepared, search):
        opened.append((name, search.depth))
        return Weighed(experiment.plan)

    monkeypatch.setattr(plan_weight, "open_system", open_system)
    experiment = plan_weight.chosen(HELD_OUT, tmp_path, made)
    assert experiment == dataclasses.replace(HELD_OUT, plan=dataclasses.replace(FREE, weight=0.2))
    assert opened == [("planned", 3)]
    report = json.loads((tmp_path / plan_weight.REPORT).read_text())
    assert report["values"] == {
        str(w): 1.0 if 0.2 <= w <= 0.5 else 0.5 for w in plan_weight.WEIGHTS
    }
    assert list(plan_weight.readable(tmp_path)) == [
        "planned: of 9 weights 0.2 was chosen by RR@10 1.0000 of 3 questions held out of training"
    ]
    for plan in (None, Lexical()):
        given = dataclasses.replace(HELD_OUT, plan=plan)
        assert plan_weight.chosen(given, tmp_path, made) is given
        assert not list(plan_weight.readable(tmp_path))


def test_a_finished_system_has_the_weight_that_was_chosen(made, tmp_path, monkeypatch):
    (tmp_path / "evaluate").mkdir()
    chosen = Planned("planned", dataclasses.replace(FREE, weight=0.7))
    kinds.write_untrained(tmp_path, [chosen], depth=3)
    monkeypatch.setattr(kinds, "untrained", lambda folder: json.loads(
        (folder / "evaluate" / kinds.SYSTEMS).read_text()
    ))  # fmt: skip
    monkeypatch.setattr(Planned, "open", lambda self, opening: Weighed(self.plan))
    experiment = dataclasses.replace(HELD_OUT, model_dir=str(tmp_path))
    prepared = SimpleNamespace(folder=tmp_path, store=made.store)
    assert systems.open_system(experiment, "planned", prepared).plan.weight == 0.7


@pytest.mark.slow
def test_an_evaluation_that_chooses_a_weight(command, tmp_path):
    flags = (
        *TINY, f"--model_dir={tmp_path}", "--gin.Prepare.validation=0.1", "--gin.PLAN=@Lexical()",
        "--gin.Lexical.planned=20", "--gin.Lexical.num_beams=4", "--gin.Lexical.weight=None",
    )  # fmt: skip
    done = command("dgr_jax.train", *flags)
    said = re.search(r"planned: of 9 weights (\S+) was chosen by RR@10 (\S+) of 144", done.stdout)
    retriever, made = Retriever.load(tmp_path), Prepared.load(tmp_path)
    assert retriever.decoder.plan.weight == float(said[1])
    queries = {qid: query.text for qid, query in made.queries("validation").items()}
    run = retriever.run(queries)
    value = evaluation.evaluate(run, made.qrels("validation"), ("RR@10",), min_relevance=2)
    assert value["RR@10"] == pytest.approx(float(said[2]), abs=1e-4)
    again = command("dgr_jax.train", *flags)
    assert "evaluate: done already" in again.stderr
