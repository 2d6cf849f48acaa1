"""Damages one line of a small file of every reader (of one in ten, the whole file) and reads it.

    python tests/campaigns/reader_fuzz.py --lines=20000 [--seed=0] [--reader=NAME]

A reader must either give what a plain parser of our own gives, or raise ValueError that names the
file and the damaged line. Everything else is counted and shown: silent errors (other records, or
records where there are none), vague errors (no file, no line, or another line) and tracebacks (any
other exception). Exit status 1 where there are any. About a minute for 20,000 lines.
"""

from __future__ import annotations

import argparse
import ast
import collections
import csv
import gzip
import io
import json
import logging
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dgr_jax.corpora import trec
from dgr_jax.corpora.beir import BeirCollection
from dgr_jax.corpora.dpr import DprCollection
from dgr_jax.corpora.msmarco import MsmarcoCollection
from dgr_jax.data.examples import pseudo_queries
from dgr_jax.identifiers.embeddings import load_vectors
from dgr_jax.serving import ask
from dgr_jax.teaching import teachers

LINES = 6
WORDS = ("honey", "Bienenstock", "naïve", "日本語", "a\u00a0b", 'say "so"', "[1, 2]", "x\\y", "")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


@dataclass(frozen=True)
class Reader:
    """name: of the file. lines: the number of a row and a random -> a valid row, without line end.
    head: rows before. read: folder -> list of comparable records; plain: the text -> the same."""

    name: str
    lines: Callable[[int, random.Random], str]
    read: Callable[[Path], list]
    plain: Callable[[str], list]
    head: tuple[str, ...] = ()
    row_over_lines: bool = False


def words(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 4))) + " end"


# What the plain parsers share.


def right_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("no id")
    value = str(value)
    if not value or " " in value or CONTROL.search(value):
        raise ValueError("no id")
    return value


def right_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("no text")
    return re.sub("[\ud800-\udfff]", "\ufffd", str(value))


def physical(text: str) -> list[str]:
    rows = [row.removesuffix("\r") for row in text.removesuffix("\n").split("\n")]
    return [row for row in rows if row.strip()]


def unique(records: list, key: Callable = lambda record: record[0]) -> list:
    if len({key(record) for record in records}) != len(records) or not records:
        raise ValueError("an id twice, or nothing")
    return records


def columns(row: str, *counts: int) -> list[str]:
    fields = [field for field in re.split("[ \t]+", row) if field]
    if len(fields) not in counts or any(CONTROL.search(field) for field in fields):
        raise ValueError("columns")
    return fields


def whole(text: str) -> int:
    if not re.fullmatch(r"[-+]?[0-9]+", text) or abs(int(text[:4000])) > 10**6:
        raise ValueError("no grade")
    return int(text)


def finite(text: str) -> float:
    if not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        raise ValueError("no score")
    if not np.isfinite(float(text)):
        raise ValueError("no score")
    return float(text)


def plain_json(text: str, *fields: str) -> list:
    records = []
    for row in physical(text):
        record = json.loads(row)
        optional = [right_text(record[f] if record.get(f) is not None else "") for f in fields]
        records.append((right_id(record["_id"]), right_text(record["text"]), *optional))
    return unique(records)


def plain_pairs(text: str, ids: bool = True) -> list:
    records = []
    for row in physical(text):
        key, value = row.split("\t")
        records.append((right_id(key), value))
    return unique(records)


def plain_qrels(text: str) -> list:
    rows = [columns(row, 2, 3, 4) for row in physical(text)]
    if rows and rows[0][-1].lower() in ("score", "relevance", "rel", "label", "corpus-id", "pid"):
        rows = rows[1:]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("columns")
    return [
        (row[0], row[2] if len(row) == 4 else row[1], 1 if len(row) == 2 else whole(row[-1]))
        for row in rows
    ]


def plain_run(text: str, width: int) -> list:
    rows = [columns(row, width) for row in physical(text)]
    if width == 3 and rows and rows[0][2].lower() == "score":
        rows = rows[1:]
    run: dict[str, dict[str, float]] = {}
    for row in rows:
        pid, score = (row[2], row[4]) if width == 6 else (row[1], row[2])
        if width == 6 and not re.fullmatch(r"[-+]?[0-9]+", row[3]):
            raise ValueError("no rank")
        if pid in run.setdefault(row[0], {}):
            raise ValueError("a passage twice")
        run[row[0]][pid] = finite(score)
    return [(q, sorted(scores.items(), key=lambda x: (-x[1], x[0]))) for q, scores in run.items()]


def read_run(lists: Any) -> list:
    return [(one.qid, [(p.pid, p.score) for p in one.passages]) for one in lists]


def csv_rows(text: str, count: int) -> list[list[str]]:
    csv.field_size_limit(1 << 28)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t", strict=True) if row]
    if any(len(row) != count or any("\n" in f and "\t" in f for f in row) for row in rows):
        raise ValueError("columns")
    return rows


def quoted(*fields: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator="").writerow(fields)
    return out.getvalue()


def plain_passages(text: str) -> list:
    head, *rows = csv_rows(text, 3)
    if head != ["id", "text", "title"]:
        raise ValueError("no header")
    return unique([(right_id(row[0]), *row[1:]) for row in rows])


def plain_questions(text: str) -> list:
    records = []
    for question, answers in csv_rows(text, 2):
        try:
            value = json.loads(answers)
        except ValueError:
            value = ast.literal_eval(answers)
        if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
            raise ValueError("no answers")
        records.append((question, tuple(value)))
    if not records:
        raise ValueError("nothing")
    return records


def plain_judged(text: str) -> list:
    records = []
    for number, record in enumerate(json.loads(text), start=1):
        grades: dict[str, int] = {}
        for passage in record["positive_ctxs"]:
            key = "passage_id" if "passage_id" in passage else "psg_id"
            grade = 2 if passage.get("score") == 1000 else 1
            pid = right_id(passage[key])
            grades[pid] = max(grade, grades.get(pid, 0))
        records += [(f"train-{number}", pid, grade) for pid, grade in grades.items()]
    return records


def plain_asked(text: str) -> list:
    rows = physical(text)
    if rows and rows[0].lstrip().startswith("{"):
        records = plain_json(text)
    else:
        records = [(right_id(row.split("\t")[0]), row.split("\t", 1)[1]) for row in rows]
    if not all(value.strip() for _, value in records):
        raise ValueError("blank")
    return unique(records)


def plain_pseudo(text: str) -> list:
    found = []
    for row in text.removesuffix("\n").split("\n"):
        pid, value = row.removesuffix("\r").split("\t", 1)
        if not value.strip():
            raise ValueError("blank")
        if pid in {f"p{i}" for i in range(LINES)}:
            found.append((int(pid[1:]), value.strip()))
    return found


# Valid rows.


def passage_json(i: int, draw: random.Random) -> str:
    record = {"_id": f"p{i}", "title": draw.choice(WORDS), "text": words(draw)}
    if draw.random() < 0.3:
        record["_id"], record["metadata"] = i, {"n": [1, {"x": 0.5}]}
    return json.dumps(record, ensure_ascii=draw.random() < 0.5)


def query_json(i: int, draw: random.Random) -> str:
    record = {"_id": f"q{i}", "text": words(draw), "metadata": {"answers": ["a", "b"]}}
    return json.dumps(record, ensure_ascii=False)


def judged_json(i: int, draw: random.Random) -> str:
    positives = [{"passage_id": f"p{i}", "score": draw.choice((1000, 7.5)), "text": words(draw)}]
    record = {"question": words(draw), "answers": ["a"], "positive_ctxs": positives}
    return json.dumps(record) + "," * (i < LINES - 1)


READERS = [
    Reader(
        "corpus.jsonl", passage_json,
        lambda d: [(p.pid, p.text, p.title) for p in BeirCollection(str(d)).passages()],
        lambda text: plain_json(text, "title"),
    ),
    Reader(
        "queries.jsonl", query_json,
        lambda d: [(q.qid, q.text) for q in BeirCollection(str(d)).all_queries()],
        plain_json,
    ),
    Reader(
        "qrels/test.tsv", lambda i, draw: f"q{i}\tp{i}\t{draw.randint(-1, 3)}",
        lambda d: [(q.qid, q.pid, q.relevance) for q in BeirCollection(str(d)).qrels("test")],
        plain_qrels, head=("query-id\tcorpus-id\tscore",),
    ),
    Reader(
        "collection.tsv", lambda i, draw: f"{i}\t{words(draw)}",
        lambda d: [(p.pid, p.text) for p in MsmarcoCollection(str(d)).passages()],
        plain_pairs,
    ),
    Reader(
        "qrels.txt", lambda i, draw: f"q{i} 0 p{i} {draw.randint(0, 3)}",
        lambda d: [(q.qid, q.pid, q.relevance) for q in trec.qrels(d / "qrels.txt")],
        plain_qrels,
    ),
    Reader(
        "run.txt", lambda i, draw: f"q{i // 3} Q0 p{i} {i} {draw.random() * 9 - i} tag",
        lambda d: read_run(trec.runs(d / "run.txt")),
        lambda text: plain_run(text, 6),
    ),
    Reader(
        "scores.tsv", lambda i, draw: f"q{i // 3}\tp{i}\t{draw.random() * 9}",
        lambda d: read_run(trec.scores(d / "scores.tsv")),
        lambda text: plain_run(text, 3),
    ),
    Reader(
        "teacher.txt", lambda i, draw: f"q{i // 3} Q0 p{i} {i} {9 - i} tag",
        lambda d: read_run(teachers._read_run(str(d / "teacher.txt"))),
        lambda text: plain_run(text, 3 if len(physical(text)[0].split()) == 3 else 6),
    ),
    Reader(
        "psgs_w100.tsv", lambda i, draw: quoted(str(i), words(draw), draw.choice(WORDS)),
        lambda d: [(p.pid, p.text, p.title) for p in DprCollection(str(d)).passages()],
        plain_passages, head=("id\ttext\ttitle",), row_over_lines=True,
    ),
    Reader(
        "nq-test.qa.csv",
        lambda i, draw: quoted(words(draw), str(["a", words(draw)])),
        lambda d: [(q.text, q.answers) for q in DprCollection(str(d)).queries("test")],
        plain_questions, row_over_lines=True,
    ),
    Reader(
        "biencoder-nq-train.json", judged_json,
        lambda d: [(q.qid, q.pid, q.relevance) for q in DprCollection(str(d)).qrels("train")],
        plain_judged, head=("[",), row_over_lines=True,
    ),
    Reader(
        "asked.tsv", lambda i, draw: f"q{i}\t{words(draw)}",
        lambda d: list(ask.read_queries(str(d / "asked.tsv")).items()),
        plain_asked,
    ),
    Reader(
        "asked.jsonl", query_json,
        lambda d: list(ask.read_queries(str(d / "asked.jsonl")).items()),
        plain_json,
    ),
    Reader(
        "pseudo.tsv", lambda i, draw: f"p{i}\t{words(draw)}",
        lambda d: list(pseudo_queries(str(d / "pseudo.tsv"), STORE)),
        plain_pseudo,
    ),
    Reader(
        "ids.txt", lambda i, draw: f"q{i} more",
        lambda d: list(teachers._first_column(str(d / "ids.txt"))),
        lambda text: list(dict.fromkeys(
            right_id(row.split()[0]) for row in physical(text)
            if row.split()[0] not in ("query-id", "qid")
        )),
    ),
]  # fmt: skip


class Store:
    """The passages p0, p1 ... as pseudo-queries ask for them."""

    def __contains__(self, pid: str) -> bool:
        return pid in {f"p{i}" for i in range(LINES)}

    def index_of(self, pid: str) -> int:
        return int(pid[1:])


STORE = Store()

INSERTED = (
    b"\x00", b'"', b'""', b"\t", b" ", b"\r", b"\n", b"\x1b[31m", b"\x7f", b"\xc2\x85",
    b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"{", b"[",
    b",", b"'", b"\\", b"NaN", b"-", b"null", b"\xe2\x80\xae", b"\xcc\x81", b"1_0", b"\xd9\xa3",
)  # fmt: skip
REPLACED = (
    b"null", b"true", b"[]", b"{}", b"1", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000,
    b"10000000000000000000", b"-1", b"0x1f", b"1.5", b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"',
    b'"a b"', b'""', b"", b"nan", b"inf", b"1e-400", b"x" * 140_000,
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\s,:\[\]{}]+')


def damaged(line: bytes, draw: random.Random) -> bytes:
    """The line with one to three damages."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(line) + 1)
        kind = draw.randrange(8)
        if kind == 0 and line:
            at = min(at, len(line) - 1)
            line = line[:at] + bytes([line[at] ^ 1 << draw.randrange(8)]) + line[at + 1 :]
        elif kind == 1:
            line = line[:at]
        elif kind == 2:
            line = line[at:]
        elif kind in (3, 4):
            line = line[:at] + draw.choice(INSERTED) + line[at:]
        elif kind in (5, 6) and (tokens := list(_TOKEN.finditer(line))):
            token = draw.choice(tokens)
            line = line[: token.start()] + draw.choice(REPLACED) + line[token.end() :]
        elif kind == 7:
            end = min(len(line), at + draw.randint(1, 20))
            line = line[:at] + line[end:]
    return line


def try_one(reader: Reader, folder: Path, draw: random.Random) -> tuple[str, str, bytes]:
    """("", ...) where all is right, else what is wrong, its description and the damaged line."""
    rows = [reader.lines(i, draw).encode() for i in range(LINES)]
    place = draw.randrange(LINES)
    rows[place] = damaged(rows[place], draw)
    breaks = rows[place].count(b"\n")
    if draw.random() < 0.02:
        rows.insert(place, rows[draw.randrange(LINES)])
    head = [row.encode() for row in reader.head]
    data = b"\n".join([*head, *rows, b"]" if reader.head == ("[",) else b""])
    if draw.random() < 0.1:
        data = b"\xef\xbb\xbf" + data
    path = folder / reader.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data, 1) if draw.random() < 0.2 else data)
    first = len(head) + place + 1
    last = first + breaks + (len(rows) > LINES)
    try:
        got = reader.read(folder)
    except ValueError as error:
        return (*said(str(error), reader, path, first, last), rows[place])
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:200]}", rows[place]
    return (*compared(got, reader, data), rows[place])


def try_file(reader: Reader, folder: Path, draw: random.Random) -> tuple[str, str, bytes]:
    """A whole file that is cut, packed and cut, packed and flipped, empty, or of another encoding:
    right records, or ValueError that names the file."""
    head = [row.encode() for row in reader.head]
    rows = [reader.lines(i, draw).encode() for i in range(LINES)]
    data = b"\n".join([*head, *rows, b"]" if reader.head == ("[",) else b""])
    text = data.decode()
    kind = draw.choice(("cut", "packed", "flipped", "empty", "blank", "utf-16", "utf-32", "cp1252"))
    if kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind in ("packed", "flipped"):
        packed = bytearray(gzip.compress(data))
        if kind == "flipped":
            packed[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
        data = bytes(packed[: draw.randrange(1, len(packed))] if kind == "packed" else packed)
    elif kind in ("empty", "blank"):
        data = b"" if kind == "empty" else b"\n \r\n\n"
    else:
        encoding = kind + draw.choice(("", "-le", "-be")) * (kind != "cp1252")
        data = text.encode(encoding, errors="replace")
        text = data.decode(errors="replace")
    path = folder / reader.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        got = reader.read(folder)
    except ValueError as error:
        right = (
            str(path) in str(error) and "\n" not in str(error) and not CONTROL.search(str(error))
        )
        return ("", "", b"") if right else ("vague", f"{kind}: {str(error)[:200]}", data)
    except Exception as error:
        return "traceback", f"{kind}: {type(error).__name__}: {str(error)[:200]}", data
    if not got and kind in ("empty", "blank"):
        return "", "", b""
    try:
        right = got == reader.plain(text if kind != "cut" else data.decode())
    except Exception:
        right = False
    return ("", "", b"") if right else ("silent", f"{kind}: read as {str(got)[:200]}", data)


def said(message: str, reader: Reader, path: Path, first: int, last: int) -> tuple[str, str]:
    """Whether a message names the file and the damaged line."""
    if len(message) > 2000 or "\n" in message or CONTROL.search(message):
        return "vague", f"long or unprintable: {message[:200]!r}"
    if str(path) not in message:
        return "vague", f"no file: {message[:200]}"
    named = re.search(r"(?:line |:)(\d+)", message.replace(str(path), "", 1))
    everywhere = ("again", "expected at least one", "the file is empty", "has no query")
    if any(words in message for words in everywhere):
        return "", ""
    if not named:
        return "vague", f"no line: {message[:200]}"
    # What a damaged row leaves open is noticed in a later one; a width is that of the first row.
    latest = LINES + 3 if reader.row_over_lines or first <= len(reader.head) + 1 else last
    if not first <= int(named[1]) <= latest:
        return "vague", f"lines {first} to {last} are damaged: {message[:200]}"
    return "", ""


def compared(got: list, reader: Reader, data: bytes) -> tuple[str, str]:
    """Whether the records are those of the plain parser."""
    try:
        expected = reader.plain(data.decode().removeprefix("\ufeff"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError, csv.Error,
            RecursionError, MemoryError) as error:  # fmt: skip
        return "silent", f"read as {str(got)[:150]}, but: {type(error).__name__} {str(error)[:60]}"
    if got != expected:
        return "silent", f"read as {str(got)[:200]}, expected {str(expected)[:200]}"
    return "", ""


def try_vectors(folder: Path, draw: random.Random) -> tuple[str, str, bytes]:
    """A damaged .npy array."""
    path = folder / "vectors.npy"
    np.save(path, np.ones((4, 3), np.float32))
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(128)] ^= 1 << draw.randrange(8)
    data = bytes(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
    path.write_bytes(data)
    try:
        load_vectors(str(path), "FromFile.path")
    except ValueError as error:
        if str(path) not in str(error) or "\n" in str(error):
            return "vague", str(error)[:200], data[:128]
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}", data[:128]
    return "", "", data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="only this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", SyntaxWarning)
    chosen = [r for r in READERS if args.reader in (None, r.name)]
    counts: collections.Counter = collections.Counter()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.lines):
            draw = random.Random(f"{args.seed}:{number}")
            turn = number % (len(chosen) + (args.reader is None))
            if turn == len(chosen):
                name, (wrong, why, line) = "vectors.npy", try_vectors(Path(folder), draw)
            else:
                name = chosen[turn].name
                attempt = try_file if draw.random() < 0.1 else try_one
                wrong, why, line = attempt(chosen[turn], Path(folder), draw)
            counts[wrong] += 1
            if wrong and counts[wrong] <= 20:
                sys.stdout.write(f"{wrong}: {name}, number {number}: {why}\n    {line[:150]!r}\n")
    seconds = time.perf_counter() - begin
    readers = len(chosen) + (args.reader is None)
    sys.stdout.write(
        f"{args.lines:,} lines of {readers} readers in {seconds:.0f} s: "
        + ", ".join(f"{counts[kind]:,} {kind}" for kind in ("silent", "vague", "traceback"))
        + "\n"
    )
    return int(sum(counts.values()) > counts[""])


if __name__ == "__main__":
    sys.exit(main())
