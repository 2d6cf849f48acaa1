"""Any data set of the ir_datasets library, as a collection. The library is an extra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dgr_jax.corpora import checks, lines
from dgr_jax.corpora.types import Collection, Passage, Qrel, Query


@dataclass(frozen=True)
class IrDatasetsCollection(Collection):
    """`dataset` is the id that holds the passages, `splits` maps a split to the id of its queries.

    A split that is not in `splits` has the id <dataset>/<split>: with dataset="beir/scifact" the
    split "test" is "beir/scifact/test". Where one id holds passages and queries, `splits` names it
    again: dataset="cranfield", splits=(("test", "cranfield"),). The library downloads a data set
    when it is first read.
    """

    dataset: str
    splits: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        rows = self.splits.items() if isinstance(self.splits, Mapping) else self.splits
        object.__setattr__(self, "splits", tuple((split, name) for split, name in rows))

    def check(self, splits: Iterable[str] = ()) -> None:
        """Raises ImportError without the library, and ValueError for an id that it does not know,
        an id without the passages, queries or judgements that are needed, and two splits of one id.
        Looks at no file: the library downloads and checks them."""
        _part(self.dataset, "docs")
        named: dict[str, str] = {}
        for split in splits:
            name = self._id(split)
            if (other := named.setdefault(name, split)) != split:
                raise ValueError(
                    f"IrDatasetsCollection.splits: got {name!r} for {other!r} and for {split!r}, "
                    "expected another id for each: what is learned from would be measured on"
                )
        for split in dict.fromkeys([*dict(self.splits), *splits]):
            _part(self._id(split), "queries")
            _part(self._id(split), "qrels")

    def inputs(self, splits: Iterable[str] = ()) -> dict[str, Path | None]:
        """Name -> file, for the files of the user's own that these ids are read from; None where
        the file is missing. Files that the library downloads are left out, for their contents never
        change. Empty where the library is not installed."""
        wanted = [(self.dataset, "docs")]
        wanted += [(self._id(split), part) for split in splits for part in ("queries", "qrels")]
        return {
            f"{name} {part} {place}": path if path.is_file() else None
            for name, part in wanted
            for place, path in enumerate(_own_files(name, part), start=1)
        }

    def is_here(self) -> bool:
        """Whether the passages can be read without fetching them, as far as the library tells."""
        docs = _part(self.dataset, "docs")
        try:
            path = docs.docs_path(force=False)
        except (AttributeError, TypeError):  # no download is needed, or the library does not tell
            return True
        return path is None or Path(path).exists()

    def passages(self) -> Iterator[Passage]:
        """All documents in the library's order."""
        return _checked(_rows(self.dataset, "docs"), _passage, self.dataset, "passage")

    def queries(self, split: str) -> Iterator[Query]:
        """The queries of a split that have a judgement there, in the library's order."""
        judged = {qrel.qid for qrel in self.qrels(split)}
        return (query for query in self.all_queries(split) if query.qid in judged)

    def all_queries(self, split: str) -> Iterator[Query]:
        """All queries of a split."""
        name = self._id(split)
        return _checked(_rows(name, "queries"), _query, name, "query")

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The judgements of a split."""
        name = self._id(split)
        for place, qrel in enumerate(_rows(name, "qrels")(), start=1):
            qid, pid = (
                checks.checked_id(str(key), Path(name), place, kind)
                for key, kind in ((qrel.query_id, "query"), (qrel.doc_id, "passage"))
            )
            yield Qrel(qid, pid, checks.relevance(str(qrel.relevance), Path(name), place))

    def _id(self, split: str) -> str:
        return dict(self.splits).get(split, f"{self.dataset}/{split}")


def _own_files(name: str, part: str) -> list[Path]:
    """The files that an id's docs, queries or qrels are read from, where a user registered them."""
    try:
        library = _library()
        handler = getattr(library.load(name), f"{part}_handler")()
        kind = library.util.LocalDownload
    except (ImportError, KeyError, AttributeError):
        return []
    files, holders = [], [handler]
    for holder in holders:  # a file may be wrapped, as where it is compressed
        for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
            if isinstance(value, kind):
                files.append(Path(value.path(force=False)))
            elif type(value).__module__.startswith("ir_datasets.") and len(holders) < 10:
                holders.append(value)
    return files


def _library() -> ModuleType:
    try:
        import ir_datasets
    except ImportError as err:
        raise ImportError(
            "IrDatasetsCollection needs the extra 'dgr_jax[irds]': pip install 'dgr_jax[irds]'"
        ) from err
    return ir_datasets


def _part(name: str, part: str) -> Any:
    """The data set of an id that has docs, queries or qrels."""
    library = _library()
    try:
        dataset = library.load(name)
    except KeyError:
        raise ValueError(
            f"found the ir_datasets id {name!r}, which the library does not know; expected one of "
            f"https://ir-datasets.com (gin: IrDatasetsCollection.dataset and .splits)"
        ) from None
    except OSError as err:
        raise _unreadable(name, part, err) from err
    if not getattr(dataset, f"has_{part}")():
        raise ValueError(
            f"found no {part} in the ir_datasets id {name!r}; expected an id that has them "
            f"(gin: IrDatasetsCollection.{'dataset' if part == 'docs' else 'splits'})"
        )
    return dataset


def _rows(name: str, part: str) -> Callable[[], Iterator[Any]]:
    """A function that reads the docs, queries or qrels of an id from the start at each call.

    The library downloads missing files while it is read, and any kind of error may come of it.
    """
    dataset = _part(name, part)

    def rows() -> Iterator[Any]:
        try:
            yield from getattr(dataset, f"{part}_iter")()
        except Exception as err:
            raise _unreadable(name, part, err) from err

    return rows


def _unreadable(name: str, part: str, err: Exception) -> OSError:
    reason = next(iter(str(err).splitlines()), "")[:300]
    return OSError(
        f"the {part} of the ir_datasets id {name!r} cannot be read ({type(err).__name__}: "
        f"{reason}); expected files in the library's folder ($IR_DATASETS_HOME, ~/.ir_datasets) or "
        "a network to fetch them from: without one, copy that folder from a machine that has them"
    )


def _checked(
    records: Callable[[], Iterable[Any]], read: Callable[[Any, str], Any], name: str, kind: str
) -> Iterator[Any]:
    """The records, checked as every reader's are; messages count records in place of lines."""

    def parse(_: Path) -> Iterator[tuple[int, Any]]:
        return enumerate((read(record, name) for record in records()), start=1)

    return checks.checked(parse, Path(name), kind)


def _passage(doc: Any, name: str) -> Passage:
    title = "" if getattr(doc, "text", None) is None else getattr(doc, "title", None) or ""
    if not isinstance(title, str):
        raise ValueError(
            f"found a record of {name!r} with the title {lines.shown(title)}; expected a string"
        )
    return Passage(str(doc.doc_id), _text(doc, name), title)


def _query(query: Any, name: str) -> Query:
    answers = tuple(getattr(query, "answers", None) or ())
    return Query(str(query.query_id), _text(query, name), answers)


def _text(record: Any, name: str) -> str:
    """The text of a record; where it has no such field, what the library itself gives as its text
    (with the title, where there is one)."""
    text = getattr(record, "text", None)
    if text is None and not hasattr(record, "default_text"):
        fields = ", ".join(getattr(record, "_fields", ())) or type(record).__name__
        raise ValueError(
            f"found a record of {name!r} with the fields {fields}; "
            f"expected a field 'text' or a method default_text()"
        )
    text = record.default_text() if text is None else text
    if not isinstance(text, str):
        raise ValueError(
            f"found a record of {name!r} with the text {lines.shown(text)}; expected a string"
        )
    return text
