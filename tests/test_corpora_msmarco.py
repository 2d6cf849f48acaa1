"""MS MARCO's official files under their official names."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dgr_jax.corpora.msmarco import MsmarcoCollection
from dgr_jax.corpora.types import Passage, Qrel, Query

FILES = {
    "collection.tsv": '0\tThe "Manhattan" Project\n1\t\n',
    "queries.train.tsv": "7\twhat is it\n8\tunjudged\n9\twho\n",
    "qrels.train.tsv": "9\t0\t0\t1\n7\t0\t1\t1\n",
    "queries.dev.tsv": "3\tlarge dev\n",
    "qrels.dev.tsv": "3 0 1 1\n",
    "queries.dev.small.tsv": "2\t Androgen receptor define\n",
    "qrels.dev.small.tsv": "2\t0\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_official_names(folder):
    collection = MsmarcoCollection(str(folder))
    collection.check()
    assert collection.splits == ("train", "dev")
    assert list(collection.passages()) == [
        Passage("0", 'The "Manhattan" Project'),
        Passage("1", ""),
    ]
    assert [query.qid for query in collection.queries("train")] == ["7", "9"]
    assert [query.qid for query in collection.all_queries("train")] == ["7", "8", "9"]
    assert list(collection.qrels("train")) == [Qrel("9", "0", 1), Qrel("7", "1", 1)]
    assert list(collection.queries("dev")) == [Query("2", " Androgen receptor define")]
    assert list(collection.qrels("dev")) == [Qrel("2", "0", 1)]


def test_the_whole_dev_set_where_the_small_one_is_missing(folder):
    (folder / "qrels.dev.small.tsv").unlink()
    assert list(MsmarcoCollection(str(folder)).queries("dev")) == [Query("3", "large dev")]


def test_trec_deep_learning_files_packed(folder):
    name = "msmarco-test2019-queries.tsv.gz"
    (folder / name).write_bytes(gzip.compress(b"19335\tanthropological definition\n"))
    (folder / "2019qrels-pass.txt").write_text("19335 Q0 1 3\n")
    collection = MsmarcoCollection(str(folder))
    assert collection.splits == ("train", "dev", "dl19")
    assert list(collection.qrels("dl19")) == [Qrel("19335", "1", 3)]
    assert [query.qid for query in collection.queries("dl19")] == ["19335"]


def test_headers_are_told_of_and_are_no_records(folder, caplog):
    for name, header in (("collection.tsv", "pid\tpassage"), ("queries.train.tsv", "qid\tquery")):
        (folder / name).write_text(f"{header}\n{FILES[name]}")
    (folder / "qrels.train.tsv").write_text("qid\titer\tpid\trelevance\n9\t0\t0\t1\n")
    collection = MsmarcoCollection(str(folder))
    assert [passage.pid for passage in collection.passages()] == ["0", "1"]
    assert [query.qid for query in collection.all_queries("train")] == ["7", "8", "9"]
    assert list(collection.qrels("train")) == [Qrel("9", "0", 1)]
    for name, kind in (("collection", "passage"), ("queries.train", "query")):
        assert f"{folder / name}.tsv, line 1: " in caplog.text
        assert f"is passed over as a header, and is no {kind}" in caplog.text


def test_other_file_names(folder):
    collection = MsmarcoCollection(
        str(folder), passages_file="queries.train.tsv", files=(("x", *list(FILES)[1:3]),)
    )
    collection.check(["x"])
    assert len(list(collection.passages())) == 3
    assert [query.qid for query in collection.queries("x")] == ["7", "9"]
    with pytest.raises(ValueError, match=r"no split 'dev'; expected one of x \(gin: MsmarcoColl"):
        collection.qrels("dev")


def test_missing_files_name_columns_and_origin(folder):
    for name in FILES:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        MsmarcoCollection(str(folder)).check()
    message = str(caught.value)
    assert f"{folder} lacks 5 files" in message
    assert "collection.tsv (also as .gz): pid <tab> text" in message
    assert "qrels.train.tsv (also as .gz): qid 0 pid relevance" in message
    assert "queries.dev.small.tsv" in message
    assert "collectionandqueries.tar.gz of https://microsoft.github.io/msmarco/" in message
    with pytest.raises(FileNotFoundError, match=r"lacks 1 file; expected:\n  collection.tsv"):
        MsmarcoCollection(str(folder)).passages()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\ta\n1 b\n", r"line 2: found 1 column \('1 b'\); expected 2 columns, pid and text, sep"),
        ("0\ta\tb\n", r"line 1: found 3 columns \('0\\ta\\tb'\); expected 2 columns"),
        ("0\ta\n1\tb\n0\tc\n", "line 3: found the passage id '0' again, first seen on line 1"),
        ("", "found no passages; expected at least one"),
    ],
)
def test_bad_collections_are_refused(folder, text, message):
    (folder / "collection.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(MsmarcoCollection(str(folder)).passages())
