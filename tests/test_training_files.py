"""Training files of other tools: their reader and writer, and scripts/training_files.py."""

from __future__ import annotations

import gzip
import json
import runpy
import sys

import numpy as np
import pytest

from dgr_jax.corpora import store, training_files, trec
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.training_files import Example, Listed, key
from dgr_jax.corpora.types import Passage, Qrel, Query, RankList, ScoredPassage
from dgr_jax.teaching.teachers import RunTeacher
from tests.conftest import ROOT

FOX = Passage("a", "red fox", "Animals")
HEN = Passage("b", "red hen")
SEA = Passage("c", "blue sea")
THIRD = 1 / 3  # a number with many digits
EXAMPLES = [
    Example(Query("1", "the red fox"),
            (Listed(FOX, True, 0.1 + 0.2), Listed(HEN, False, THIRD), Listed(SEA, False, -7.0))),
    Example(Query("2", "sea"),
            (Listed(SEA, True, 2.0), Listed(FOX, False, 2.0), Listed(HEN, False, 1e-9))),
]  # fmt: skip
TEVATRON = {
    "query_id": 7,
    "query": "the red fox",
    "positive_passages": [{"docid": "a", "title": "Animals", "text": "red fox", "score": 2.5}],
    "negative_passages": [{"docid": "b", "text": "red hen", "score": 3}],
}
TUPLE = {"anchor": "sea", "positive": "blue sea", "negative_1": "red fox", "negative_2": "red hen"}
FLAG = {"query": "sea", "pos": ["blue sea"], "neg": ["red fox", "red hen"]}


@pytest.fixture
def file(tmp_path):
    """file(*records) -> the path of a file with a line for each of them."""

    def write(*records):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def folder(tmp_path):
    """A collection in BEIR layout."""
    queries = [example.query for example in EXAMPLES] + [Query("3", "whale")]
    judged = [Qrel("1", "a", 2), Qrel("1", "b", 0), Qrel("2", "c", 1), Qrel("3", "c", 1)]
    write_beir(tmp_path / "given", [FOX, HEN, SEA], queries, {"train": judged})
    return tmp_path / "given"


@pytest.fixture
def script(monkeypatch):
    """script(*arguments): runs it."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["training_files.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / "training_files.py"), run_name="__main__")

    return run


def ids(text_of_passages):
    """key of a text -> id, of the passages above."""
    return {key(passage.contents): passage.pid for passage in text_of_passages}


# The reader and the writer


@pytest.mark.parametrize("form", training_files.FORMATS)
@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_what_is_written_is_read_with_the_same_scores(form, name, tmp_path):
    path = tmp_path / name
    assert training_files.write(path, form, EXAMPLES) == 2
    queries = {key(example.query.text): example.query.qid for example in EXAMPLES}
    again = list(training_files.read(path, ids([FOX, HEN, SEA]), queries))
    assert [example.line for example in again] == [1, 2]
    for example, expected in zip(again, EXAMPLES, strict=True):
        assert example.query == expected.query
        for listed, other in zip(example.passages, expected.passages, strict=True):
            assert (listed.positive, listed.score) == (other.positive, other.score)
            assert (listed.passage.pid, listed.passage.contents) == (
                other.passage.pid, other.passage.contents,
            )  # fmt: skip


def test_tevatron_records_are_read_as_they_are(file):
    (example,) = training_files.read(file(TEVATRON))
    assert example == Example(
        Query("7", "the red fox"), (Listed(FOX, True, 2.5), Listed(HEN, False, 3.0)), 1
    )


@pytest.mark.parametrize("scores", ["scores", "label"])
def test_tuples_have_the_positive_first(file, scores):
    (example,) = training_files.read(file({**TUPLE, scores: [2, 0.5, 1.5]}))
    assert example.query == Query(key("sea"), "sea")
    assert [(i.passage.text, i.positive, i.score) for i in example.passages] == [
        ("blue sea", True, 2.0), ("red fox", False, 0.5), ("red hen", False, 1.5),
    ]  # fmt: skip
    assert [i.passage.pid for i in example.passages] == [
        key(i.passage.text) for i in example.passages
    ]


def test_lines_of_one_query_that_follow_each_other_are_one_list(file):
    triplets = [
        {"query": "sea", "positive": "blue sea", "negative": text, "scores": [2.0, score]}
        for text, score in (("red fox", 0.5), ("red hen", 1.5))
    ]
    (example,) = training_files.read(file(*triplets))
    assert [(i.passage.text, i.score) for i in example.passages] == [
        ("blue sea", 2.0), ("red fox", 0.5), ("red hen", 1.5),
    ]  # fmt: skip


def test_scores_and_ids_of_flag_embedding(file):
    apart = {**FLAG, "pos_scores": [2.0], "neg_scores": [1, 0.5]}
    together = {**FLAG, "query": "a sea", "query_id": 9, "teacher_scores": [2.0, 1.0, 0.5]}
    together |= {"pos_index": [3], "neg_index": [1, 2]}
    first, second = training_files.read(file(apart, together))
    assert [i.score for i in first.passages] == [i.score for i in second.passages] == [2, 1, 0.5]
    assert second.query.qid == "9"
    assert [i.passage.pid for i in second.passages] == ["3", "1", "2"]


def test_files_without_scores_are_read_too(file):
    for example in training_files.read(file(TUPLE, {**FLAG, "query": "a sea"})):
        assert not example.scored and len(example.passages) == 3


def changed(record, **fields):
    return {name: value for name, value in {**record, **fields}.items() if value != "gone"}


def passage(**fields):
    return changed({"docid": "b", "text": "red hen", "score": 1.0}, **fields)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(TEVATRON, query="gone"), "found the fields .*; expected a field 'query'"),
        ({"query": "sea"}, r"found the fields 'query'; expected a query and positive_passages \(T"),
        (changed(TEVATRON, positive_passages=[passage(docid="gone")]), "expected a field 'docid'"),
        (changed(TEVATRON, positive_passages=["a"]), r"a list of objects {docid, title, text}"),
        (changed(TEVATRON, positive_passages=[], negative_passages=[]), "found no passages"),
        (
            changed(TEVATRON, negative_passages=[passage(score=float("nan"))]),
            "found the score nan of the passage 'b'; expected a finite number",
        ),
        (changed(TEVATRON, negative_passages=[passage(score="1")]), "the score '1' of the pass"),
        (changed(TEVATRON, negative_passages=[passage(score=10**400)]), "expected a finite number"),
        (
            changed(TEVATRON, negative_passages=[passage(score="gone")]),
            "scores for some passages of the query, and none for others; expected a score for each",
        ),
        (
            changed(TEVATRON, negative_passages=[passage(), passage(score=2.0)]),
            r"the passage 'b' of the query with the scores 1\.0 and 2\.0; expected each pas",
        ),
        (
            changed(TEVATRON, negative_passages=[passage(docid="a", score=2.5)]),
            "the passage 'a' of the query as positive and as negative",
        ),
        (changed(TUPLE, scores=[1.0, 2.0]), "'scores': 2 values; expected a list of 3, one a pass"),
        (changed(TUPLE, label=0.5), "'label': 0.5; expected a list of 3"),
        (changed(TUPLE, scores=[1.0, float("inf"), 0.0]), "the score inf in 'scores'"),
        (changed(FLAG, pos_scores=[1.0], neg_scores=[1.0]), "'neg_scores': 1 values; expected a"),
        (changed(FLAG, pos_scores=[1.0]), "scores for some passages of the query"),
        (changed(FLAG, neg_index=[1.5, 2]), "'neg_index': 1.5"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_with_file_and_line(file, record, message):
    path = file({**FLAG, "query": "another"}, record)
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2: .*{message}"):
        list(training_files.read(path))


def test_a_passage_that_comes_twice_with_one_score_counts_once(file):
    record = changed(TEVATRON, negative_passages=[passage(), passage()])
    (example,) = training_files.read(file(record))
    assert [listed.passage.pid for listed in example.passages] == ["a", "b"]


def test_a_query_that_comes_again_later_or_with_another_text_is_refused(file):
    path = file(TUPLE, FLAG | {"query": "fox"}, TUPLE)
    with pytest.raises(
        ValueError, match=r"line 3: found the query 'sea' again, first seen on .* 1"
    ):
        list(training_files.read(path))
    path = file(TEVATRON, {**TEVATRON, "query": "fox"})
    with pytest.raises(ValueError, match=r"line 2: found another text of the query '7' than on li"):
        list(training_files.read(path))


def test_tuples_of_different_lengths_are_not_written(tmp_path):
    shorter = Example(Query("3", "hen"), (Listed(HEN, True, 1.0), Listed(SEA, False, 0.0)))
    with pytest.raises(ValueError, match="found 2 passages for the query '3'; expected as many"):
        training_files.write(tmp_path / "x", "sentence-transformers", [*EXAMPLES, shorter])
    assert not (tmp_path / "x").exists()


# The script


def test_a_file_becomes_a_collection_and_a_run_of_its_scores(script, tmp_path, capsys):
    training_files.write(tmp_path / "train.jsonl", "tevatron", EXAMPLES)
    script("read", tmp_path / "train.jsonl", f"--out={tmp_path / 'made'}")
    made = BeirCollection(str(tmp_path / "made"))
    assert list(made.passages()) == [FOX, HEN, SEA]
    assert list(made.queries("train")) == [example.query for example in EXAMPLES]
    assert list(made.qrels("train")) == [Qrel("1", "a", 1), Qrel("2", "c", 1)]
    run = tmp_path / "made" / "run.trec.gz"
    lists = [
        RankList("1", (ScoredPassage("b", THIRD), ScoredPassage("a", 0.1 + 0.2),
                       ScoredPassage("c", -7.0))),
        RankList("2", (ScoredPassage("a", 2.0), ScoredPassage("c", 2.0),
                       ScoredPassage("b", 1e-9))),
    ]  # fmt: skip
    assert list(trec.runs(run)) == lists, "the scores as they are, equal ones too"
    passages = store.write(made.passages(), tmp_path / "store")
    ranked = RunTeacher(str(run), pool="run").rank({"1": "the red fox"}, {}, passages, {})
    assert dict(ranked) == {"1": list(lists[0].passages)}
    assert f"{tmp_path / 'made'}: 2 queries, 2 with scores" in capsys.readouterr().out


def test_texts_without_ids_get_those_of_the_collection(script, folder, tmp_path, capsys):
    path = tmp_path / "train.jsonl.gz"
    record = {**TUPLE, "negative_2": "elsewhere", "scores": [2.0, 0.5, 1.0]}
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    script("read", path, f"--data_dir={folder}", f"--out={tmp_path / 'made'}")
    (ranked,) = trec.runs(tmp_path / "made" / "run.trec.gz")
    assert ranked == RankList("2", (ScoredPassage("c", 2.0), ScoredPassage("a", 0.5)))
    assert list(trec.qrels(tmp_path / "made" / "qrels" / "train.tsv")) == [Qrel("2", "c", 1)]
    assert not (tmp_path / "made" / "corpus.jsonl").exists()
    assert "left out 1 of 3 places: their passages are not in" in capsys.readouterr().err


@pytest.mark.parametrize("scores", [{}, {"scores": [1.0, 1.0, 1.0]}])
def test_without_an_order_there_is_no_run(script, file, tmp_path, capsys, scores):
    script("read", file({**TUPLE, **scores}), f"--out={tmp_path / 'made'}")
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [
        "corpus.jsonl", "qrels", "queries.jsonl",
    ]  # fmt: skip
    assert "no query has passages of different scores: no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(TEVATRON, negative_passages=[passage(text="gone")]),
         "line 1: found the passage 'b' without text; expected a text, or --data_dir"),
        (changed(TEVATRON, negative_passages=[passage(score=float("nan"))]), "the score nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_ends_it_with_one_line(script, file, tmp_path, record, message):
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        script("read", file(record), f"--out={tmp_path / 'made'}")


def test_a_passage_with_two_texts_is_named(script, file, tmp_path):
    other = changed(TEVATRON, query_id=8, negative_passages=[passage(text="blue hen")])
    with pytest.raises(SystemExit, match="line 2: found the passage 'b' with another text than"):
        script("read", file(TEVATRON, other), f"--out={tmp_path / 'made'}")


def test_a_file_of_another_collection_is_refused(script, file, folder, tmp_path):
    path = file({"query": "sea", "positive": "not", "negative": "here", "scores": [1, 2]})
    with pytest.raises(SystemExit, match=f"none of its passages is in {folder}"):
        script("read", path, f"--data_dir={folder}", f"--out={tmp_path / 'made'}")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("form", training_files.FORMATS)
def test_a_run_becomes_a_training_file(script, folder, tmp_path, capsys, form):
    run, out = tmp_path / "run.trec", tmp_path / "made.jsonl"
    lists = [
        RankList(e.query.qid, tuple(ScoredPassage(i.passage.pid, i.score) for i in e.passages))
        for e in EXAMPLES
    ]
    lists += [RankList("3", (ScoredPassage("a", 1.0),)), RankList("9", (ScoredPassage("a", 1.0),))]
    trec.write_run(run, lists, "x", exact=True)
    script("write", f"--data_dir={folder}", f"--run={run}", f"--format={form}",
           "--negatives=1", f"--out={out}")  # fmt: skip
    assert f"{out}: 2 lines of 2 of 3 queries; the others have no" in capsys.readouterr().out
    pids = ids([FOX, HEN, SEA])
    made = [
        [(i.passage.pid, i.positive, i.score) for i in example.passages]
        for example in training_files.read(out, pids)
    ]
    assert made == [
        [("a", True, 0.1 + 0.2), ("b", False, THIRD)],
        [("c", True, 2.0), ("a", False, 2.0)],
    ]


def test_a_run_of_other_queries_is_refused(script, folder, tmp_path):
    (tmp_path / "run.trec").write_text("9 Q0 a 1 2.0 x\n9 Q0 b 2 1.0 x\n")
    with pytest.raises(SystemExit, match=r"run\.trec: no query of the split 'train' has a posit"):
        script("write", f"--data_dir={folder}", f"--run={tmp_path / 'run.trec'}",
               f"--out={tmp_path / 'made'}")  # fmt: skip
    assert not (tmp_path / "made").exists()


def test_rank_lists_of_an_experiment_become_a_training_file(script, folder, tmp_path):
    model_dir = tmp_path / "model"
    store.write(BeirCollection(str(folder)).passages(), model_dir / "prepare" / "passages")
    (model_dir / "teach").mkdir()
    np.savez(
        model_dir / "teach" / "rank_lists.npz",
        qids=np.array(["1", "1", "2"]),
        passages=np.array([[0, 1], [0, 2], [2, -1]], np.int32),
        teacher_scores=np.array([[0.75, 0.5], [0.75, 0.25], [1.0, 0.0]], np.float32),
    )
    script("write", f"--data_dir={folder}", f"--model_dir={model_dir}", f"--out={tmp_path / 'x'}")
    (example,) = training_files.read(tmp_path / "x")
    assert example.query == EXAMPLES[0].query
    assert example.passages == (
        Listed(FOX, True, 0.75), Listed(HEN, False, 0.5), Listed(SEA, False, 0.25),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--negatives=0"], "--negatives: got 0, expected at least 1"),
        (["--format=sentence-transformers"], "sentence-transformers needs --negatives"),
    ],
)
def test_flags_that_do_not_fit_are_refused(script, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        script("write", "--data_dir=x", "--run=y", "--out=z", *flags)
    assert message in capsys.readouterr().err
