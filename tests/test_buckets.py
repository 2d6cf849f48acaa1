"""Data in a bucket is read as it lies there; fsspec's memory and file systems stand for one."""

import dataclasses
import gzip
import importlib
import io
import sys

import numpy as np
import pytest
from upath import UPath

from dgr_jax.corpora import lines, trec
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.msmarco import MsmarcoCollection
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data.examples import pseudo_queries
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.identifiers.embeddings import FromFile
from dgr_jax.stages import pipeline
from dgr_jax.teaching.teachers import RunTeacher, VectorTeacher
from tests import test_experiment
from tests.test_teacher import ListStore

PASSAGES = [Passage(f"p{i}", f"text number {i}", "title") for i in range(3)]
QUERIES = [Query("q1", "which", ("number",))]
STORE = ListStore(PASSAGES)
BUCKET = "memory://bucket"


@pytest.fixture
def bucket(tmp_path):
    """A BEIR folder in a bucket, one file packed, and the same folder here."""
    write_beir(tmp_path / "beir", PASSAGES, QUERIES, {"test": [Qrel("q1", "p2", 1)]})
    root = UPath(f"{BUCKET}/{tmp_path.name}")
    for file in (tmp_path / "beir").rglob("*.*"):
        there = root / "beir" / str(file.relative_to(tmp_path / "beir"))
        there.parent.mkdir(parents=True, exist_ok=True)
        packed = file.name == "corpus.jsonl"
        there = there.parent / f"{there.name}.gz" if packed else there
        there.write_bytes(gzip.compress(file.read_bytes()) if packed else file.read_bytes())
    yield root
    root.rmdir(recursive=True)


def put(bucket, name, value):
    """The name of a file in the bucket that holds these bytes."""
    (bucket / name).write_bytes(value)
    return str(bucket / name)


def test_a_collection(bucket, tmp_path):
    found = BeirCollection(f"{bucket}/beir")
    found.check(["test"])
    here = BeirCollection(str(tmp_path / "beir"))
    assert found.splits == here.splits == ("test",)
    assert list(found.passages()) == PASSAGES
    assert list(found.queries("test")) == QUERIES
    assert list(found.qrels("test")) == list(here.qrels("test"))


def test_what_is_missing_is_named(bucket):
    (bucket / "beir/queries.jsonl").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^memory://bucket/.*/beir lacks 1 file; expected:"
    ):
        BeirCollection(f"{bucket}/beir").check(["test"])
    with pytest.raises(FileNotFoundError, match=r"^memory://bucket/.*/nothing does not exist;"):
        MsmarcoCollection(f"{bucket}/nothing").check(["dev"])


def test_a_bad_line_is_named(bucket):
    path = put(bucket, "beir/corpus.jsonl", b'{"_id": "a", "text": "b"}\n{"_id": "c"\n')
    with pytest.raises(ValueError, match=rf"^{path}, line 2: found invalid JSON"):
        list(BeirCollection(f"{bucket}/beir").passages())
    path = put(bucket, "bad.tsv", b"a\tb\nc\xff\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 2: found invalid UTF-8"):
        list(lines.read(path))


def test_a_file_is_read_in_parts(bucket):
    path = put(bucket, "many.tsv", b"".join(b"p%d\tquery\n" % (i % 3) for i in range(10)))
    cut = lines.places(path, 4)
    assert [count for *_, count in cut] == [4, 4, 2]
    after, offset, _ = cut[1]
    assert next(lines.read(path, after=after, offset=offset)) == (5, "p1\tquery")
    assert [index for index, _ in pseudo_queries(path, STORE)] == [i % 3 for i in range(10)]


def test_a_run_and_vectors_teach(bucket):
    run = put(bucket, "run.trec", b"q1 Q0 p2 1 3.0 x\nq1 Q0 p0 2 1.0 x\n")
    assert [x.pid for x in next(trec.runs(run)).passages] == ["p2", "p0"]
    pools = {"q1": ["p0", "p1", "p2"]}
    ordered = dict(RunTeacher(run).rank({"q1": "which"}, pools, STORE, {}))
    assert [x.pid for x in ordered["q1"]] == ["p2", "p0"]
    vectors = np.array([[1, 0], [0, 1], [0.5, 0.5]], np.float32)
    files = {
        "passages_path": put(bucket, "passages.npy", npy(vectors)),
        "queries_path": put(bucket, "queries.npy", npy(vectors[1:2])),
        "query_ids_path": put(bucket, "ids.tsv", b"q1\n"),
    }
    ordered = dict(VectorTeacher(**files).rank({"q1": "which"}, pools, STORE, {}))
    assert [x.pid for x in ordered["q1"]] == ["p1", "p2", "p0"]
    np.testing.assert_array_equal(FromFile(files["passages_path"]).embed(STORE, 0), vectors)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_vocabulary(bucket, tmp_path):
    texts = [f"a text of some words and {i}" for i in range(50)]
    trained = SentencePiece(size=60).write(tmp_path, texts)
    path = put(bucket, "spiece.model", trained.read_bytes())
    (tmp_path / "copy").mkdir()
    copied = SentencePiece(path).write(tmp_path / "copy", [])
    assert copied.read_bytes() == trained.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"no file at 'memory://bucket/none.model'"):
        SentencePiece(f"{BUCKET}/none.model").write(tmp_path, [])


def test_a_stage_knows_what_the_files_of_a_bucket_hold(bucket, tmp_path):
    """The same data, moved to a bucket, is not prepared again; changed data is."""
    prepare = test_experiment.BASE.prepare.without_labels()

    def settings(folder):
        collection = BeirCollection(folder)
        made = dataclasses.replace(
            test_experiment.BASE, model_dir=str(tmp_path), collection=collection, prepare=prepare
        )
        return pipeline.settings_of(made, ["prepare"])["prepare"]

    packed = bucket / "beir/corpus.jsonl.gz"
    (bucket / "beir/corpus.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    before = settings(str(tmp_path / "beir"))
    assert settings(f"{bucket}/beir") == before
    (bucket / "beir/corpus.jsonl").write_bytes(b'{"_id": "a", "text": "b"}\n')
    assert settings(f"{bucket}/beir") != before


def test_a_library_that_is_missing_is_named(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"^s3://b/x: a bucket needs more libraries \("):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        lines.place("s3://b/x")
    monkeypatch.setitem(sys.modules, "upath", None)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dgr_jax\[buckets\]'$"):
        lines.place("gs://b/x")


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match=r"^nonsense://b/x: got this scheme, expected gs://, s3"):
        lines.place("nonsense://b/x")


@pytest.mark.parametrize("path", ["a/b", "~/a"])
def test_local_paths_stay_what_they_are(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    assert str(lines.place(path)) == path.replace("~", "/home/one")
