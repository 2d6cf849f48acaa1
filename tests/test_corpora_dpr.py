"""DPR's Wikipedia passages, question files and bi-encoder files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dgr_jax.corpora.dpr import DprCollection
from dgr_jax.corpora.types import Passage, Qrel, Query

TRAIN = [
    {
        "dataset": "nq_train",
        "question": "who wrote it",
        "answers": ["Ann", "A. B."],
        "positive_ctxs": [
            {"title": "T", "text": "x", "score": 9.5, "passage_id": "1"},
            {"title": "T", "text": "x", "score": 1000, "passage_id": "2"},
            {"title": "T", "text": "x", "score": 9.5, "passage_id": "2"},
        ],
        "negative_ctxs": [],
    },
    {"question": "nobody?", "answers": [], "positive_ctxs": []},
    {"question": "psg", "answers": ["x"], "positive_ctxs": [{"psg_id": 2, "score": 1}]},
]
FILES = {
    "psgs_w100.tsv": 'id\ttext\ttitle\n1\t"Aaron ( ""Ahärôn"" ) is"\tAaron\n2\tplain\t"A ""B"""\n',
    "biencoder-nq-train.json": json.dumps(TRAIN, indent=4),
    "biencoder-nq-dev.json": json.dumps(TRAIN[:1]),
    "nq-test.qa.csv": (
        'who won\t[\'Röntgen\', "O\'Neil"]\nsay what\t["a", "b"]\n'
        '"a ""quoted"" one"\t"[""O\'Hara""]"\n'
    ),
}


def _write(folder: Path, files: dict[str, str]) -> DprCollection:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return DprCollection(str(folder))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_passages_questions_and_positives(tmp_path, suffix):
    collection = _write(tmp_path, {name + suffix: text for name, text in FILES.items()})
    collection.check()
    assert collection.splits == ("train", "dev")
    assert list(collection.passages()) == [
        Passage("1", 'Aaron ( "Ahärôn" ) is', "Aaron"),
        Passage("2", "plain", 'A "B"'),
    ]
    assert list(collection.queries("train")) == [
        Query("train-1", "who wrote it", ("Ann", "A. B.")),
        Query("train-2", "nobody?"),
        Query("train-3", "psg", ("x",)),
    ]
    assert list(collection.qrels("train")) == [
        Qrel("train-1", "1", 1),
        Qrel("train-1", "2", 2),
        Qrel("train-3", "2", 1),
    ]
    assert list(collection.queries("test")) == [
        Query("test-1", "who won", ("Röntgen", "O'Neil")),
        Query("test-2", "say what", ("a", "b")),
        Query("test-3", 'a "quoted" one', ("O'Hara",)),
    ]


def test_the_folder_that_the_download_script_makes(tmp_path):
    names = {
        "psgs_w100.tsv": "wikipedia_split/psgs_w100.tsv",
        "biencoder-nq-train.json": "retriever/nq-train.json",
        "biencoder-nq-dev.json": "retriever/nq-dev.json",
        "nq-test.qa.csv": "retriever/qas/nq-test.csv",
    }
    collection = _write(tmp_path, {names[name]: text for name, text in FILES.items()})
    collection.check()
    assert len(list(collection.passages())) == 2
    assert len(list(collection.qrels("train"))) == 3
    assert len(list(collection.queries("test"))) == 3


def test_other_names(tmp_path):
    _write(tmp_path, {"w.tsv": FILES["psgs_w100.tsv"], "train_t.json": json.dumps(TRAIN)})
    collection = DprCollection(
        str(tmp_path), dataset="t", passages_file="w.tsv", judged_file="{split}_{dataset}.json"
    )
    collection.check(["train"])
    assert collection.splits == ("train",)
    assert len(list(collection.queries("train"))) == 3


def test_missing_files_name_columns_and_origin(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        DprCollection(str(tmp_path), dataset="trivia").check()
    message = str(caught.value)
    assert "lacks 4 files" in message
    assert "psgs_w100.tsv or wikipedia_split/psgs_w100.tsv (also as .gz): a header id" in message
    assert "wikipedia_split/psgs_w100.tsv.gz (data/download_data.py" in message
    assert "biencoder-trivia-train.json.gz" in message
    assert "trivia-test.qa.csv" in message
    assert "gin: DprCollection.folder" in message


def test_a_split_without_judgements_says_so(tmp_path):
    collection = _write(tmp_path, FILES)
    with pytest.raises(FileNotFoundError, match=r"expected:\n  biencoder-nq-test.json"):
        collection.qrels("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\ttext\ttitle\n", "line 1: found the columns .*; expected the header \\['id', 'text'"),
        ("", r"line 1: found the columns \[\]; expected the header"),
        ("id\ttext\ttitle\n", "found no passages; expected at least one"),
        (
            "id\ttext\ttitle\n1\tx\ty\n2\tx\n",
            r"line 3: found 2 columns \('2' ...\); expected 3 col",
        ),
        ("id\ttext\ttitle\n1\tx\ty\n1\tx\ty\n", "line 3: found the passage id '1' again, first"),
    ],
)
def test_bad_passages_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(_write(tmp_path, {"psgs_w100.tsv": text}).passages())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who\n", "line 1: found 1 column .* expected 2 columns: question and list of answers"),
        ("who\tAnn\n", r"line 1: found the answers 'Ann'; expected a list of strings"),
        ("who\t[1]\n", r"line 1: found the answers '\[1\]'; expected a list of strings"),
        ("who\t__import__('os')\n", 'line 1: found the answers "__import__'),
    ],
)
def test_bad_questions_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(_write(tmp_path, {"nq-test.qa.csv": text}).queries("test"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "line 1: found 'positive_ctxs': None; expected a list of objects"),
        ({"positive_ctxs": [{"id": "1"}]}, "line 1: found the fields 'id'; .* a field 'psg_id'"),
    ],
)
def test_bad_positives_are_refused(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        list(_write(tmp_path, {"biencoder-nq-dev.json": json.dumps([record])}).qrels("dev"))


def test_a_quote_that_is_not_closed_names_its_line(tmp_path):
    head = "id\ttext\ttitle\n1\tfirst\tA\n"
    for row in ('2\t"open\tB\n3\t"more" rows\tC\n', '2\t"open\tB\n3\tnext"\tC\n', '2\tx\t"open'):
        collection = _write(tmp_path, {"psgs_w100.tsv": head + row})
        with pytest.raises(ValueError, match="psgs_w100.tsv, line 3: found a field that cannot be"):
            list(collection.passages())
    collection = _write(tmp_path, {"nq-test.qa.csv": 'who\t["a"]\nwhat\t"[""b""]\nwhy\t["c"]\n'})
    with pytest.raises(ValueError, match=r"nq-test.qa.csv, line 2: found a field that cannot be"):
        list(collection.queries("test"))


def test_a_long_quoted_passage_is_read(tmp_path):
    text = 'so "long" ' * 30_000
    row = text.replace('"', '""')
    collection = _write(tmp_path, {"psgs_w100.tsv": f'id\ttext\ttitle\n1\t"{row}"\tA\n'})
    assert list(collection.passages()) == [Passage("1", text, "A")]


@pytest.mark.parametrize(
    "answers", ["[" * 3000, "[" + "1" * 5000 + "]", "(" * 3000, "['a\0']", "None", "['a', 1]"]
)
def test_answers_that_are_no_list_are_refused(tmp_path, answers):
    collection = _write(tmp_path, {"nq-test.qa.csv": f"who\t{answers}\n"})
    with pytest.raises(
        ValueError, match="line 1: found the answers .*; expected a list of strings"
    ):
        list(collection.queries("test"))


def test_ids_of_positives_are_checked(tmp_path):
    record = {"question": "q", "positive_ctxs": [{"passage_id": "a b"}]}
    collection = _write(tmp_path, {"biencoder-nq-dev.json": json.dumps([record])})
    with pytest.raises(ValueError, match="line 1: found the passage id 'a b'; expected an id with"):
        list(collection.qrels("dev"))
