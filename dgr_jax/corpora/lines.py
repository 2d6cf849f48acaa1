"""Plain and gzip text, read as numbered lines and written whole or not at all.

Every reader of this package goes through here, so that each of them removes a byte order mark,
reads .gz (recognised by its first bytes, not by its name), reads a bucket as it reads a folder, and
names file, line and byte when a file is not what it should be.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_GZIP_MAGIC = b"\x1f\x8b"
_BUFFER = 1 << 20
# No JSON token that the end of a block can cut (an escape, `-Infinity`) is longer than this.
_LONGEST_CUT_TOKEN = 16


def place(path: str | os.PathLike) -> Path:
    """A file or folder that is read: local, with `~` resolved, or in a bucket (gs://, s3://).

    Raises ModuleNotFoundError naming what to install for a bucket, ValueError for another scheme.
    """
    if not isinstance(path, (str, os.PathLike)):
        return path  # in a bucket, found before
    text = os.fspath(path)
    if "://" not in text:
        return Path(text).expanduser()
    try:
        import upath

        found = upath.UPath(text)
        found.fs  # noqa: B018 - asks for the library of this scheme
    except ImportError as err:
        raise ModuleNotFoundError(
            f"{text}: a bucket needs more libraries ({err}): pip install 'dgr_jax[buckets]'"
        ) from None
    except ValueError:
        raise ValueError(f"{text}: got this scheme, expected gs://, s3:// or a folder") from None
    return found


def error(path: str | os.PathLike, line: int, found: str, expected: str) -> ValueError:
    """The one form of every complaint about a file's contents."""
    return ValueError(f"{path}, line {line}: found {found}; expected {expected}")


def read(path: str | os.PathLike, *, after: int = 0, offset: int = 0) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without its line end) of a UTF-8 file, plain or gzip.

    after, offset: begin after so many lines, at this byte of the text, of a file that is not
    packed: see `places`.

    Lines end at "\\n" or "\\r\\n" only: other separators of Unicode stay in the text.
    Raises ValueError with line and byte offset at invalid UTF-8 and at damaged gzip data.
    """
    line = after
    with _open(path) as handle:
        if offset:
            handle.seek(offset)
        try:
            for line, raw in enumerate(handle, start=after + 1):
                start = len(codecs.BOM_UTF8) if line == 1 and _has_bom(path, raw) else 0
                try:
                    text = raw[start:].decode("utf-8")
                except UnicodeDecodeError as err:
                    at = start + err.start
                    raise _invalid_utf8(path, line, raw[at], at, offset + at) from None
                offset += len(raw)
                yield line, text.removesuffix("\n").removesuffix("\r")
        except (EOFError, gzip.BadGzipFile, zlib.error) as err:
            raise _damaged_gzip(path, line, err) from None


def places(path: str | os.PathLike, every: int) -> list[tuple[int, int, int]]:
    """Cuts a file into runs of `every` lines: (lines before, byte where it begins, its lines).

    A packed file is one run: it can only be read from its beginning.
    """
    found, start, offset, number = [], 0, 0, 0
    with _open(path) as handle:
        packed = isinstance(handle.raw, gzip.GzipFile)
        for number, raw in enumerate(handle, start=1):
            offset += len(raw)
            if number % every == 0 and not packed:
                found.append((number - every, start, every))
                start = offset
    before = len(found) * every
    return found + [(before, start, number - before)] * (number > before)


def json_objects(path: str | os.PathLike, columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSON-lines file; empty lines are passed over.

    `columns` says in words what a line should hold, for the messages. Raises ValueError at a line
    that is not one JSON object.
    """
    for line, text in read(path):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as err:
            found = f"invalid JSON ({err.msg} at character {err.colno})"
            raise error(path, line, found, f"one JSON object with {columns}") from None
        if not isinstance(record, dict):
            found = f"a JSON {type(record).__name__}"
            raise error(path, line, found, f"one JSON object with {columns}")
        yield line, record


def json_array(
    path: str | os.PathLike, *, block: int = 1 << 22, largest: int = 1 << 26
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line where it starts, object) of a file that is one big JSON array of objects.

    Holds about one block of text and one object at a time; an object longer than `largest`
    characters is refused, so that a broken file cannot fill the memory.
    """
    text = _Text(path, block)
    decoder = json.JSONDecoder()
    if text.peek() != "[":
        raise error(path, text.line, repr(text.peek()), "'[' and a JSON array of objects")
    text.skip(1)
    first = True
    while text.peek() != "]":
        if not first:
            if text.peek() != ",":
                raise error(path, text.line, repr(text.peek()), "',' or ']' after an object")
            text.skip(1)
            text.peek()
        first = False
        start = text.line
        yield start, _next_object(text, decoder, largest)
    text.skip(1)
    if text.peek():
        raise error(path, text.line, repr(text.peek()), "nothing after the end of the JSON array")


def csv_rows(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    """Yields (line where it starts, fields) of a tab-separated file with CSV quoting ("" for ")."""
    rows = csv.reader((text + "\n" for _, text in read(path)), delimiter="\t")
    while True:
        line = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as err:
            found = f"a field that cannot be read ({err})"
            raise error(path, line, found, 'tab-separated fields, quoted with "..."') from None
        if fields:
            yield line, fields


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens `path` for bytes, gzip where the name ends in .gz; it appears whole or not at all.

    The bytes go to a temporary file beside it, which takes the name when the block ends and is
    removed when the block fails. The same bytes make the same .gz file at any time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as raw:
            if path.suffix == ".gz":
                packed = gzip.GzipFile("", "wb", 6, raw, mtime=0)
                with packed, io.BufferedWriter(packed, _BUFFER) as handle:
                    yield handle
            else:
                yield raw
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _open(path: str | os.PathLike) -> Iterator[BinaryIO]:
    opened = place(path).open("rb", _BUFFER)
    with opened if hasattr(opened, "peek") else io.BufferedReader(opened, _BUFFER) as raw:
        if raw.peek(2)[:2] == _GZIP_MAGIC:
            with gzip.GzipFile(fileobj=raw) as packed:
                yield io.BufferedReader(packed, _BUFFER)
        else:
            yield raw


def _has_bom(path: str | os.PathLike, start: bytes) -> bool:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise error(path, 1, "a UTF-16 byte order mark", "UTF-8 text")
    return start.startswith(codecs.BOM_UTF8)


def _invalid_utf8(
    path: str | os.PathLike, line: int, byte: int, in_line: int, in_text: int
) -> ValueError:
    found = f"invalid UTF-8 (0x{byte:02x} at byte {in_line} of the line, {in_text} of the text)"
    return error(path, line, found, "UTF-8 text")


def _damaged_gzip(path: str | os.PathLike, line: int, err: Exception) -> ValueError:
    return ValueError(
        f"{path}: found damaged gzip data after line {line} ({err}); "
        f"expected a whole .gz file: fetch or write it again"
    )


class _Text:
    """A window that moves over the text of a file, block by block."""

    def __init__(self, path: str | os.PathLike, block: int):
        self.path = path
        self.line = 1
        self.window = ""
        self.position = 0
        self._blocks = _blocks(path, block)

    def more(self) -> bool:
        """Adds at least as much text as the window still holds; False at the end of the file."""
        rest = [self.window[self.position :]]
        wanted = len(rest[0])
        added = 0
        for block in self._blocks:
            rest.append(block)
            added += len(block)
            if added and added >= wanted:
                break
        self.window, self.position = "".join(rest), 0
        return added > 0

    def skip(self, count: int) -> None:
        """Moves on by `count` characters of the window."""
        self.line += self.window.count("\n", self.position, self.position + count)
        self.position += count

    def peek(self) -> str:
        """The next character that is not white space, "" at the end; white space is passed over."""
        while True:
            end = self.position
            while end < len(self.window) and self.window[end] in " \t\r\n":
                end += 1
            self.skip(end - self.position)
            if self.position < len(self.window):
                return self.window[self.position]
            if not self.more():
                return ""


def _blocks(path: str | os.PathLike, size: int) -> Iterator[str]:
    """The text of a file in blocks of about `size` bytes, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, line_start = 1, 0
    with _open(path) as handle:
        try:
            raw = handle.read(len(codecs.BOM_UTF8)) + handle.read(size)
            offset = len(codecs.BOM_UTF8) if _has_bom(path, raw) else 0
            raw = raw[offset:]
            while raw or decoder.getstate()[0]:
                waiting = decoder.getstate()[0]
                try:
                    yield decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as err:
                    before = (waiting + raw)[: err.start]
                    at = offset - len(waiting) + err.start
                    if b"\n" in before:
                        line += before.count(b"\n")
                        line_start = offset - len(waiting) + before.rfind(b"\n") + 1
                    byte = (waiting + raw)[err.start]
                    raise _invalid_utf8(path, line, byte, at - line_start, at) from None
                if b"\n" in raw:
                    line += raw.count(b"\n")
                    line_start = offset + raw.rfind(b"\n") + 1
                offset += len(raw)
                raw = handle.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as err:
            raise _damaged_gzip(path, line, err) from None


def _next_object(text: _Text, decoder: json.JSONDecoder, largest: int) -> dict[str, Any]:
    """Decodes the object at the window's position, reading on while it is cut by the window."""
    while True:
        try:
            value, end = decoder.raw_decode(text.window, text.position)
            break
        except json.JSONDecodeError as err:
            line = text.line + text.window.count("\n", text.position, err.pos)
            cut = len(text.window) - err.pos < _LONGEST_CUT_TOKEN or "Unterminated" in err.msg
            if cut and len(text.window) - text.position > largest:
                found = f"no end within {largest:,} characters of the object that starts here"
                raise error(text.path, text.line, found, "a JSON array of objects") from None
            if not (cut and text.more()):
                found = f"invalid JSON ({err.msg})"
                raise error(text.path, line, found, "a JSON array of objects") from None
    if not isinstance(value, dict):
        raise error(text.path, text.line, f"a JSON {type(value).__name__}", "a JSON object")
    text.skip(end - text.position)
    return value
