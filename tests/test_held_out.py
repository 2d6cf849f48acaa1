"""Questions held out of training: which they are, and that nothing of them is learned."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Qrel, Query
from dgr_jax.data import loading
from dgr_jax.data.rules import check_apart
from dgr_jax.data.same_text import normalised
from dgr_jax.experiments.common import texts
from dgr_jax.experiments.dense import DensePrepare
from dgr_jax.settings import describe
from dgr_jax.stages import judged
from dgr_jax.stages.prepare import prepare
from dgr_jax.stages.prepared import Prepared
from dgr_jax.training.arrays import read_arrays
from tests import test_experiment
from tests.test_leaks import NAMES, PASSAGES, collection, settings

# Two questions of each passage in the same words; others that nobody answers, or that are tested.
QUERIES = [
    *(Query(f"a{i}", f"where is the {name}") for i, name in enumerate(NAMES)),
    *(Query(f"b{i}", f"Where is the {name.upper()}?") for i, name in enumerate(NAMES)),
    Query("unanswered", "where is nobody"),
    Query("tested", "who is there"),
    Query("t", "Who is there?"),
]
QRELS = {
    "train": [
        *(Qrel(f"{kind}{i}", f"p{i}", 1) for i in range(8) for kind in "ab"),
        Qrel("unanswered", "p1", 0),
        Qrel("tested", "p2", 1),
    ],
    "test": [Qrel("t", "p3", 1)],
    "dev": [Qrel("a0", "p0", 1), Qrel("unanswered", "p1", 0), Qrel("t", "p3", 1)],
}


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    return store.write(PASSAGES, tmp_path_factory.mktemp("passages"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return collection(tmp_path_factory.mktemp("data"), QUERIES, QRELS)


def _texts(queries):
    return {normalised(query.text) for query in queries.values()}


@pytest.mark.parametrize("kind", [settings, lambda **given: DensePrepare("t", **given)])
def test_a_share_is_drawn_by_its_words(data, passages, kind):
    found = judged.read(data, kind(validation=0.25), passages)
    held, learned = found.queries["validation"], found.queries["train"]
    assert len(held) == 4 and len(_texts(held)) == 2  # of eight texts that have an answer
    assert not _texts(held) & (_texts(learned) | _texts(found.queries["test"]))
    assert not held.keys() & learned.keys() and {"unanswered", "tested"} <= learned.keys()
    assert {q.qid for q in found.qrels["validation"]} == held.keys()
    assert {q.qid for q in found.qrels["train"]} == learned.keys()
    assert found.report["held_out"] == {"train": 4}
    again = judged.read(data, kind(validation=0.25), passages)
    assert again.queries["validation"] == held
    others = [
        judged.read(data, kind(validation=0.25, validation_seed=seed), passages) for seed in (1, 2)
    ]
    assert any(other.queries["validation"] != held for other in others)


def test_questions_of_several_splits_leave_all_of_them(tmp_path, passages):
    qrels = QRELS | {"llm": [Qrel(f"a{i}", f"p{7 - i}", 1) for i in range(8)]}
    data = collection(tmp_path, QUERIES, qrels)
    rule = DensePrepare("t", train_splits=("train", "llm"), validation=0.25)
    found = judged.read(data, rule, passages)
    held = found.queries["validation"]
    assert not held.keys() & (found.queries["train"].keys() | found.queries["llm"].keys())
    assert {(q.qid, q.pid) for q in found.qrels["validation"]} == {
        (qid, f"p{qid[1:]}") for qid in held
    }  # as the first split judges them
    assert found.report["held_out"] == {"train": 4, "llm": 2}


def test_a_split_that_is_named(data, passages):
    """Its test questions are not chosen on, nor those without an answer; their words leave
    training."""
    found = judged.read(data, settings(validation_split="dev"), passages)
    assert found.queries["dev"].keys() == {"a0"}
    assert found.qrels["dev"] == [Qrel("a0", "p0", 1)]
    assert not {"a0", "b0"} & found.queries["train"].keys() and len(found.queries["train"]) == 16
    assert found.report["held_out"] == {"train": 2}
    assert found.report["tested_not_chosen_on"] == {"dev": 1}
    assert list(judged.readable(found.report, settings(validation_split="dev")))[-2:] == [
        "2 train questions are held out of training, to choose on (Prepare.validation_split)",
        "1 dev questions are test questions too, and not chosen on (Prepare.validation_split)",
    ]


def test_nothing_to_choose_on(tmp_path, data, passages):
    few = collection(
        tmp_path / "few", QUERIES, {"train": [Qrel("a0", "p0", 1)], "test": QRELS["test"]}
    )
    with pytest.raises(ValueError) as error:
        judged.read(few, settings(validation=0.5), passages)
    assert str(error.value) == (
        "Prepare.validation: got 0.5 of 1 questions to learn from that are no test questions, "
        "expected two or more"
    )
    qrels = QRELS | {"dev": [Qrel("t", "p3", 1)]}
    with pytest.raises(ValueError) as error:
        judged.read(
            collection(tmp_path / "dev", QUERIES, qrels), settings(validation_split="dev"), passages
        )
    assert str(error.value) == (
        "Prepare.validation_split: got 'dev', none of whose 1 questions has a positive and is no "
        "test question, expected some"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation": 1.0}, "Prepare.validation: got 1.0, expected at least 0, below 1"),
        (
            {"validation": 0.1, "validation_split": "dev"},
            "Prepare.validation_split: got 'dev' with Prepare.validation=0.1, expected one of them",
        ),
        (
            {"validation": 0.1, "train_split": ""},
            "Prepare.validation: got 0.1 without a split to learn from, expected 0; a split to "
            "choose on can be named (Prepare.validation_split)",
        ),
        (
            {"validation": 0.1, "test_splits": ("validation",)},
            "Prepare.validation: got 0.1 with a split 'validation' that is learned from or tested "
            "on, expected 0, as the drawn questions have this name",
        ),
    ],
)
def test_settings_that_cannot_work(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        settings(**given)


@pytest.mark.parametrize(("split", "use"), [("train", "learned from"), ("test", "tested on")])
def test_a_split_to_choose_on_is_for_nothing_else(split, use):
    with pytest.raises(ValueError) as error:
        check_apart(settings(validation_split=split))
    assert str(error.value) == (
        f"Prepare.validation_split: got {split!r}, which is {use}, expected another split, or a "
        "share of the training questions (Prepare.validation)"
    )


def test_without_held_out_questions_nothing_changes(data, passages):
    plain, held = settings(), settings(validation=0.1)
    assert not [name for name in describe(plain) if name.startswith("validation")]
    assert describe(held) == describe(plain) | {"validation": 0.1}
    assert len(texts(plain)) == 3 and texts(held) != texts(plain)
    assert plain.splits == ("train", "test") == held.splits
    assert settings(validation_split="dev").splits == ("train", "test", "dev")
    assert "held_out" not in judged.read(data, plain, passages).report


def test_nothing_of_them_is_learned(tmp_path, monkeypatch, data):
    """Neither their examples, nor copies of them among the pseudo-queries."""
    path = tmp_path / "pseudo.tsv"
    path.write_text("".join(f"p{i}\twhere is the {name}!\n" for i, name in enumerate(NAMES)))
    sources = dataclasses.replace(settings().sources, pseudo_query_path=str(path))
    experiment = dataclasses.replace(
        test_experiment.BASE,
        model_dir=str(tmp_path),
        collection=data,
        prepare=settings(validation=0.25, sources=sources, query_length=9),
    )
    monkeypatch.setattr(loading, "missing", lambda: "left out, to be fast")
    (tmp_path / "prepare").mkdir()
    prepare(experiment, tmp_path / "prepare")
    made = Prepared.load(tmp_path)
    held = made.queries("validation")
    assert len(held) == 4 and made.qrels("validation").keys() == held.keys()
    tokens = {tuple(row) for row in made.vocabulary.encode_inputs(
        [query.text for query in held.values()] + [f"{text}!" for text in _texts(held)], 9
    ).tolist()}  # fmt: skip
    learned = {
        source: read_arrays(made.folder / "arrays" / source)["encoder_input_tokens"]
        for source in ("labelled", "pseudo_queries")
    }
    assert {source: len(rows) for source, rows in learned.items()} == {
        "labelled": 13, "pseudo_queries": 6,
    }  # fmt: skip
    for rows in learned.values():
        assert not tokens & {tuple(row) for row in rows.tolist()}
