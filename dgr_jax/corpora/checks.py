"""What every reader asks of its input: its files exist, each id comes once, and judgements name
known queries and passages."""

from __future__ import annotations

import functools
import heapq
import logging
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dgr_jax.corpora import lines
from dgr_jax.corpora.types import Passage, Qrel, Query, Scalar

logger = logging.getLogger(__name__)

Record = TypeVar("Record", Passage, Query)

# No id may hold these characters: white space, which separates the columns of qrels and runs,
# control characters, the byte order mark of a file that was appended to another, and half of a
# surrogate pair.
UNFIT_FOR_ID = re.compile("[\x00-\x20\x7f-\x9f\ufeff\ud800-\udfff]")
ID = "an id without white space and control characters"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which UTF-8 cannot hold
# Names of columns, without what stands between their words.
_IDS = frozenset(
    "id qid queryid topicid questionid pid passageid docid docno docidx documentid corpusid".split()
)
_COLUMNS = _IDS | frozenset(
    "text query question topic passage doc document title content contents body sentence score "
    "relevance rel label grade iter iteration querytext passagetext".split()
)
# trec_eval holds an array of all grades up to the highest.
_HIGHEST_GRADE = 1_000_000


@dataclass(frozen=True)
class SourceFile:
    """A file that a collection reads: its possible names, what it holds, where it comes from."""

    names: tuple[str, ...]
    columns: str
    origin: str

    def find(self, folder: Path) -> Path | None:
        """The first of the names, as it is or with .gz, that is a file of the folder."""
        for name in self.names:
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
        return None

    def require(self, folder: Path, setting: str) -> Path:
        """The file, or FileNotFoundError as from `require`."""
        require(folder, [self], setting)
        path = self.find(folder)
        assert path is not None
        return path


def locate(folder: Path, sources: Sequence[SourceFile]) -> dict[str, Path | None]:
    """First name of each source -> its file, None where the folder lacks it."""
    return {source.names[0]: source.find(folder) for source in sources}


def require(folder: Path, sources: Sequence[SourceFile], setting: str) -> None:
    """Raises FileNotFoundError naming every source that the folder lacks.

    `setting` is the gin name of the setting that names the folder, for the message.
    """
    missing = [source for source in sources if source.find(folder) is None]
    if not missing:
        return
    state = "does not exist" if not folder.is_dir() else f"lacks {_count(missing, 'file')}"
    wanted = "\n".join(
        f"  {' or '.join(source.names)} (also as .gz): {source.columns}\n    from {source.origin}"
        for source in missing
    )
    raise FileNotFoundError(
        f"{folder} {state}; expected:\n{wanted}\n"
        f"Put the files there or name another folder (--data_dir, gin: {setting})."
    )


def checked(
    parse: Callable[[Path], Iterator[tuple[int, Record]]], path: Path, kind: str
) -> Iterator[Record]:
    """Yields the records of `parse(path)`, which gives (line number, record), in their order.

    `kind` is "passage" or "query". Raises ValueError at an id that is empty, holds white space
    (which separates the columns of runs and qrels) or a control character, or comes twice, naming
    both lines, and at a file without records. Blank texts are kept; one warning counts them,
    however often the file is read.
    """
    seen: set[str] = set()
    blank, first_blank = 0, 0
    for line, record in parse(path):
        key = checked_id(_key(record), path, line, kind)
        if key in seen:
            first = next(earlier for earlier, other in parse(path) if _key(other) == key)
            repeated = f"the {kind} id {lines.shown(key)} again, first seen on line {first}"
            raise lines.error(path, line, repeated, "each id once")
        seen.add(key)
        if not record.text.strip():
            blank, first_blank = blank + 1, first_blank or line
        yield record
    if not seen:
        plural = "queries" if kind == "query" else "passages"
        raise ValueError(f"{path}: found no {plural}; expected at least one")
    if blank:
        _warn_of_blank(path, _count(range(blank), kind), first_blank)


def is_header(fields: Sequence[str]) -> bool:
    """Whether the columns of a first line hold nothing but names of columns, that of an id first:
    "query-id", "corpus-id", "score", or "qid", "text"."""
    return _column(fields[0]) in _IDS and all(_column(field) in _COLUMNS for field in fields)


def header(path: str | os.PathLike, line: int, fields: Sequence[str], kind: str) -> bool:
    """Whether a line is the header of a file of texts, and so no `kind`. A line of the log tells of
    one, and of a first line that may be one."""
    if line != 1 or _column(fields[0]) not in _IDS:
        return False
    is_one = is_header(fields)
    _tell_of_header(str(path), "\t".join(fields)[:60], kind, is_one)
    return is_one


@functools.cache
def _tell_of_header(path: str, text: str, kind: str, is_one: bool) -> None:
    """Logs the warning once a process for each file."""
    said = f"read as a {kind}; remove the line if it is a header"
    if is_one:
        said = f"passed over as a header, and is no {kind}"
    logger.warning("%s, line 1: %s is %s", path, lines.shown(text), said)


def _column(field: str) -> str:
    """A field as the name of a column stands in _COLUMNS."""
    return re.sub(r"[\W_]+", "", field).lower()


@functools.cache
def _warn_of_blank(path: Path, count: str, first: int) -> None:
    """Logs the warning once a process for each file."""
    logger.warning("%s: %s with blank text, kept; the first on line %d", path, count, first)


def text_field(
    record: dict[str, Any], name: str, path: Path, line: int, default: str | None = None
) -> str:
    """A string of a JSON record; a number becomes its decimal form, null the default.

    Half of a surrogate pair, which no UTF-8 file can hold, becomes U+FFFD. Raises ValueError when
    the field is missing and there is no default, or is neither string nor whole number.
    """
    value = _string(record, name, path, line, default)
    return value if value.isascii() else SURROGATE.sub("\ufffd", value)


def id_field(record: dict[str, Any], name: str, path: Path, line: int, kind: str) -> str:
    """As `text_field`; raises ValueError where the text cannot be the id of a `kind`."""
    return checked_id(_string(record, name, path, line), path, line, kind)


def checked_id(key: str, path: Path, line: int, kind: str) -> str:
    """Returns the id of a `kind` ("passage", "query"); raises ValueError where it cannot be one."""
    if not key or UNFIT_FOR_ID.search(key):
        raise lines.error(path, line, f"the {kind} id {lines.shown(key)}", ID)
    return key


def _string(
    record: dict[str, Any], name: str, path: Path, line: int, default: str | None = None
) -> str:
    value = record.get(name)
    if value is None and default is not None:
        return default
    if name not in record:
        fields = f"the fields {lines.shown(list(record))[1:-1] or 'none'}"
        raise lines.error(path, line, fields, f"a field {name!r}")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise lines.error(path, line, f"{name!r}: {lines.shown(value)}", "a string")
    return value


def text_list(record: dict[str, Any], name: str, path: Path, line: int) -> tuple[str, ...]:
    """The strings of a JSON record's list (or its one string); () when it is missing or null."""
    value = record.get(name)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | None) or not all(isinstance(v, str) for v in value or ()):
        raise lines.error(path, line, f"{name!r}: {lines.shown(value)}", "a list of strings")
    return tuple(SURROGATE.sub("\ufffd", v) for v in value or ())


def metadata_field(record: dict[str, Any]) -> dict[str, Scalar]:
    """The strings, finite numbers and truth values of a JSON record's object `metadata`; what else
    is there is left out."""
    given = record.get("metadata")
    clean = lambda value: SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value
    kept = scalars(given) if isinstance(given, dict) else {}
    return {clean(name): clean(value) for name, value in kept.items()}


def scalars(given: Mapping[str, Any]) -> dict[str, Scalar]:
    """What is a string, a finite number or a truth value."""
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, str | bool | int) or isinstance(value, float) and math.isfinite(value)
    }


def integer(text: str, path: Path, line: int, what: str, most: int = 2**63 - 1) -> int:
    """The whole number in `text`, from -most to most; ValueError names `what` otherwise."""
    digits = text[1:] if text.startswith(("-", "+")) else text
    if not (digits.isascii() and digits.isdigit()):
        raise lines.error(path, line, f"the {what} {lines.shown(text)}", "a whole number")
    digits = digits.lstrip("0")
    if len(digits) > 19 or int(digits or "0") > most:
        too_large = f"the {what} {lines.shown(text)}"
        raise lines.error(path, line, too_large, f"a whole number of at most {most:,}")
    value = int(digits or "0")
    return -value if text.startswith("-") else value


def relevance(text: str, path: Path, line: int) -> int:
    """The grade in `text`; ValueError where it is no whole number, or too high to measure with."""
    return integer(text, path, line, "relevance", _HIGHEST_GRADE)


class CheckedQrels(NamedTuple):
    """Judgements of known queries and passages, and counts of what was left out.

    dropped: the number of judgements that name an unknown query or passage.
    unknown_queries, unknown_passages: the number of different unknown ids among them.
    """

    kept: list[Qrel]
    dropped: int
    unknown_queries: int
    unknown_passages: int


def check_qrels(
    qrels: Iterable[Qrel],
    qids: Container[str],
    pids: Container[str],
    *,
    where: str = "qrels",
    unknown: str = "error",
    setting: str = "",
) -> CheckedQrels:
    """The judgements whose query and passage are known, in their order.

    qids, pids: the known ids, those of the collection. where: the file or split that every message
    begins with. unknown: what becomes of judgements that name unknown queries or passages: "error"
    refuses them, "drop" leaves them out with a warning, as long as at least one judgement stays.
    setting: the name of the setting that `unknown` comes from, "Prepare.unknown_judgements" say.

    Raises ValueError at unknown ids, with up to three examples of each kind, and where `unknown` is
    neither word.
    """
    if unknown not in ("error", "drop"):
        raise ValueError(
            f"{setting or 'check_qrels: unknown'}: got {unknown!r}, expected 'error' or 'drop'"
        )
    kept: list[Qrel] = []
    dropped = 0
    unknown_qids: set[str] = set()
    unknown_pids: set[str] = set()
    for qrel in qrels:
        known_query, known_passage = qrel.qid in qids, qrel.pid in pids
        if known_query and known_passage:
            kept.append(qrel)
            continue
        dropped += 1
        if not known_query:
            unknown_qids.add(qrel.qid)
        if not known_passage:
            unknown_pids.add(qrel.pid)
    if dropped:
        parts = [
            f"{_count(ids, f'unknown {kind} id')} ({', '.join(heapq.nsmallest(3, ids))})"
            for kind, ids in (("query", unknown_qids), ("passage", unknown_pids))
            if ids
        ]
        total = len(kept) + dropped
        complaint = f"{where}: found {dropped:,} of {total:,} judgements with {' and '.join(parts)}"
        if unknown == "error" or not kept:
            hint = f"; {setting} = 'drop' leaves them out" if setting and kept else ""
            raise ValueError(
                f"{complaint}; expected ids of the collection's queries and passages{hint}"
            )
        logger.warning("%s: they are left out", complaint)
    return CheckedQrels(kept, dropped, len(unknown_qids), len(unknown_pids))


def judged_once(
    qrels: Iterable[Qrel],
    *,
    contradictions: str = "last",
    where: str = "qrels",
    setting: str = "",
) -> tuple[list[Qrel], int]:
    """(one judgement for each query and passage, in the order of their first judgements; how many
    judgements were left out because their pair has one already).

    contradictions: which grade counts where a pair has several different ones: the "last" or the
    "highest"; "error" raises ValueError, which counts such pairs and names three of them. The same
    grade given twice is never an error. setting: the name of the setting that `contradictions`
    comes from, for the message.
    """
    judged: dict[tuple[str, str], Qrel] = {}
    contradictory: dict[tuple[str, str], list[int]] = {}
    total = 0
    for qrel in qrels:
        total += 1
        pair = (qrel.qid, qrel.pid)
        before = judged.setdefault(pair, qrel)
        if before.relevance != qrel.relevance:
            contradictory.setdefault(pair, [before.relevance]).append(qrel.relevance)
            if contradictions != "highest" or qrel.relevance > before.relevance:
                judged[pair] = qrel
    if contradictory and contradictions == "error":
        examples = ", ".join(
            f"{qid} {pid}: {' and '.join(map(str, dict.fromkeys(grades)))}"
            for (qid, pid), grades in heapq.nsmallest(3, contradictory.items())
        )
        hint = f", or {setting} = 'last' or 'highest', which decides" if setting else ""
        raise ValueError(
            f"{where}: found {_count(contradictory, 'pair')} of query and passage with different "
            f"grades ({examples}); expected one grade for each{hint}"
        )
    return list(judged.values()), total - len(judged)


def _key(record: Passage | Query) -> str:
    return record.pid if isinstance(record, Passage) else record.qid


def _count(things: Any, noun: str) -> str:
    count = len(things)
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun}"
