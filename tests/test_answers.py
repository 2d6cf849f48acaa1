"""Answer strings in the texts of passages: DPR's rules, and their measures in an evaluation."""

import dataclasses
import re
import unicodedata

import numpy as np
import pytest

from dgr_jax import evaluation
from dgr_jax.corpora import store, trec
from dgr_jax.corpora.answers import tokenize
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.types import Passage, Qrel, Query, ScoredPassage
from dgr_jax.corpora.words import UNSPACED
from dgr_jax.experiments.common import Evaluate
from dgr_jax.retrieval.generative import Search
from dgr_jax.stages import pipeline
from dgr_jax.stages.evaluate import _compare, _measure, chosen_queries
from tests import test_experiment

TEXTS = {"a": "It is Paris.", "b": "It is Rome.", "c": "Bern"}
QUERIES = [
    Query("q1", "?", ("Paris",)),
    Query("q2", "?", ("Bern", "Berne")),
    Query("q3", "no answers known"),
    Query("q4", "not in the run", ("Rome",)),
]


def run_of(**lists):
    """run_of(q1='abc') ranks passages a, b, c."""
    return {
        qid: [ScoredPassage(pid, 10.0 - i) for i, pid in enumerate(pids)]
        for qid, pids in lists.items()
    }


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        ("It was built in 1889, in Paris.", ["paris"], True),
        ("PARIS", ["Paris"], True),
        ("Parisian cafes", ["Paris"], False),  # whole words only
        ("the  Eiffel\n\tTower stands", ["eiffel tower"], True),
        ("the Eiffel iron Tower", ["eiffel tower"], False),
        ("the tower Eiffel", ["eiffel tower"], False),
        ("It cost $1.5 million", ["1.5 million"], True),
        ("It cost 1 5 million", ["1.5 million"], False),  # punctuation is a token
        ("the U.S. Army", ["U.S."], True),
        ("caf\u00e9 au lait", ["cafe\u0301"], True),  # composed and decomposed are equal
        ("cafe au lait", ["caf\u00e9"], False),  # accents matter
        ("snake_case", ["snake"], True),  # an underscore is punctuation
        ("one two", ["", "  "], False),  # an empty answer is nowhere
        ("one two", ["three", "two"], True),
        ("soft\u200bjoin", ["soft join"], True),  # invisible characters only separate
        ("", ["a"], False),
        ("東京は日本の首都です。", ["日本"], True),  # no spaces: characters are compared
        ("東京は日本の首都です。", ["京日"], False),
        ("ราคา 20บาท", ["บาท"], True),
    ],
)
def test_has_answer(text, answers, found):
    assert evaluation.has_answer(text, answers) is found


def test_tokens_are_cut_by_unicode_category():
    unspaced = re.compile(f"[{UNSPACED}]")

    def slow_tokens(text):
        tokens, word = [], ""
        for c in text + " ":
            kind = unicodedata.category(c)[0]
            alone = kind in "LN" and unspaced.match(c)
            if word and kind in "LNM" and not alone and (kind == "M" or not unspaced.match(word)):
                word += c
                continue
            tokens += [word] if word else []
            word = c if kind in "LNM" else ""
            if kind not in "ZCLNM":
                tokens.append(c)
        return tokens

    rng = np.random.default_rng(0)
    points = np.concatenate([np.arange(0x500), rng.integers(0x500, 0x20000, 4000)])
    points = points[(points < 0xD800) | (points > 0xDFFF)]
    text = "".join(map(chr, rng.permutation(points)))
    assert tokenize(text) == slow_tokens(text)


def test_answer_hits():
    run = run_of(q1="ba", q2="abc", q3="abc")
    ranks = evaluation.answer_ranks(run, QUERIES, TEXTS.__getitem__, depth=10)
    assert ranks == {"q1": 2, "q2": 3, "q4": None}
    names = ("AnswerHits@1", "AnswerHits@2", "AnswerHits@3")
    hits = evaluation.answer_hits(run, QUERIES, TEXTS.__getitem__, names)
    assert hits == {
        "AnswerHits@1": {"q1": 0.0, "q2": 0.0, "q4": 0.0},
        "AnswerHits@2": {"q1": 1.0, "q2": 0.0, "q4": 0.0},
        "AnswerHits@3": {"q1": 1.0, "q2": 1.0, "q4": 0.0},
    }
    assert evaluation.means(hits)["AnswerHits@3"] == pytest.approx(2 / 3)


def test_a_passage_is_looked_into_no_further_than_the_largest_cutoff():
    looked = []

    def text(pid):
        looked.append(pid)
        return "nothing"

    evaluation.answer_hits(run_of(q1="abc"), QUERIES[:1], text, ("AnswerHits@2",))
    assert looked == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "cutoff"), [("AnswerHits@5", 5), ("AnswerHits@100", 100), ("Success@5", None)]
)
def test_the_cutoff_of_a_measure_of_answers(name, cutoff):
    assert evaluation.answer_cutoff(name) == cutoff


@pytest.mark.parametrize("name", ["AnswerHits", "AnswerHits@", "AnswerHits@0", "AnswerHits@-1"])
def test_a_measure_of_answers_without_a_cutoff(name):
    with pytest.raises(ValueError) as caught:
        evaluation.answer_cutoff(name)
    assert str(caught.value) == (
        f"unknown measure {name!r}: expected a cutoff of 1 or more, such as 'AnswerHits@5'; "
        "set `measures`"
    )


def test_a_measure_of_judgements_is_none_of_answers():
    with pytest.raises(ValueError, match=r"^unknown measure 'RR@10' of answers: expected 'Ans"):
        evaluation.answer_hits({}, QUERIES, TEXTS.__getitem__, ("AnswerHits@1", "RR@10"))


# In an experiment.


@pytest.fixture
def data(tmp_path):
    """A BEIR folder; the queries of split `test` have answers, those of `other` have none."""
    folder = tmp_path / "data"
    queries = [Query("t", "why", ("this",)), Query("q", "who", ("Rome",)), Query("o", "when")]
    qrels = {s: [Qrel(q, "b", 1)] for s, q in (("train", "t"), ("test", "q"), ("other", "o"))}
    write_beir(folder, [Passage(pid, text) for pid, text in TEXTS.items()], queries, qrels)
    return str(folder)


def experiment_on(data, tmp_path, **settings):
    prepare = dataclasses.replace(test_experiment.BASE.prepare, test_splits=settings.pop("splits"))
    return dataclasses.replace(
        test_experiment.BASE,
        model_dir=str(tmp_path / "model"),
        collection=BeirCollection(data),
        prepare=prepare,
        evaluate=Evaluate(Search(depth=5), **settings),
    )


def test_a_split_without_answers_is_named_before_anything_starts(data, tmp_path):
    made = []
    changed = lambda s: dataclasses.replace(s, make=lambda *_: made.append(s.name))
    measures = ("RR@10", "AnswerHits@5")
    with pytest.raises(ValueError) as caught:
        experiment = experiment_on(data, tmp_path, splits=("test", "other"), measures=measures)
        pipeline.run(experiment, changed=changed)
    assert str(caught.value) == (
        "Evaluate.measures: got 'AnswerHits@5', expected queries with answers, which no query of "
        "split 'other' has; leave the measure out"
    )
    assert not made
    experiment = experiment_on(data, tmp_path, splits=("test",), measures=measures)
    pipeline.run(experiment, changed=changed)
    assert made == list(experiment.stages)


class Made:
    """What evaluation reads of a prepared collection."""

    def __init__(self, data, folder, judged=True):
        self._collection, self._judged = BeirCollection(data), judged
        self.store = store.write(self._collection.passages(), folder)

    def queries(self, split):
        return {query.qid: query for query in self._collection.queries(split)}

    def qrels(self, split):
        judged = {q.qid: {q.pid: q.relevance} for q in self._collection.qrels(split)}
        return judged if self._judged else {}


@pytest.mark.parametrize("judged", [True, False])
def test_answers_are_measured_beside_judgements(data, tmp_path, judged):
    """A split of questions with answers alone has the measures of answers alone."""
    measures = ("AnswerHits@1", "AnswerHits@2", "RR@10")
    experiment = experiment_on(data, tmp_path, splits=("test",), measures=measures)
    made = Made(data, tmp_path / "passages", judged)
    queries = chosen_queries(experiment, made, "test")
    trec.write_run(tmp_path / "x.trec", trec.rank_lists(run_of(q="ab")), tag="x")
    values = _measure(experiment, made, queries, "test", tmp_path / "x.trec")
    means = evaluation.means(values)
    assert {k: v for k, v in means.items() if k in measures} == {
        "AnswerHits@1": 0.0,
        "AnswerHits@2": 1.0,
        **({"RR@10": 0.5} if judged else {}),
    }
    others = {name: dict.fromkeys(found, 0.0) for name, found in values.items()}
    systems = {"distill": {"test": values}, "bm25": {"test": others}}
    compared = [c for _, c in _compare(systems, "test", experiment.pairs)]
    by_name = {c.measure: c for c in compared}
    assert (by_name["AnswerHits@2"].wins, by_name["AnswerHits@2"].p_value) == (1, 1.0)
    assert ("RR@10" in by_name) == judged
