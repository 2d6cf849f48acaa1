"""Questions from a file or a pipe: what `retrieve --queries` reads and refuses."""

from __future__ import annotations

import gzip
import os

import pytest

from dgr_jax.serving.ask import read_queries

EXPECTED = {"q1": "who", "q2": "what\tfor"}
TSV = b"q1\twho\n\nq2\twhat\tfor\n"
JSONL = b'{"_id": "q1", "text": "who"}\n{"_id": "q2", "text": "what\\tfor"}\n'


@pytest.mark.parametrize(
    "data",
    [TSV, JSONL, gzip.compress(TSV, mtime=0), gzip.compress(JSONL, mtime=0)],
    ids=["tsv", "jsonl", "tsv.gz", "jsonl.gz"],
)
@pytest.mark.parametrize("piped", [False, True])
def test_questions_of_a_file_and_of_a_pipe(tmp_path, data, piped):
    path = tmp_path / "asked"
    if not piped:
        path.write_bytes(data)
        assert read_queries(str(path)) == EXPECTED
        return
    read, write = os.pipe()
    with os.fdopen(write, "wb") as handle:
        handle.write(data)
    try:
        assert read_queries(f"/dev/fd/{read}") == EXPECTED
    finally:
        os.close(read)


@pytest.mark.parametrize(
    ("header", "qids", "said"),
    [
        ("query_id\ttext", ["q1"], "'query_id\\ttext' is passed over as a header, and is no query"),
        ("\ufeffQID\tQuery", ["q1"], "'QID\\tQuery' is passed over as a header, and is no query"),
        ("qid\tfrage", ["qid", "q1"], "is read as a query; remove the line if it is a header"),
        ("q0\tquery", ["q0", "q1"], ""),
    ],
)
def test_a_header_is_told_of(tmp_path, caplog, header, qids, said):
    (tmp_path / "asked").write_text(f"{header}\nq1\twho\n")
    assert list(read_queries(str(tmp_path / "asked"))) == qids
    assert (f"{tmp_path}/asked, line 1: " in caplog.text) == bool(said) and said in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1\twho\nq2\t \n", "line 2: found a blank text of qid 'q2'; expected a question"),
        ("q1\twho\nq2\t\n", "line 2: found a blank text of qid 'q2'; expected a question"),
        ("q1\twho\nq2\t\u200b\n", "line 2: found a blank text of qid 'q2'; expected a question"),
        ("q1\twho\nq2\n", "line 2: found 'q2'; expected two columns: qid, tab, text"),
        ("q1\twho\nq1\twhat\n", "line 2: found qid 'q1' again; expected a different qid on each"),
        ("q 1\twho\n", "line 1: found the query id 'q 1'; expected an id without white space"),
        ("q\x1b\twho\n", r"line 1: found the query id 'q\\x1b'; expected an id without white sp"),
        ('{"_id": "q1", "text": null}\n', "line 1: found 'text': None; expected a string"),
        ('{"_id": "q1"}\n', "line 1: found the fields '_id'; expected a field 'text'"),
        ('{"_id": "q1", "text": ""}\n', "line 1: found a blank text of qid 'q1'; expected a quest"),
        ("", "--queries=.*asked: the file has no query; expected qid, tab, text"),
    ],
)
def test_questions_refused(tmp_path, text, message):
    (tmp_path / "asked").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queries(str(tmp_path / "asked"))
    with pytest.raises(FileNotFoundError, match="--queries=.*: no such file; expected a TSV"):
        read_queries(str(tmp_path))
