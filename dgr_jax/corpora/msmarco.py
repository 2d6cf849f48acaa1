"""MS MARCO passage ranking: the official tab-separated files as they come, also .gz."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dgr_jax.corpora import checks, lines, trec
from dgr_jax.corpora.types import Collection, Passage, Qrel, Query

_SITE = "https://microsoft.github.io/msmarco/"
_ORIGIN = f"collectionandqueries.tar.gz of {_SITE}"

_FILES = (
    ("train", "queries.train.tsv", "qrels.train.tsv"),
    ("dev", "queries.dev.small.tsv", "qrels.dev.small.tsv"),
    ("dev", "queries.dev.tsv", "qrels.dev.tsv"),
    ("dl19", "msmarco-test2019-queries.tsv", "2019qrels-pass.txt"),
    ("dl20", "msmarco-test2020-queries.tsv", "2020qrels-pass.txt"),
)


@dataclass(frozen=True)
class MsmarcoCollection(Collection):
    """A folder with collection.tsv (pid, text) and the query and qrels files of each split.

    `files` has rows (split, query file, qrels file). Where several rows have the same split, the
    first one counts whose files both exist. Passages have no titles.
    """

    folder: str
    passages_file: str = "collection.tsv"
    files: tuple[tuple[str, str, str], ...] = _FILES

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose files are there, in the order of `files`."""
        return tuple(dict.fromkeys(row[0] for row in self.files if self._is_there(row)))

    def check(self, splits: Iterable[str] = ("train", "dev")) -> None:
        """Raises FileNotFoundError naming every missing file: the corpus and those of `splits`."""
        checks.require(self._root, self._wanted(splits), "MsmarcoCollection.folder and .files")

    def inputs(self, splits: Iterable[str] = ("train", "dev")) -> dict[str, Path | None]:
        """The corpus and the files of `splits`: name -> file, None where it is missing."""
        return checks.locate(self._root, self._wanted(splits))

    def passages(self) -> Iterator[Passage]:
        """All passages in corpus order."""
        return checks.checked(_passages, self._path(self._corpus), "passage")

    def all_queries(self, split: str) -> Iterator[Query]:
        """All queries of a split's query file; many of those of `train` have no judgement."""
        return checks.checked(_texts, self._path(self._sources(split)[0]), "query")

    def queries(self, split: str) -> Iterator[Query]:
        """The queries that have a judgement in the split, in the order of the query file."""
        judged = {qrel.qid for qrel in self.qrels(split)}
        return (query for query in self.all_queries(split) if query.qid in judged)

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The judgements of the split, in any of the forms that `trec.qrels` reads."""
        return trec.qrels(self._path(self._sources(split)[1]))

    @property
    def _root(self) -> Path:
        return lines.place(self.folder)

    @property
    def _corpus(self) -> checks.SourceFile:
        columns = "pid <tab> text, one passage a line, no header, no quotes"
        return checks.SourceFile((self.passages_file,), columns, f"{_ORIGIN}, or collection.tar.gz")

    def _wanted(self, splits: Iterable[str]) -> list[checks.SourceFile]:
        return [self._corpus, *(source for split in splits for source in self._sources(split))]

    def _sources(self, split: str) -> tuple[checks.SourceFile, checks.SourceFile]:
        """The query and qrels files of a split: the first pair that exists, else the first row."""
        rows = [row for row in self.files if row[0] == split]
        if not rows:
            known = ", ".join(dict.fromkeys(row[0] for row in self.files))
            raise ValueError(
                f"found no split {split!r}; expected one of {known} (gin: MsmarcoCollection.files)"
            )
        _, queries, qrels = next(filter(self._is_there, rows), rows[0])
        return _queries(queries), _qrels(qrels)

    def _is_there(self, row: tuple[str, str, str]) -> bool:
        sources = _queries(row[1]), _qrels(row[2])
        return all(source.find(self._root) for source in sources)

    def _path(self, source: checks.SourceFile) -> Path:
        return source.require(self._root, "MsmarcoCollection.folder")


def _queries(name: str) -> checks.SourceFile:
    origin = f"{_ORIGIN} or queries.tar.gz"
    if name.startswith("msmarco-test"):
        origin = f"{name}.gz of {_SITE} (TREC Deep Learning)"
    return checks.SourceFile((name,), "qid <tab> text, one query a line, no header", origin)


def _qrels(name: str) -> checks.SourceFile:
    origin = f"{_ORIGIN} or {name} itself"
    if "qrels-pass" in name:
        origin = f"https://trec.nist.gov/data/deep/{name}"
    return checks.SourceFile((name,), "qid 0 pid relevance, by tabs or spaces, no header", origin)


def _passages(path: Path) -> Iterator[tuple[int, Passage]]:
    return ((line, Passage(*fields)) for line, fields in _pairs(path, "pid", "passage"))


def _texts(path: Path) -> Iterator[tuple[int, Query]]:
    return ((line, Query(*fields)) for line, fields in _pairs(path, "qid", "query"))


def _pairs(path: Path, key: str, kind: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line, (id, text)) of a two-column file of passages or queries, its `kind`."""
    for line, text in lines.read(path):
        if not text:
            continue
        fields = text.split("\t")
        if len(fields) != 2:
            columns = "1 column" if len(fields) == 1 else f"{len(fields)} columns"
            got = f"{columns} ({text[:60]!r})"
            raise lines.error(path, line, got, f"2 columns, {key} and text, separated by a tab")
        if not checks.header(path, line, fields, kind):
            yield line, (fields[0], fields[1])
