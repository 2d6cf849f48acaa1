"""Passages, queries and judgements as dictionaries and data frames."""

from __future__ import annotations

import collections

import pytest

from dgr_jax.corpora import records
from dgr_jax.corpora.beir import BeirCollection
from dgr_jax.corpora.types import Passage, Qrel, Query


class Frame:
    """As much of a data frame as is read."""

    def __init__(self, **columns):
        self.columns, self.rows = list(columns), list(zip(*columns.values(), strict=True))

    def itertuples(self, index, name):
        assert not index and name is None
        return iter(self.rows)


class Missing:
    """As the NA of frames: it is neither equal nor unequal to anything."""

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise TypeError("ambiguous")


def test_fields_have_the_names_of_any_tool():
    given = [{"_id": 7, "text": "t"}, {"docno": "d", "body": "b", "title": None}]
    assert list(records.passages(given)) == [Passage("7", "t"), Passage("d", "b")]
    asked = [{"query_id": "q", "query": "why", "answers": ["so"]}]
    assert list(records.queries(asked)) == [Query("q", "why", ("so",))]
    judged = [{"qid": "q", "docno": "d"}, {"query-id": "q", "corpus-id": 7, "score": 2.0}]
    assert list(records.qrels(judged)) == [Qrel("q", "d", 1), Qrel("q", "7", 2)]


@pytest.mark.parametrize("missing", [None, float("nan"), Missing()])
def test_a_grade_that_is_missing_is_no_positive(missing):
    frame = Frame(qid=["q", "q"], pid=["a", "b"], relevance=[1, missing])
    with pytest.raises(ValueError, match="judgement 2: got the fields qid, pid, relevance, expect"):
        list(records.qrels(frame))


def test_frames_are_read_row_by_row():
    frame = Frame(docno=["a", "b", "c"], text=["x", "y", "z"], title=["T", float("nan"), Missing()])
    assert records.are_records(frame)
    assert list(records.passages(frame)) == [Passage("a", "x", "T"), Passage("b", "y"),
                                             Passage("c", "z")]  # fmt: skip


def test_a_real_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"pid": [1, 2], "text": ["x", "y"], "title": ["T", None]})
    assert list(records.passages(frame)) == [Passage("1", "x", "T"), Passage("2", "y")]
    judged = pandas.DataFrame({"qid": ["q"], "pid": [1], "relevance": [2]})
    assert list(records.qrels(judged)) == [Qrel("q", "1", 2)]


@pytest.mark.parametrize("value", ["text", b"text", {"pid": "a"}, 7, None])
def test_what_are_no_records(value):
    assert not records.are_records(value)
    assert records.are_records(iter([]))


def test_what_is_written_again_and_is_the_same_stays_as_it_is(tmp_path):
    folder = tmp_path / "collection"
    given = [{"pid": "a", "text": "x"}], [{"qid": "q", "text": "y"}]
    records.write(folder, *given, {"test": [{"qid": "q", "pid": "a"}]})
    assert list(BeirCollection(str(folder)).passages()) == [Passage("a", "x")]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    records.write(folder, *given, {"test": [{"qid": "q", "pid": "a"}]})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    records.write(folder, *given, {"dev": [{"qid": "q", "pid": "a"}]})
    assert BeirCollection(str(folder)).splits == ("dev",)
    with pytest.raises(ValueError, match="query 1: got the fields none, expected 'qid' .or _id"):
        records.write(folder, given[0], [{}], {})
    assert BeirCollection(str(folder)).splits == ("dev",)
    assert [path.name for path in tmp_path.iterdir()] == ["collection"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"pid": "a"}, "passage 1: got the fields pid, expected 'text' .or contents, body. with a"),
        ({"pid": 1.5, "text": "x"}, "passage 1: got 1.5 as 'pid', expected a string"),
        ({"pid": True, "text": "x"}, "passage 1: got True as 'pid', expected a string"),
        ("a", "passage 1: got 'a', expected a dictionary"),
        (
            {"pid": "a", "text": "b\ud800"},
            "passage 1: got .b.ud800. as 'text', expected text that U",
        ),
    ],
)
def test_a_record_that_cannot_be_read_is_numbered(record, message):
    with pytest.raises(ValueError, match=message):
        collections.deque(records.passages([record]))
