"""The gateway to ir_datasets, against a library of our own with the same calls."""

from __future__ import annotations

import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest

from dgr_jax.corpora.irds import IrDatasetsCollection
from dgr_jax.corpora.types import Passage, Qrel, Query

Titled = namedtuple("Titled", "doc_id text title")
Plain = namedtuple("Plain", "doc_id text")
Bare = namedtuple("Bare", "query_id title")
Asked = namedtuple("Asked", "query_id text answers")
Judged = namedtuple("Judged", "query_id doc_id relevance iteration")


class Page(namedtuple("Page", "doc_id url title body")):
    def default_text(self) -> str:
        return f"{self.title} {self.body}"


def _dataset(**parts: list) -> SimpleNamespace:
    methods = {
        f"has_{part}": lambda part=part: part in parts for part in ("docs", "queries", "qrels")
    }
    methods |= {f"{part}_iter": lambda rows=rows: iter(rows) for part, rows in parts.items()}
    return SimpleNamespace(**methods)


LIBRARY = {
    "pages": _dataset(
        docs=[Titled("1", "text", "Title"), Plain(2, "only text"), Page("3", "u", "T", "body")]
    ),
    "pages/test": _dataset(
        queries=[Asked("b", "who", ["x"]), Asked("c", "unjudged", []), Asked("a", "what", None)],
        qrels=[Judged("a", "1", 1, "0"), Judged("b", 3, "2", "0")],
    ),
    "bare": _dataset(
        docs=[Bare("1", "t")], queries=[Bare("q", "t")], qrels=[Judged("q", "1", 1, 0)]
    ),
}


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=LIBRARY.__getitem__))


@pytest.mark.parametrize("splits", [(), {"eval": "pages/test"}, (("eval", "pages/test"),)])
def test_documents_queries_and_judgements(library, splits):
    collection = IrDatasetsCollection(dataset="pages", splits=splits)
    split = "eval" if splits else "test"
    collection.check([split])
    hash(collection)
    assert list(collection.passages()) == [
        Passage("1", "text", "Title"),
        Passage("2", "only text"),
        Passage("3", "T body"),
    ]
    assert list(collection.queries(split)) == [Query("b", "who", ("x",)), Query("a", "what")]
    assert len(list(collection.all_queries(split))) == 3
    assert list(collection.qrels(split)) == [Qrel("a", "1", 1), Qrel("b", "3", 2)]


def test_splits_given_as_a_mapping_are_kept_as_a_value():
    given = IrDatasetsCollection("a", {"x": "b"})
    assert given == IrDatasetsCollection("a", (("x", "b"),))
    assert given.splits == (("x", "b"),)


@pytest.mark.parametrize(
    ("collection", "message"),
    [
        (
            IrDatasetsCollection("nope"),
            "found the ir_datasets id 'nope', which the library does not",
        ),
        (IrDatasetsCollection("pages/test"), "found no docs in the ir_datasets id 'pages/test'"),
        (
            IrDatasetsCollection("pages", {"test": "pages"}),
            r"found no queries in the ir_datasets id 'pages'; .* \(gin: IrDatasetsCollection",
        ),
    ],
)
def test_wrong_ids_are_refused(library, collection, message):
    with pytest.raises(ValueError, match=message):
        collection.check()


def test_one_id_is_not_two_splits(library):
    twice = IrDatasetsCollection("pages", splits=(("train", "pages/test"), ("test", "pages/test")))
    twice.check(["train"])
    message = "got 'pages/test' for 'train' and for 'test', expected another id for each"
    with pytest.raises(ValueError, match=message):
        twice.check(["train", "test"])


def test_records_without_any_text_are_refused(library):
    collection = IrDatasetsCollection("bare", {"test": "bare"})
    with pytest.raises(ValueError, match="a record of 'bare' with the fields query_id, title; exp"):
        list(collection.queries("test"))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(ImportError, match=r"needs the extra 'dgr_jax\[irds\]': pip install"):
        IrDatasetsCollection("pages").check()


def test_blank_and_repeated_documents_are_noticed(monkeypatch, caplog):
    library = {
        "blank": _dataset(docs=[Plain("1", "text"), Plain("2", " "), Plain("3", "")]),
        "twice": _dataset(docs=[Plain("1", "text"), Plain("1", "more")]),
    }
    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=library.__getitem__))
    assert len(list(IrDatasetsCollection("blank").passages())) == 3
    assert caplog.messages == ["blank: 2 passages with blank text, kept; the first on line 2"]
    with pytest.raises(ValueError, match="twice, line 2: found the passage id '1' again"):
        list(IrDatasetsCollection("twice").passages())


@pytest.mark.parametrize("part", ["docs", "queries", "qrels"])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("HTTPSConnectionPool(host='x'): Max retries\nmore"),
        RuntimeError("no source"),
    ],
)
def test_without_a_network_one_line_says_so(monkeypatch, part, error):
    def fail():
        yield from ()
        raise error

    parts = {"docs": [Plain("1", "t")], "queries": [Asked("q", "t", [])], "qrels": []}
    dataset = _dataset(**parts)
    setattr(dataset, f"{part}_iter", fail)
    library = {"far": dataset, "far/test": dataset}
    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=library.__getitem__))
    collection = IrDatasetsCollection("far")
    collection.check(["test"])
    read = collection.passages if part == "docs" else lambda: collection.queries("test")
    name = "far" if part == "docs" else "far/test"
    with pytest.raises(
        OSError, match=rf"^the {part} of the ir_datasets id '{name}' cannot be re"
    ) as e:
        list(read())
    assert "\n" not in str(e.value) and type(error).__name__ in str(e.value)


@pytest.mark.parametrize(
    ("qrel", "message"),
    [
        (Judged("q", "1", 10**19, 0), "bad/test, line 2: found the relevance '1000"),
        (
            Judged("q", "1", None, 0),
            "bad/test, line 2: found the relevance 'None'; expected a whole",
        ),
        (Judged("q", "1 2", 1, 0), "bad/test, line 2: found the passage id '1 2'; expected an id"),
        (
            Judged("q\x1b", "1", 1, 0),
            r"bad/test, line 2: found the query id 'q\\x1b'; expected an id",
        ),
    ],
)
def test_wrong_judgements_are_named(monkeypatch, qrel, message):
    library = {"bad/test": _dataset(queries=[], qrels=[Judged("q", "1", 1, 0), qrel])}
    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=library.__getitem__))
    with pytest.raises(ValueError, match=message):
        list(IrDatasetsCollection("bad").qrels("test"))


def test_texts_that_are_no_strings_are_refused(monkeypatch):
    library = {"bad": _dataset(docs=[Plain("1", 5)]), "title": _dataset(docs=[Titled("1", "t", 5)])}
    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=library.__getitem__))
    for name, found in (("bad", "text 5"), ("title", "title 5")):
        with pytest.raises(
            ValueError, match=f"a record of '{name}' with the {found}; expected a st"
        ):
            list(IrDatasetsCollection(name).passages())


def test_files_of_the_users_own_are_inputs(monkeypatch, tmp_path):
    class LocalDownload:
        def __init__(self, path):
            self._path = path

        def path(self, force=True):
            assert not force
            return self._path

    class Wrapped:
        def __init__(self, base):
            self._base = base

    Wrapped.__module__ = "ir_datasets.util"
    docs, queries = tmp_path / "docs.tsv", tmp_path / "queries.tsv"
    docs.write_text("p\ttext\n")
    handlers = {
        "docs": SimpleNamespace(_docs_dlc=Wrapped(LocalDownload(docs))),
        "queries": SimpleNamespace(_dlc=LocalDownload(queries)),
        "qrels": SimpleNamespace(_qrels_dlc=object()),  # fetched by the library
    }
    dataset = SimpleNamespace(**{f"{k}_handler": lambda v=v: v for k, v in handlers.items()})
    library = SimpleNamespace(
        load={"own": dataset}.__getitem__, util=SimpleNamespace(LocalDownload=LocalDownload)
    )
    monkeypatch.setitem(sys.modules, "ir_datasets", library)
    collection = IrDatasetsCollection("own", (("test", "own"),))
    assert collection.inputs(["test"]) == {"own docs 1": docs, "own queries 1": None}
    assert IrDatasetsCollection("unknown").inputs() == {}
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    assert collection.inputs(["test"]) == {}
