"""BEIR folders: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, read and written; also .gz."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgr_jax.corpora import checks, lines, trec
from dgr_jax.corpora.types import Passage, Qrel, Query

_ORIGIN = (
    "a data set of github.com/beir-cellar/beir (<name>.zip, unpacked), "
    "dgr_jax.corpora.beir.write_beir, or any folder of this layout"
)
_CORPUS = checks.SourceFile(
    ("corpus.jsonl",),
    'JSON lines {"_id", "title" (optional), "text", "metadata" (optional)}, one a passage',
    _ORIGIN,
)
_QUERIES = checks.SourceFile(
    ("queries.jsonl",),
    'JSON lines {"_id", "text", "metadata" (optional): {"answers": [...]}}, one a query',
    _ORIGIN,
)
_QREL_COLUMNS = "a header, then query-id, corpus-id, score (a whole number), separated by tabs"


@dataclass(frozen=True)
class BeirCollection:
    """A folder in BEIR layout. Answers come from a query's metadata.answers; of a passage's
    metadata, strings, numbers and truth values are kept."""

    folder: str

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the qrels files, sorted."""
        names = [path.name.removesuffix(".gz") for path in self._root.glob("qrels/*")]
        return tuple(sorted({name[:-4] for name in names if name.endswith(".tsv")}))

    def check(self, splits: Iterable[str] = ()) -> None:
        """Raises FileNotFoundError naming every missing file: corpus, queries, qrels of `splits`.

        Without splits one qrels file of any name is enough.
        """
        wanted = [_CORPUS, _QUERIES, *map(_qrels, splits)]
        if len(wanted) == 2 and not self.splits:
            wanted.append(_qrels("<split>"))
        checks.require(self._root, wanted, "BeirCollection.folder")

    def inputs(self, splits: Iterable[str] = ()) -> dict[str, Path | None]:
        """Name -> file of the corpus, the queries and the qrels of `splits`; None where the file is
        missing. Without splits, the corpus alone."""
        of_splits = [_QUERIES, *map(_qrels, splits)] if splits else []
        return checks.locate(self._root, [_CORPUS, *of_splits])

    def lacking(self, splits: Sequence[str]) -> tuple[str, ...] | None:
        """The names among `splits` that have no qrels; None where the folder has no corpus."""
        if _CORPUS.find(self._root) is None:
            return None
        return tuple(split for split in splits if _qrels(split).find(self._root) is None)

    @property
    def has_queries(self) -> bool:
        """Whether there is a file of queries that is not empty."""
        path = _QUERIES.find(self._root)
        return path is not None and path.stat().st_size > 0

    def passages(self) -> Iterator[Passage]:
        """All passages in corpus order."""
        return checks.checked(_passages, self._path(_CORPUS), "passage")

    def all_queries(self) -> Iterator[Query]:
        """The queries of all splits, in the order of queries.jsonl."""
        return checks.checked(_queries, self._path(_QUERIES), "query")

    def queries(self, split: str) -> Iterator[Query]:
        """The queries that have a judgement in the split, in the order of queries.jsonl."""
        judged = {qrel.qid for qrel in self.qrels(split)}
        return (query for query in self.all_queries() if query.qid in judged)

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The judgements of the split; ValueError names the splits there are."""
        if self.splits and split not in self.splits:
            raise ValueError(
                f"found no split {split!r} in {self._root / 'qrels'}; "
                f"expected one of {', '.join(self.splits)}"
            )
        return trec.qrels(self._path(_qrels(split)))

    @property
    def _root(self) -> Path:
        return lines.place(self.folder)

    def _path(self, source: checks.SourceFile) -> Path:
        return source.require(self._root, "BeirCollection.folder")


def write_beir(
    folder: str | os.PathLike,
    passages: Iterable[Passage] | None,
    queries: Iterable[Query],
    qrels_by_split: Mapping[str, Iterable[Qrel]],
) -> None:
    """Writes a BEIR folder, each file whole or not at all. Answers go to metadata.answers.

    passages: None where they are kept elsewhere; then no corpus.jsonl is written.
    """
    folder = Path(folder)
    if passages is not None:
        with lines.writing(folder / "corpus.jsonl") as handle:
            for passage in passages:
                fields: dict = {"_id": passage.pid, "title": passage.title, "text": passage.text}
                if passage.metadata:
                    fields["metadata"] = dict(passage.metadata)
                handle.write(_json(fields))
    with lines.writing(folder / "queries.jsonl") as handle:
        for query in queries:
            record: dict = {"_id": query.qid, "text": query.text}
            if query.answers:
                record["metadata"] = {"answers": list(query.answers)}
            handle.write(_json(record))
    for split, qrels in qrels_by_split.items():
        with lines.writing(folder / "qrels" / f"{split}.tsv") as handle:
            handle.write(b"query-id\tcorpus-id\tscore\n")
            for qrel in qrels:
                handle.write(f"{qrel.qid}\t{qrel.pid}\t{qrel.relevance}\n".encode())


def _qrels(split: str) -> checks.SourceFile:
    return checks.SourceFile((f"qrels/{split}.tsv",), _QREL_COLUMNS, _ORIGIN)


def _passages(path: Path) -> Iterator[tuple[int, Passage]]:
    for line, record in lines.json_objects(path, "'_id' and 'text'"):
        pid = checks.id_field(record, "_id", path, line, "passage")
        text = checks.text_field(record, "text", path, line)
        title = checks.text_field(record, "title", path, line, default="")
        yield line, Passage(pid, text, title, checks.metadata_field(record))


def _queries(path: Path) -> Iterator[tuple[int, Query]]:
    for line, record in lines.json_objects(path, "'_id' and 'text'"):
        qid = checks.id_field(record, "_id", path, line, "query")
        text = checks.text_field(record, "text", path, line)
        metadata = record.get("metadata")
        answers = ()
        if isinstance(metadata, dict):
            answers = checks.text_list(metadata, "answers", path, line)
        yield line, Query(qid, text, answers)


def _json(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
