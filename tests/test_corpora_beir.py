"""BEIR folders: reading, writing, and each complaint about a bad one."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgr_jax.corpora import beir, checks, store
from dgr_jax.corpora.types import Passage, Qrel, Query

PASSAGES = [Passage("p1", "A hive has one queen.", "Bees"), Passage("p2", "Ärger\u2028 here")]
QUERIES = [
    Query("q1", "how many queens"),
    Query("q2", "who rules", ("queen", "the queen")),
    Query("q3", "unjudged"),
]
QRELS = {
    "train": [Qrel("q2", "p1", 2), Qrel("q2", "p2", 0)],
    "test": [Qrel("q2", "p1", 1), Qrel("q1", "p1", 1)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    beir.write_beir(tmp_path / "c", PASSAGES, QUERIES, QRELS)
    return tmp_path / "c"


def test_what_is_written_is_read(folder):
    collection = beir.BeirCollection(str(folder))
    collection.check()
    collection.check(["train", "test"])
    assert collection.splits == ("test", "train")
    assert list(collection.passages()) == PASSAGES == list(collection.passages())
    assert list(collection.all_queries()) == QUERIES
    assert {split: list(collection.qrels(split)) for split in QRELS} == QRELS


def test_queries_of_a_split_are_the_judged_ones_in_file_order(folder):
    collection = beir.BeirCollection(str(folder))
    assert [query.qid for query in collection.queries("test")] == ["q1", "q2"]
    assert [query.qid for query in collection.queries("train")] == ["q2"]


def test_gzip_files_of_a_folder(folder):
    for path in list(folder.rglob("*.*")):
        if path.is_file():
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    collection = beir.BeirCollection(str(folder))
    collection.check(["train"])
    assert collection.splits == ("test", "train")
    assert list(collection.passages()) == PASSAGES
    assert [query.qid for query in collection.queries("test")] == ["q1", "q2"]


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ID = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda text: " " not in text
)


@given(st.dictionaries(ID, st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_any_text_survives_the_way_out_and_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("beir")
    passages = [Passage(pid, text, title, {title: text}) for pid, (text, title) in texts.items()]
    queries = [Query(pid, text, (title,)) for pid, (text, title) in texts.items()]
    qrels = [Qrel(pid, pid, number) for number, pid in enumerate(texts)]
    beir.write_beir(folder, passages, queries, {"test": qrels})
    collection = beir.BeirCollection(str(folder))
    assert list(collection.passages()) == passages
    assert list(collection.queries("test")) == queries
    assert list(collection.qrels("test")) == qrels
    assert list(store.write(passages, folder / "store")) == passages


def test_other_producers_forms(folder):
    (folder / "corpus.jsonl").write_bytes(
        b'\xef\xbb\xbf{"_id": 7, "text": "a", "metadata": {"x": 1, "y": [2], "z": true}}\r\n\r\n'
        b'{"_id": "8", "title": null, "text": "cut \\ud83d emoji", "metadata": {"": "\\ud83d"}}\n'
    )
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "t", "metadata": {"answers": "a"}}')
    collection = beir.BeirCollection(str(folder))
    assert list(collection.passages()) == [
        Passage("7", "a", metadata={"x": 1, "z": True}),
        Passage("8", "cut \ufffd emoji", metadata={"": "\ufffd"}),
    ]
    assert list(collection.all_queries()) == [Query("q", "t", ("a",))]


def _corpus(folder: Path, *records: object) -> beir.BeirCollection:
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, records)))
    return beir.BeirCollection(str(folder))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": "a", "text": "t"}], "line 1: found the fields 'id', 'text'; .* a field '_id'"),
        ([{"_id": "a", "title": "t"}], "line 1: found the fields '_id', 'title'; .*'text'"),
        ([{"_id": "a", "text": ["t"]}], r"line 1: found 'text': \['t'\]; expected a string"),
        ([{"_id": "a", "text": None}], "line 1: found 'text': None; expected a string"),
        ([{"_id": "", "text": "t"}], "line 1: found the passage id ''; expected an id without"),
        ([{"_id": "a b", "text": "t"}], "line 1: found the passage id 'a b'; expected an id with"),
        ([], "corpus.jsonl: found no passages; expected at least one"),
        (
            [{"_id": i, "text": "t"} for i in ("a", "b", "c", "b")],
            "line 4: found the passage id 'b' again, first seen on line 2; expected each id once",
        ),
    ],
)
def test_bad_corpora_are_refused(folder, records, message):
    with pytest.raises(ValueError, match=message):
        list(_corpus(folder, *records).passages())


def test_bad_answers_are_refused(folder):
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "t", "metadata": {"answers": [1]}}')
    with pytest.raises(ValueError, match=r"line 1: found 'answers': \[1\]; expected a list of str"):
        list(beir.BeirCollection(str(folder)).all_queries())


def test_blank_texts_are_kept_with_one_warning(folder, caplog):
    records = [{"_id": str(i), "text": " " * (i % 2)} for i in range(1, 5)]
    records.append({"_id": "5", "text": "x"})
    collection = _corpus(folder, *records)
    with caplog.at_level(logging.WARNING):
        assert len(list(collection.passages())) == len(list(collection.passages())) == 5
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'corpus.jsonl'}: 4 passages with blank text, kept; the first on line 1"
    ]


def test_missing_files_are_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        beir.BeirCollection(str(tmp_path)).check(["train", "test"])
    message = str(caught.value)
    assert f"{tmp_path} lacks 4 files" in message
    for part in (
        "corpus.jsonl (also as .gz): JSON lines",
        "queries.jsonl (also",
        "qrels/train.tsv (also as .gz): a header, then query-id, corpus-id, score",
        "qrels/test.tsv",
        "any folder of this layout",
        "gin: BeirCollection.folder",
    ):
        assert part in message


def test_a_folder_without_any_qrels_is_not_whole(folder):
    for path in (folder / "qrels").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 file; expected:\n  qrels/<split>.tsv"):
        beir.BeirCollection(str(folder)).check()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        beir.BeirCollection(str(folder / "nowhere")).check()


def test_an_unknown_split_names_the_known(folder):
    with pytest.raises(ValueError, match=r"no split 'tset' in .*; expected one of test, train"):
        beir.BeirCollection(str(folder)).queries("tset")


def test_collections_are_values():
    assert hash(beir.BeirCollection("a")) == hash(beir.BeirCollection("a"))
    assert beir.BeirCollection("a") != beir.BeirCollection("b")


@pytest.mark.skipif("DGR_BEIR_FOLDERS" not in os.environ, reason="DGR_BEIR_FOLDERS is not set")
def test_real_folders_are_whole(tmp_path):
    """Reads every BEIR folder under $DGR_BEIR_FOLDERS."""
    folders = sorted(Path(os.environ["DGR_BEIR_FOLDERS"]).glob("*/corpus.jsonl"))
    assert folders
    for number, corpus in enumerate(folders):
        collection = beir.BeirCollection(str(corpus.parent))
        passages = store.write(collection.passages(), tmp_path / str(number))
        qids = {query.qid for query in collection.all_queries()}
        for split in collection.splits:
            judged = checks.check_qrels(
                collection.qrels(split), qids, set(passages.pids), where=f"{corpus.parent}/{split}"
            )
            assert len(judged.kept) >= sum(1 for _ in collection.queries(split)) > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"_id": "a\u001b", "text": "t"}', r"the passage id 'a\\x1b'; expected an id without"),
        (r'{"_id": "a\u0085", "text": "t"}', r"the passage id 'a\\x85'; expected an id without"),
        (r'{"_id": "\ud800", "text": "t"}', r"the passage id '\\ud800'; expected an id without"),
        (r'{"_id": "\ufeffa", "text": "t"}', r"the passage id '\\ufeffa'; expected an id without"),
        ('{"_id": ' + "1" * 4400 + ', "text": "t"}', "a whole number of too many digits; expected"),
        (
            '{"_id": "a", "text": ' + "[" * 200_000,
            "JSON that is nested too deeply; expected one JSON",
        ),
        ('{"_id": "a", "text": null}', "'text': None; expected a string"),
        ('{"_id": null, "text": "t"}', "'_id': None; expected a string"),
        ('{"_id": "a", "text": NaN}', "'text': nan; expected a string"),
        ('{"_id": "a", "text": true}', "'text': True; expected a string"),
        (
            '{"_id": "a", "text": ["' + "x" * 9000 + '"]}',
            r"'text': \['x+\.\.\.x+'\]; expected a stri",
        ),
    ],
)
def test_values_that_no_collection_holds_are_refused(folder, line, message):
    (folder / "corpus.jsonl").write_text('{"_id": "first", "text": "t"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"corpus.jsonl, line 2: found {message}") as caught:
        list(beir.BeirCollection(str(folder)).passages())
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_half_a_surrogate_pair_of_a_text_is_replaced(folder):
    (folder / "corpus.jsonl").write_text(r'{"_id": "a", "text": "t\ud800", "title": "\udfff"}')
    (passage,) = beir.BeirCollection(str(folder)).passages()
    assert (passage.text, passage.title) == ("t\ufffd", "\ufffd")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_other_encodings_are_refused(folder, encoding):
    (folder / "corpus.jsonl").write_bytes('{"_id": "a", "text": "t"}\n'.encode(encoding))
    with pytest.raises(ValueError, match="corpus.jsonl, line 1: found .*; expected"):
        list(beir.BeirCollection(str(folder)).passages())


def test_passages_that_are_kept_elsewhere_leave_no_empty_file(tmp_path):
    """Folders of older versions have a corpus; it is not read for queries and judgements."""
    queries, qrels = [Query("q", "who")], {"test": [Qrel("q", "p", 1)]}
    beir.write_beir(tmp_path / "new", None, queries, qrels)
    beir.write_beir(tmp_path / "old", (), queries, qrels)
    assert not (tmp_path / "new" / "corpus.jsonl").exists()
    for name in ("new", "old"):
        collection = beir.BeirCollection(str(tmp_path / name))
        assert list(collection.queries("test")) == queries
        assert list(collection.qrels("test")) == qrels["test"]
