"""What spoils training or measures: leaks, doubles, queries that find themselves, cut inputs."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax.corpora import checks, store, trec
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.types import Passage, Qrel, Query, ScoredPassage
from dgr_jax.data import examples, loading
from dgr_jax.data.rules import check_apart
from dgr_jax.data.same_text import normalised, shared
from dgr_jax.data.vocabulary import SentencePiece, Vocabulary
from dgr_jax.decoding.passage_scoring import Scoring
from dgr_jax.experiments.dense import DensePrepare
from dgr_jax.experiments.generative import Candidates, Prepare
from dgr_jax.experiments.pseudo_queries import Pairs
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.retrieval import self_hits
from dgr_jax.retrieval.dense import DenseSearch
from dgr_jax.retrieval.generative import Decoder, Search
from dgr_jax.retrieval.multiview.search import MultiviewSearch
from dgr_jax.stages import judged, labels
from dgr_jax.stages.asked import training_queries
from dgr_jax.stages.candidates import candidates
from dgr_jax.stages.generation_data import Work
from dgr_jax.stages.prepare import prepare, read
from dgr_jax.stages.prepared import Prepared
from dgr_jax.teaching.teachers import Bm25Teacher
from dgr_jax.training.lists import ListSource
from tests import test_experiment

NAMES = "otter lantern glacier violin saffron harbour comet beetle".split()
PASSAGES = [
    Passage(f"p{i}", f"The {name} rests near the river. Nobody sees the {name} there in winter.")
    for i, name in enumerate(NAMES)
]


def settings(**given):
    vocabulary = SentencePiece(size=90)
    return Prepare(tasks="quickstart", identifiers=Atomic(), vocabulary=vocabulary, **given)


def collection(folder, queries, qrels, passages=PASSAGES):
    write_beir(folder, passages, queries, qrels)
    return BeirCollection(str(folder))


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    return store.write(PASSAGES, tmp_path_factory.mktemp("passages"))


# rules


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("shared_queries", "Prepare.shared_queries: got 'x', expected keep or drop"),
        ("contradictory_judgements", "got 'x', expected error or last or highest"),
        ("unknown_judgements", "Prepare.unknown_judgements: got 'x', expected error or drop"),
        ("self_hits", "Prepare.self_hits: got 'x', expected drop or keep"),
    ],
)
def test_rules_that_there_are_not(rule, message):
    with pytest.raises(ValueError, match=message):
        settings(**{rule: "x"})
    with pytest.raises(ValueError, match=f"DensePrepare.{rule}: got 'x'"):
        DensePrepare("t", **{rule: "x"})


def test_what_is_learned_is_not_measured():
    message = re.escape("Prepare.test_splits: got 'a', which is learned from (Prepare.train_split)")
    with pytest.raises(ValueError, match=message):
        check_apart(settings(train_split="a", test_splits=("b", "a")))
    with pytest.raises(ValueError, match=r"DensePrepare.test_splits: .*DensePrepare.train_splits"):
        check_apart(DensePrepare("t", train_splits=("a", "b"), test_splits=("b",)))
    with pytest.raises(ValueError, match=r"Pairs.test_splits: got 'a', which .*Pairs.train_split"):
        check_apart(Pairs(train_split="a", test_splits=("a",)))
    check_apart(settings())
    same = dataclasses.replace(test_experiment.BASE.prepare, train_split="test")
    with pytest.raises(ValueError, match="a measure would be of judgements that were learned"):
        dataclasses.replace(test_experiment.BASE, prepare=same)


# shared queries

SHARED = [Query("a", "where is the otter"), Query("b", "Where is the VIOLIN?"),
          Query("c", "where is the comet"), Query("t", "where is the violin")]  # fmt: skip


def test_queries_of_both_splits(tmp_path, passages):
    qrels = {
        "train": [Qrel("a", "p0", 1), Qrel("b", "p3", 1), Qrel("c", "p6", 1)],
        "test": [Qrel("a", "p0", 1), Qrel("t", "p3", 1)],
    }
    data = collection(tmp_path, SHARED, qrels)
    kept = judged.read(data, settings(), passages)
    assert list(kept.queries["train"]) == ["a", "b", "c"]
    counts = {"queries": 2, "by_id": 1, "by_text": 1}
    assert kept.report == {"shared_queries": {"train": counts}}
    (line,) = judged.readable(kept.report, settings())
    assert line == (
        "2 train queries are test queries too (1 by their id, 1 by their text) and are learned "
        "from, so that measures are in part of memory (Prepare.shared_queries = 'keep')"
    )
    rule = settings(shared_queries="drop")
    dropped = judged.read(data, rule, passages)
    assert list(dropped.queries["train"]) == ["c"]
    assert dropped.qrels["train"] == [Qrel("c", "p6", 1)]
    assert dropped.queries["test"].keys() == {"a", "t"}
    assert dropped.report == kept.report
    assert "and are left out (Prepare.shared" in next(iter(judged.readable(kept.report, rule)))
    dense = judged.read(data, DensePrepare("t", shared_queries="drop"), passages)
    assert dense.qrels == dropped.qrels


def test_no_query_is_left(tmp_path, passages):
    data = collection(
        tmp_path, SHARED, {"train": [Qrel("b", "p3", 1)], "test": [Qrel("t", "p3", 1)]}
    )
    with pytest.raises(ValueError, match=r"all of its 1 queries are test queries too, and are lef"):
        judged.read(data, settings(shared_queries="drop"), passages)


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("Is İzmir large?", "is izmir LARGE", True),
        ("where co\u00adoperate", "where cooperate", True),
        ("the bee\ufe0f \u200ehive", "The bee hive", True),
        ("\u200bbee\u200bhive", "bee hive", True),  # a space of no width
        ("bee hive", "beehive", False),
    ],
)
def test_queries_are_the_same_by_what_is_seen(text, other, same):
    assert (normalised(text) == normalised(other)) == same


def test_queries_that_share_nothing_are_not_reported():
    found = shared({"a": Query("a", "bees?")}, {"b"}, {normalised("bee")})
    assert not found.qids


# judgements

TWICE = [Qrel("a", "p0", 1), Qrel("a", "p0", 1), Qrel("a", "p1", 1), Qrel("a", "p1", 0)]


def test_a_pair_that_is_judged_twice_counts_once(passages):
    labelled = {"store": passages, "query_texts": {"a": "?"}, "qrels": TWICE}
    pairs = list(examples.pairs("labelled", examples.Sources(), **labelled))
    measured = trec.qrels_in_memory(TWICE)["a"]
    assert pairs == [("?", 0, "a")]
    assert measured == {"p0": 1, "p1": 0}
    (example,) = examples.of_judged({"a": Query("a", "?")}, TWICE, passages, 1)
    assert example["positives"].tolist() == [1]


def test_contradictory_judgements(tmp_path, passages):
    qrels = {"train": TWICE, "test": [Qrel("c", "p6", 1)] * 3}
    data = collection(tmp_path, SHARED, qrels)
    with pytest.raises(ValueError) as caught:
        judged.read(data, settings(), passages)
    assert str(caught.value) == (
        "qrels of split 'train': found 1 pair of query and passage with different grades (a p1: 1 "
        "and 0); expected one grade for each, or Prepare.contradictory_judgements = 'last' or "
        "'highest', which decides"
    )
    for rule, grade in (("last", 0), ("highest", 1)):
        found = judged.read(data, settings(contradictory_judgements=rule), passages)
        assert found.qrels["train"] == [Qrel("a", "p0", 1), Qrel("a", "p1", grade)]
        assert found.qrels["test"] == [Qrel("c", "p6", 1)]
        assert found.report == {"repeated_judgements": {"train": 2, "test": 2}}
        written = tmp_path / rule
        judged.write(written, found)
        assert judged.qrels(written, "train") == found.qrels["train"]
    lines = list(judged.readable(found.report, settings(contradictory_judgements="last")))
    assert lines[0] == (
        "2 train judgements are of pairs that were judged before, and are left out; of several "
        "grades the last counts (Prepare.contradictory_judgements = 'last')"
    )


def test_queries_that_no_passage_answers_are_counted(tmp_path, passages):
    asked = [Query("a", "where is the otter"), Query("b", "where is the comet"), Query("c", "who")]
    graded = [Qrel("b", "p1", 1), Qrel("b", "p2", -1), Qrel("c", "p3", 0), Qrel("c", "p4", 2)]
    data = collection(tmp_path, asked, {"train": [Qrel("a", "p0", 2)], "test": graded})
    rule = settings(min_relevance=2)
    report = judged.read(data, rule, passages).report
    assert report == {"queries_without_positive": {"test": 1}}
    assert list(judged.readable(report, rule)) == [
        "1 test queries have no passage of a relevance of 2 or more (Prepare.min_relevance): they "
        "count as 0 for every system"
    ]


def test_the_highest_of_many_grades():
    grades = [Qrel("a", "p", grade) for grade in (1, 3, 0, 2)]
    assert checks.judged_once(grades, contradictions="highest") == ([Qrel("a", "p", 3)], 3)
    assert checks.judged_once(grades) == ([Qrel("a", "p", 2)], 3)
    with pytest.raises(ValueError, match=r"^x: found 1 pair .* \(a p: 1 and 3 and 0 and 2\); exp"):
        checks.judged_once(grades, contradictions="error", where="x")


def test_unknown_judgements_of_a_part_of_a_corpus(tmp_path, passages):
    qrels = {
        "train": [Qrel("a", "p0", 1), Qrel("a", "gone", 1), Qrel("b", "gone", 1)],
        "test": [Qrel("t", "p3", 1)],
    }
    data = collection(tmp_path, SHARED, qrels)
    with pytest.raises(ValueError, match=r"Prepare.unknown_judgements = 'drop' leaves them out"):
        judged.read(data, settings(), passages)
    found = judged.read(data, settings(unknown_judgements="drop"), passages)
    assert found.qrels["train"] == [Qrel("a", "p0", 1)]
    assert found.queries["train"].keys() == {"a"}  # b has no judgement left
    assert found.report == {
        "unknown_judgements": {"train": 2}, "queries_without_judgements": {"train": 1},
    }  # fmt: skip
    rule = settings(unknown_judgements="drop")
    assert list(judged.readable(found.report, rule)) == [
        "1 train queries have no judgement of a known passage, and are left out "
        "(Prepare.unknown_judgements = 'drop')"
    ]


def test_one_id_has_one_text_in_all_splits(passages):
    class Numbered:
        """Splits of two data sets, each with a query 1."""

        def queries(self, split):
            return [Query("1", f"a question of {split}")]

        def qrels(self, split):
            return [Qrel("1", "p0", 1)]

    message = "split 'test': the query '1' is 'a question of test', and in split 'train' it is 'a q"
    with pytest.raises(ValueError, match=message):
        judged.read(Numbered(), settings(), passages)


# copies of test queries in a file of pseudo-queries


def test_copies_of_test_queries_are_no_pseudo_queries(tmp_path, passages):
    path = tmp_path / "pseudo.tsv"
    path.write_text(
        "p0\tWhere is the OTTER?\np0\twho swims\np0\twho rests\nx\tWhere is the otter\n"
    )
    tests, counts = frozenset({normalised("where is the otter")}), Counter()
    one = examples.Sources(pseudo_query_path=str(path), max_pseudo_queries=1)
    pairs = examples.pairs("pseudo_queries", one, store=passages, test_queries=tests, counts=counts)
    assert list(pairs) == [("who swims", 0, "")]
    assert counts == {"copies_of_test_queries": 1}


class Experiment:
    """8 passages; 4 queries to learn from and 4 to be tested on; a file that holds copies."""

    plan = None

    def __init__(self, folder, **given):
        queries = [Query(f"q{i}", f"where is the {name} now") for i, name in enumerate(NAMES)]
        qrels = [Qrel(f"q{i}", f"p{i}", 1) for i in range(8)]
        self.collection = collection(folder, queries, {"train": qrels[:4], "test": qrels[4:]})
        path = folder / "pseudo.tsv"
        path.write_text("".join(f"p{i}\twhere is the {name} now\n" for i, name in enumerate(NAMES)))
        self.model_dir = str(folder)
        sources = examples.Sources(pseudo_query_path=str(path), chunk_words=6)
        self.prepare = settings(sources=sources, query_length=6, **given)
        every = ("labelled", "passages", "pseudo_queries")
        self.candidates = Candidates(Search(), sources=every)


def one_after_the_other(work: Work, parts) -> None:
    for part in list(parts)[::-1]:
        work.write_part(part)


def test_a_prepared_collection_says_what_it_left_out_and_cut(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(examples, "PASSAGES_A_PART", 3)
    monkeypatch.setattr(loading, "missing", lambda: "without TensorFlow, which takes a while")
    experiment = Experiment(tmp_path)
    folder = tmp_path / "prepare"
    folder.mkdir()
    with caplog.at_level(logging.INFO, logger="dgr_jax"):
        prepare(experiment, folder, one_after_the_other)  # counts of all parts are added
    report = json.loads((folder / "report.json").read_text())
    assert report["examples"]["pseudo_queries"] == 4
    assert report["copies_of_test_queries"] == 4
    vocabulary = Vocabulary.load(folder)
    chunks = [text for p in PASSAGES for text in experiment.prepare.sources.chunks(p)]
    lengths = np.array([len(vocabulary.encode(text)) + 1 for text in chunks])
    assert report["inputs_cut"]["passages"] == {
        "inputs": len(chunks),
        "cut": (lengths > 6).sum(),
        "tokens": lengths.sum(),
        "tokens_lost": np.maximum(0, lengths - 6).sum(),
    }
    assert (lengths > 6).any()
    assert any(
        re.fullmatch(
            r"prepare: \d+ of \d+ passages inputs are longer than 6 tokens and are cut, \d+ of "
            r"\d+ tokens are lost \(Prepare.query_length\)",
            line,
        )
        for line in caplog.messages
    )
    said = "prepare: 4 pseudo-queries are copies of test queries and are left out"
    assert any(line.startswith(said) for line in caplog.messages)

    made = Prepared.load(tmp_path)
    asked = training_queries(experiment, made)
    written = [text for qid, text in asked.texts.items() if qid.startswith("pseudo_queries")]
    assert len(written) == 4


def test_inputs_with_the_marker_of_a_view_have_a_token_less(tmp_path):
    SentencePiece(size=60).write(tmp_path, [p.contents for p in PASSAGES])
    vocabulary = Vocabulary.create(tmp_path, views=("title",))
    made = [{"inputs": "the otter rests", "view": "title", "targets": np.array([5])}] * 2
    length = len(vocabulary.encode("the otter rests")) + 1
    for query_length, lost in ((length + 1, 0), (length, 1), (length - 2, 3)):
        counts = Counter()
        examples.features(made, vocabulary, query_length, 1, counts)
        expected = {"inputs": 2, "cut": 2 * (lost > 0), "tokens": 2 * length}
        assert counts == Counter(expected | {"tokens_lost": 2 * lost})


# queries that are passages


def test_a_deeper_search_has_as_many_passages_as_were_asked_for():
    assert Search(num_beams=5, depth=5).deeper() == Search(num_beams=6, depth=6)
    assert Search(num_beams=9, depth=5).deeper() == Search(num_beams=9, depth=6)
    assert Search(num_beams=2, depth=5).deeper() == Search(num_beams=3, depth=6)
    assert DenseSearch(depth=5).deeper() == DenseSearch(depth=6)
    for most, grown in ((4, 5), (5, 6), (6, 6)):
        views = MultiviewSearch(depth=5, scoring=Scoring(max_passages=most))
        assert views.deeper() == MultiviewSearch(depth=6, scoring=Scoring(max_passages=grown))
    found = {
        "passages": np.array([[3, 1, 2], [3, 1, 2], [0, -1, -1], [3, 1, 2]]),
        "scores": np.array([[3.0, 2, 1], [3, 2, 1], [3, -np.inf, -np.inf], [3, 2, 1]]),
        "members": np.arange(12).reshape(4, 3, 1),
        "counts": np.ones((4, 7)),
    }
    made = self_hits.left_out(found, np.array([1, 9, 0, -1]))
    assert made["passages"].tolist() == [[3, 2], [3, 1], [-1, -1], [3, 1]]
    assert made["scores"][0].tolist() == [3, 1]
    assert made["members"][:, :, 0].tolist() == [[0, 2], [3, 4], [7, 8], [9, 10]]
    assert made["counts"].shape == (4, 7)
    run = {"a": [ScoredPassage(pid, 1.0) for pid in "xab"], "b": [ScoredPassage("b", 1.0)] * 1}
    assert {q: [p.pid for p in ps] for q, ps in self_hits.without(run, {"a"}, 2).items()} == {
        "a": ["x", "b"], "b": ["b"],
    }  # fmt: skip


def test_which_queries_are_passages(passages):
    asked = {"p0", "p1", "q"}
    assert judged.self_hits(settings(), asked, passages, {"p1": {"p0": 1}}) == {"p0", "p1"}
    # No collection calls a query relevant to itself: the ids are the same by chance.
    assert judged.self_hits(settings(), asked, passages, {"p1": {"p1": 1}}) == {"p0"}
    assert judged.self_hits(settings(self_hits="keep"), asked, passages, {}) == frozenset()


def test_a_teacher_leaves_the_query_itself_out(passages):
    queries, teacher = {"p0": PASSAGES[0].text}, Bm25Teacher(own=8)
    known = {"candidates": {"p0": ["p0", "p2"]}, "store": passages, "qrels": {"p0": {"p5": 1}}}
    ((_, with_itself),) = teacher.rank(queries, **known)
    ((_, listed),) = teacher.rank(queries, self_hits={"p0"}, **known)
    assert [passage.pid for passage in with_itself[:2]] == ["p5", "p0"]
    assert [passage.pid for passage in listed[:1]] == ["p5"]
    assert {p.pid for p in with_itself} - {p.pid for p in listed} == {"p0"}
    # The positive stands above the best of the others, no more above the query itself.
    assert listed[0].score < with_itself[1].score


def test_candidates_lack_the_query_itself(tmp_path, passages, monkeypatch):
    """Queries p0 to p3 find themselves first; the student is asked for a passage more."""
    searches = []

    class Student(Decoder):
        query_length = 4

        def __init__(self, search):
            self.search = search

        def passages_of_blocks(self, blocks):
            for tokens in blocks:
                found = (tokens[:, :1] + np.arange(self.search.depth)) % 8
                yield found, -np.arange(found.size, dtype=np.float32).reshape(found.shape)

    def open_system(experiment, system, made, search):
        searches.append(search)
        return Student(search)

    qrels = {f"p{i}": {f"p{i + 1}": 1} for i in range(4)}
    made = SimpleNamespace(
        store=passages,
        folder=tmp_path,
        vocabulary=SimpleNamespace(
            encode_inputs=lambda texts, _: np.array([[int(text)] for text in texts])
        ),
        queries=lambda split: {qid: Query(qid, qid[1:]) for qid in qrels},
        qrels=lambda split: qrels,
    )
    monkeypatch.setattr(Prepared, "load", lambda *_: made)
    monkeypatch.setattr(sys.modules[candidates.__module__], "open_system", open_system)
    for rule, first in (("drop", 1), ("keep", 0)):
        folder = tmp_path / rule
        folder.mkdir()
        experiment = dataclasses.replace(
            test_experiment.BASE,
            prepare=dataclasses.replace(test_experiment.BASE.prepare, self_hits=rule),
            candidates=Candidates(Search(num_beams=3, depth=3)),
        )
        candidates(experiment, folder)
        found = np.load(folder / "candidates.npz")["passages"]
        assert found.tolist() == [[i + first + n for n in range(3)] for i in range(4)]
    assert [(s.depth, s.num_beams) for s in searches] == [(4, 4), (3, 3)]


def test_a_list_ignores_the_query_itself():
    class Queries:
        def batch(self, step, process_index=0, process_count=1):
            ones = np.ones((2, 1), np.int32)
            features = {"encoder_input_tokens": ones, "positives": ones, "grades": ones}
            return features | {"own": np.array([[3], [-1]], np.int32)}

    batch = ListSource(Queries(), np.ones((4, 2), np.int32), positives=1).batch(0)
    assert batch["ignored_passages"].tolist() == [[1, 3], [1, -1]]


# no labels


def without_labels(experiment) -> tuple:
    made = labels.without_labels(experiment)
    return made.prepare.train_split, made.prepare.test_splits, made.candidates.sources


@pytest.fixture
def on_data(tmp_path):
    """on_data(splits ...): an experiment on a BEIR folder of these; None: without queries."""

    def make(*splits, **prepare):
        qrels = {split: [Qrel("a", "p0", 1)] for split in splits if split}
        data = collection(tmp_path / "data", SHARED if splits != (None,) else (), qrels)
        return dataclasses.replace(
            test_experiment.BASE,
            collection=data,
            prepare=dataclasses.replace(test_experiment.BASE.prepare, **prepare),
            model_dir=str(tmp_path / "model"),
        )

    return make


BOTH = ("passages", "pseudo_queries")


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "test"), ("train", ("test",), ("labelled",))),
        (("test",), ("", ("test",), BOTH)),
        (("test", "dev"), ("", ("test",), BOTH)),
        ((None,), ("", (), BOTH)),
        (("train",), ("train", ("test",), ("labelled",))),  # lacks test.tsv, which is said
        ((), ("train", ("test",), ("labelled",))),  # queries without any judgement
    ],
)
def test_a_collection_without_labels(splits, expected, on_data):
    assert without_labels(on_data(*splits)) == expected


def test_a_split_that_is_named_is_asked_for(on_data):
    named = on_data("test", train_split="trian")
    assert labels.without_labels(named) is named
    with pytest.raises(FileNotFoundError, match=r"lacks 1 file; expected:\n  qrels/trian.tsv"):
        labels.without_labels(named).collection.check(named.prepare.splits)


def test_a_finished_stage_decides_where_the_collection_is_gone(on_data, tmp_path):
    unlabelled = labels.without_labels(on_data("test"))
    done = {"status": "done", "settings": {"prepare": {"train_split": "", "test_splits": ["test"]}}}
    (tmp_path / "model/prepare").mkdir(parents=True)
    record = tmp_path / "model/prepare/stage.json"
    record.write_text(json.dumps(done))
    (tmp_path / "data").rename(tmp_path / "gone")
    assert labels.without_labels(on_data_gone(unlabelled)).prepare == unlabelled.prepare
    done["settings"]["prepare"]["train_split"] = "train"
    (tmp_path / "gone").rename(tmp_path / "data")
    record.write_text(json.dumps(done))  # of a folder that had train.tsv when it was read
    assert without_labels(on_data("test"))[0] == "train"


def on_data_gone(experiment):
    """The settings as they were given, on the folder that is gone."""
    prepare = dataclasses.replace(test_experiment.BASE.prepare)
    return dataclasses.replace(
        test_experiment.BASE,
        collection=experiment.collection,
        model_dir=experiment.model_dir,
        prepare=prepare,
    )


def test_without_labels_other_texts_are_needed(on_data, caplog):
    labelled = examples.Sources(passages=0.0, pseudo_queries=0.0)
    experiment = on_data("test", sources=labelled)
    assert labels.without_labels(experiment) is experiment
    assert "there is no split 'train': to learn without labels, give Sources.pass" in caplog.text
    with pytest.raises(ValueError, match=r"Prepare.train_split: got '', no labels, with Sources.p"):
        settings(train_split="", sources=labelled)
    assert settings(train_split="").sources == examples.Sources(labelled=0.0)
    assert DensePrepare("t", train_splits=(), sources=examples.Sources()).sources.rates() == {
        "passages": 0.5, "pseudo_queries": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"DensePrepare.train_splits: got \(\), expected one or"):
        DensePrepare("t", train_splits=())


def test_one_passage_is_refused_before_work_starts(tmp_path):
    data = collection(tmp_path / "data", SHARED[:1], {"train": [Qrel("a", "p0", 1)],
                      "test": [Qrel("a", "p0", 1)]}, PASSAGES[:1])  # fmt: skip
    experiment = SimpleNamespace(collection=data, prepare=settings())
    with pytest.raises(ValueError, match=r"the collection has one passage, 'p0', expected two or"):
        read(experiment, tmp_path / "prepare")
    assert not (tmp_path / "prepare/spiece.model").exists()


TINY_MODEL = [f"--gin.T5Config.{name}" for name in (
    "emb_dim=16", "num_heads=2", "head_dim=8", "mlp_dim=32", "num_encoder_layers=1",
    "num_decoder_layers=1",
)]  # fmt: skip
FEW_STEPS = ["--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=4", "--gin.SentencePiece.size=90"]
LAPTOP = ["--gin_file=laptop.gin", *TINY_MODEL, *FEW_STEPS, "--gin.GENERATE_STEPS=2",
          "--gin.DISTILL_STEPS=1", "--gin.LIST_BATCH_SIZE=4"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("with_queries", [True, False])
def test_a_collection_without_labels_is_learned_and_asked(with_queries, command, tmp_path):
    folder, data = tmp_path / "model", tmp_path / "data"
    qrels = {"test": [Qrel("a", "p0", 1), Qrel("b", "p3", 1)]} if with_queries else {}
    collection(data, SHARED if with_queries else (), qrels)
    flags = (*LAPTOP, f"--data_dir={data}", f"--model_dir={folder}")
    log = command("dgr_jax.train", *flags).stderr
    said = "prepare: there are no labels: what is learned from is passages and pseudo-queries, and"
    assert said in log
    assert ("nothing to measure" in log) != with_queries
    metrics = json.loads((folder / "evaluate/metrics.json").read_text())
    assert [*metrics] == ["bm25", "generate", "control", "distill", "planned"]
    assert [*metrics["distill"]] == ["test"] * with_queries
    lists = np.load(folder / "teach/rank_lists.npz")
    assert {qid.partition(":")[0] for qid in lists["qids"]} == {"passages", "pseudo_queries"}
    answered = command("dgr_jax.retrieve", f"--model_dir={folder}", "--query=otter", "--k=2")
    assert "1. p" in answered.stdout
    shutil.rmtree(data)  # what is prepared says that there are no labels
    again = command("dgr_jax.train", f"--model_dir={folder}").stderr
    assert again.count("done already") == 8


@pytest.mark.slow
def test_queries_that_are_passages_in_every_dense_stage(command, tmp_path):
    """Each passage is a query too, with the next one as its answer."""
    folder, data = tmp_path / "model", tmp_path / "data"
    queries = [Query(passage.pid, passage.text) for passage in PASSAGES]
    after = [Qrel(f"p{i}", f"p{(i + 1) % 8}", 1) for i in range(8)]
    collection(data, queries, {"train": after, "test": after})
    log = command(
        "dgr_jax.train", "--gin_file=dense.gin", "--gin_file=runs/refresh.gin", *TINY_MODEL,
        *FEW_STEPS, "--gin.STEPS=2", "--gin.REFRESH_STEPS=1", "--gin.NEGATIVES=bm25",
        "--gin.Negatives.depth=3", "--gin.PASSAGE_LENGTH=8", f"--data_dir={data}",
        f"--model_dir={folder}",
    ).stderr  # fmt: skip
    assert "8 test queries have the id of a passage, which they do not find, unless it" in log
    assert "8 train queries are test queries too (8 by their id, 0 by their text)" in log
    report = json.loads((folder / "prepare/report.json").read_text())
    assert report["queries_that_are_passages"] == {"train": 8, "test": 8}
    cut = report["inputs_cut"]
    assert cut["corpus"]["inputs"] == cut["corpus"]["cut"] == 8
    assert cut["labelled_train"]["inputs"] == 8
    for stage in ("negatives", "mine"):
        pools = np.load(folder / stage / "labelled_train.npy")
        assert pools.shape[1] >= 3 and not (pools == np.arange(8)[:, None]).any()
    for system in ("bm25", "dense", "refresh"):
        run = trec.run_in_memory(trec.runs(folder / f"evaluate/{system}.test.trec"))
        assert run and all(p.pid != qid for qid, found in run.items() for p in found)
    assert {len(found) for found in run.values()} == {7}
