"""Validation of a training run by a search for held-out questions, from settings to the report."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax import evaluation
from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage, Query
from dgr_jax.data.rules import TRAIN_SPLIT
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.pseudo_queries import Pairs, PseudoQueries
from dgr_jax.model_dir import records
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.sampling import Sampling
from dgr_jax.retrieval.system import System
from dgr_jax.settings import describe
from dgr_jax.stages import kept_runs
from dgr_jax.stages import validation as searches
from dgr_jax.stages.evaluate import _choices
from dgr_jax.stages.pipeline import stage_settings
from dgr_jax.stages.prepared import Prepared
from dgr_jax.training import validation
from dgr_jax.training.objectives import Generation
from dgr_jax.training.optimizers import Adafactor
from tests import test_dense_experiment, test_experiment
from tests.conftest import TINY

HELD_OUT = dataclasses.replace(test_experiment.BASE.prepare, validation=0.1)
VALIDATED = Training(Generation(), Adafactor(), steps=10, validate_every=5)


# settings


def test_by_default_nothing_is_validated_and_no_fingerprint_changes():
    plain = Training(Generation(), Adafactor(), steps=10)
    assert plain.checkpoints == 2
    assert not {"validate_every", "keep", "patience"} & describe(plain).keys()
    assert describe(VALIDATED) == describe(plain) | {"validate_every": 5}
    assert "validation_search" not in json.dumps(stage_settings(test_experiment.BASE, "evaluate"))
    best = dataclasses.replace(VALIDATED, keep="best")
    assert best.checkpoints == 3


def test_the_search_that_chooses_belongs_to_the_stage():
    """Its depth beyond what is measured does not."""
    experiment = dataclasses.replace(test_experiment.BASE, prepare=HELD_OUT, generate=VALIDATED)
    of = lambda search, stage="generate": stage_settings(
        dataclasses.replace(
            experiment, evaluate=dataclasses.replace(experiment.evaluate, search=search)
        ),
        stage,
    )
    assert of(Search(depth=50)) == of(Search(depth=20))
    assert of(Search(num_beams=50)) != of(Search(num_beams=20))
    assert of(Search(num_beams=50), "prepare") == of(Search(num_beams=20), "prepare")
    assert experiment.evaluate.validation_search.depth == 10
    assert "validation_search" in of(Search(), "control")  # trained by the settings of both


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": "first"}, "Training.keep: got 'first', expected one of 'last', 'best'"),
        (
            {"keep": "best", "validate_every": 0},
            "Training.keep: got 'best' with Training.validate_every=0, expected 1 or more steps "
            "from one search for the held-out questions to the next",
        ),
        (
            {"patience": 3, "validate_every": 0},
            "Training.patience: got 3 with Training.validate_every=0, expected 1 or more steps "
            "from one search for the held-out questions to the next",
        ),
    ],
)
def test_settings_that_cannot_work(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(VALIDATED, **given)


def test_without_held_out_questions_nothing_can_be_validated():
    for stage in ("generate", "distill"):
        changed = dataclasses.replace(getattr(test_experiment.BASE, stage), validate_every=5)
        with pytest.raises(ValueError) as error:
            dataclasses.replace(test_experiment.BASE, **{stage: changed})
        assert str(error.value) == (
            f"{stage}/Training.validate_every: got 5, expected 0 without questions held out of "
            "training: give Prepare.validation a share, such as 0.1, or Prepare.validation_split a "
            "name"
        )
    base = test_dense_experiment.BASE
    train = dataclasses.replace(base.train, validate_every=5)
    with pytest.raises(ValueError, match=r"^Training.validate_every: .*DensePrepare.validation a"):
        dataclasses.replace(base, train=train)
    dataclasses.replace(
        base, train=train, prepare=dataclasses.replace(base.prepare, validation=0.1)
    )
    with pytest.raises(ValueError, match="what writes pseudo-queries finds no passages"):
        PseudoQueries("m", base.collection, Pairs(), test_experiment.BASE.model, VALIDATED,
                      Sampling())  # fmt: skip


# the search

PASSAGES = [Passage(f"p{i}", f"word{i}") for i in range(4)]
QUERIES = {"q0": Query("q0", "0"), "q1": Query("q1", "1"), "p2": Query("p2", "2")}


class Found(System):
    """Finds all passages, from that of the query's number and the parameters on."""

    query_length = 1

    def __init__(self, params, depth):
        self.params, self.depth = params, depth

    def passages_of_blocks(self, blocks):
        for tokens in blocks:
            found = (tokens + self.params + np.arange(4)) % 4
            scores = np.broadcast_to(4.0 - np.arange(4), found.shape)
            yield found[:, : self.depth], scores[:, : self.depth]


@pytest.mark.parametrize("self_hits", ["keep", "drop"])
def test_the_measure_is_that_of_evaluation(tmp_path, monkeypatch, self_hits):
    monkeypatch.setattr(kept_runs, "BLOCK", 2)
    experiment = dataclasses.replace(
        test_experiment.BASE,
        prepare=dataclasses.replace(HELD_OUT, self_hits=self_hits, min_relevance=2),
        evaluate=dataclasses.replace(test_experiment.BASE.evaluate, search=Search(depth=3)),
    )
    made = SimpleNamespace(
        store=store.write(PASSAGES, tmp_path / "passages"),
        vocabulary=SimpleNamespace(
            encode_inputs=lambda texts, _: np.array([[int(text)] for text in texts])
        ),
        queries={"validation": QUERIES}.__getitem__,
        qrels={
            "validation": {"q0": {"p0": 2, "p1": 1}, "q1": {"p2": 2}, "p2": {"p3": 2}}
        }.__getitem__,
    )  # fmt: skip
    opened = lambda params, search: Found(params, search.depth)
    found = searches.of(experiment, VALIDATED, made, opened)
    assert (found.questions, found.every, found.keep, found.patience) == (3, 5, "last", 0)
    of_p2 = 1 if self_hits == "drop" else 1 / 2  # its own passage stands before the answer
    assert found.measure(0) == pytest.approx((1 + 1 / 2 + of_p2) / 3)
    assert found.measure(1) == pytest.approx((0 + 1 + 1) / 3)
    assert searches.of(experiment, experiment.generate, made, opened) is None


def test_an_index_is_placed_once():
    made = []

    def assembled(params, search):
        made.append(Found(params, search))
        return made[-1]

    opened = searches.reopened(assembled)
    assert [opened(params, 3).params for params in (1, 2)] == [1, 2] and len(made) == 1


def test_vectors_in_passing_are_not_kept(tmp_path):
    def embedded(params, search, folder):
        (folder / "vectors.npy").write_bytes(b"1")
        if search == "fails":
            raise ValueError("no room")
        return params

    opened = searches.in_passing(embedded, tmp_path / "dense")
    assert opened(7, "search") == 7 and not list((tmp_path / "dense").iterdir())
    with pytest.raises(ValueError, match="no room"):
        opened(7, "fails")
    assert not list((tmp_path / "dense").iterdir())


# what is said


def test_what_was_chosen_is_said_for_every_training_run(tmp_path):
    experiment = dataclasses.replace(test_experiment.BASE, model_dir=str(tmp_path))
    said = validation.Validation(lambda params: 0.0, 144, 5, "best")
    standing = validation.Standing(0.5, 5, 0.25, since=2)
    for stage, settings, last in (
        ("generate", said, 10),
        ("distill", dataclasses.replace(said, keep="last", patience=2), 15),
        ("control", dataclasses.replace(said, keep="last"), 20),
    ):
        (tmp_path / stage).mkdir()
        validation.write_report(tmp_path / stage, settings.report(standing, last, 20))
    assert list(_choices(experiment)) == [
        "generate: step 5 of 20 was chosen by RR@10 0.5000 of 144 questions held out of training, "
        "ended early at step 10",
        "distill: step 15 of 20 was chosen by RR@10 0.2500 of 144 questions held out of training, "
        "ended early at step 15",
    ]


# whole experiments

FOLD = ("--gin.Training.validate_every=2", "--gin.Training.keep=best")


def _checked(folder, system, min_relevance=2):
    """The report of a training run, whose value is that of its student as everybody opens it."""
    report = json.loads((folder / system / validation.REPORT).read_text())
    made = Prepared.load(folder)
    retriever = Retriever.load(folder, system=system)
    queries, qrels = made.queries("validation"), made.qrels("validation")
    assert not {q.text for q in queries.values()} & {
        q.text for split in (TRAIN_SPLIT, "test") for q in made.queries(split).values()
    }
    run = retriever.run({qid: query.text for qid, query in queries.items()})
    value = evaluation.evaluate(run, qrels, ("RR@10",), min_relevance=min_relevance)["RR@10"]
    assert value == pytest.approx(report["value"], abs=1e-9) and report["questions"] == 144
    rows = [json.loads(r) for r in (folder / system / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row[validation.METRIC] for row in rows if validation.METRIC in row}
    assert report["value"] == max(curve.values()) and curve[report["step"]] == report["value"]
    assert all(math.isfinite(row["learning_rate"]) for row in rows if "loss" in row)
    return report


@pytest.mark.slow
def test_an_experiment_that_keeps_its_best(command, tmp_path):
    """Generation, distillation and the control; and an early end."""
    flags = (*TINY, f"--model_dir={tmp_path}", "--gin.Prepare.validation=0.1", *FOLD)
    done = command("dgr_jax.train", *flags, "--gin.GENERATE_STEPS=40", "--gin.Training.patience=3")
    assert "prepare: 144 train questions are held out of training, to choose on" in done.stderr
    for system in ("generate", "distill", "control"):
        report = _checked(tmp_path, system)
        line = f"{system}: step {report['step']} of {report['total_steps']} was chosen by RR@10"
        assert line in done.stdout
    again = command("dgr_jax.train", *flags, "--gin.GENERATE_STEPS=40",
                    "--gin.Training.patience=3")  # fmt: skip
    assert again.stderr.count("done already") == len(test_experiment.STAGES) + 1  # start


@pytest.mark.slow
def test_a_dense_retriever_that_keeps_its_best(command, tmp_path):
    flags = (*test_dense_experiment.DENSE, f"--model_dir={tmp_path}")
    command("dgr_jax.train", *flags, "--gin.DensePrepare.validation=0.1", *FOLD)
    _checked(tmp_path, "dense")
    assert not list((tmp_path / "dense").glob("validation.tmp*"))
    assert records.read_record(tmp_path / "dense")["status"] == "done"
