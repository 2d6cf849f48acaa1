"""Text files, read as numbered lines.

Every reader of this package goes through here, so that each of them removes a byte order mark,
reads .gz, a pipe and a bucket as it reads a file (see `files`), and names file, line and byte when
a file is not what it should be.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

from dgr_jax.corpora import files

place, writing = files.place, files.writing

# A line of more bytes, a JSON object or a quoted field of more characters is taken for a broken
# file, which must not fill the memory.
LONGEST = 1 << 26
# No JSON token that the end of a block can cut (an escape, `-Infinity`) is longer than this.
_LONGEST_CUT_TOKEN = 16
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_QUOTED = 'tab-separated fields, quoted with "..."'


def error(path: str | os.PathLike, line: int, got: str, expected: str) -> ValueError:
    """The one form of every complaint about a file's contents."""
    return ValueError(f"{path}, line {line}: found {got}; expected {expected}")


def shown(value: Any) -> str:
    """The beginning of a value from a file, for a message, with no characters that would control a
    terminal."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def read(path: str | os.PathLike, *, after: int = 0, offset: int = 0) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without its line end) of a UTF-8 file, plain or gzip.

    after, offset: of a file that is not packed, the number of lines to leave out at its beginning,
    and the byte where the next line begins (see `places`).

    Lines end at "\\n" or "\\r\\n" only: other separators of Unicode stay in the text.
    Raises ValueError with line and byte offset at invalid UTF-8 and at damaged gzip data.
    """
    line = after
    with files.reading(path) as handle:
        if offset:
            handle.seek(offset)
        try:
            for line, raw in enumerate(_lines(handle, path, after), start=after + 1):
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


def _lines(handle: BinaryIO, path: str | os.PathLike, after: int = 0) -> Iterator[bytes]:
    """The lines of an opened file; ValueError at one of more than `LONGEST` bytes."""
    for line, raw in enumerate(iter(partial(handle.readline, LONGEST), b""), start=after + 1):
        if len(raw) == LONGEST and not raw.endswith(b"\n"):
            got = f"no end of the line within {LONGEST:,} bytes"
            raise error(path, line, got, "lines of text")
        yield raw


def places(path: str | os.PathLike, every: int) -> list[tuple[int, int, int]]:
    """Cuts a file into runs of `every` lines: (lines before, byte where it begins, its lines).

    A packed file is one run: it can only be read from its beginning.
    """
    runs, start, offset, line = [], 0, 0, 0
    with files.reading(path) as handle:
        packed = isinstance(handle.raw, gzip.GzipFile)
        try:
            for line, raw in enumerate(_lines(handle, path), start=1):
                offset += len(raw)
                if line % every == 0 and not packed:
                    runs.append((line - every, start, every))
                    start = offset
        except (EOFError, gzip.BadGzipFile, zlib.error) as err:
            raise _damaged_gzip(path, line, err) from None
    before = len(runs) * every
    return runs + [(before, start, line - before)] * (line > before)


def json_objects(path: str | os.PathLike, columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSON-lines file; empty lines are passed over.

    `columns` says in words what a line should hold, for the messages. Raises ValueError at a line
    that is not one JSON object.
    """
    for line, text in read(path):
        if not text.strip():
            continue
        try:
            record = parsed(json.loads, text)
        except json.JSONDecodeError as err:
            got = f"invalid JSON ({err.msg} at character {err.colno})"
            raise error(path, line, got, f"one JSON object with {columns}") from None
        except ValueError as err:
            raise error(path, line, str(err), f"one JSON object with {columns}") from None
        if not isinstance(record, dict):
            got = f"a JSON {type(record).__name__}"
            raise error(path, line, got, f"one JSON object with {columns}")
        yield line, record


def parsed(parse: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a JSON parser; ValueError, in words, where the parser gives up."""
    try:
        return parse(*arguments)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except ValueError:
        raise ValueError("a whole number of too many digits") from None


def json_array(
    path: str | os.PathLike, *, block: int = 1 << 22, largest: int = LONGEST
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


def csv_rows(
    path: str | os.PathLike, *, tabs_over_lines: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Yields (line where it starts, fields) of a tab-separated file with CSV quoting ("" for ").

    A field whose quotes hold the end of a line goes on there. Raises ValueError, naming the line
    where the row starts, at a quote that is never closed, at text behind a closing quote and at a
    carriage return outside of quotes.

    tabs_over_lines: False refuses a quoted field that holds both the end of a line and a tab. Such
      a field is a sign of a quote that was never closed, in a file with one row a line: all rows up
      to the next quote become one field.
    """
    rows = read(path)
    for line, text in rows:
        if not text:
            continue
        if '"' not in text and "\r" not in text:
            yield line, text.split("\t")
            continue
        try:
            fields = _unquoted(text)
            while fields is None:
                text = _with_next_quote(text, rows)
                fields = _unquoted(text)
        except ValueError as err:
            raise error(path, line, f"a field that cannot be read ({err})", _QUOTED) from None
        if not tabs_over_lines and any("\n" in field and "\t" in field for field in fields):
            got = f"a field that cannot be read (its quote is not closed: {text[:60]!r} ...)"
            raise error(path, line, got, f"{_QUOTED}, each row on one line")
        yield line, fields


def _unquoted(text: str) -> list[str] | None:
    """The fields of a row, None where a quote is open at its end; ValueError for text behind a
    closing quote."""
    fields, start = [], 0
    while True:
        if text.startswith('"', start):
            end = text.find('"', start + 1)
            while end >= 0 and text.startswith('""', end):
                end = text.find('"', end + 2)
            if end < 0:
                return None
            field, start = text[start + 1 : end].replace('""', '"'), end + 1
            if start < len(text) and text[start] != "\t":
                raise ValueError(f"{text[start : start + 20]!r} behind a closing quote")
        else:
            end = text.find("\t", start)
            end = len(text) if end < 0 else end
            field, start = text[start:end], end
            if "\r" in field:
                raise ValueError("a carriage return outside of quotes")
        fields.append(field)
        if start == len(text):
            return fields
        start += 1


def _with_next_quote(text: str, rows: Iterator[tuple[int, str]]) -> str:
    """The text and the lines after it, up to the first with a quote; ValueError without any."""
    parts, size = [text], len(text)
    for _, following in rows:
        parts.append(following)
        size += len(following) + 1
        if '"' in following:
            return "\n".join(parts)
        if size > LONGEST:
            raise ValueError(f"its quote is not closed within {LONGEST:,} characters")
    raise ValueError("its quote is not closed")


def _has_bom(path: str | os.PathLike, start: bytes) -> bool:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise error(path, 1, "a UTF-16 byte order mark", "UTF-8 text")
    return start.startswith(codecs.BOM_UTF8)


def _invalid_utf8(
    path: str | os.PathLike, line: int, byte: int, in_line: int, in_text: int
) -> ValueError:
    got = f"invalid UTF-8 (0x{byte:02x} at byte {in_line} of the line, {in_text} of the text)"
    return error(path, line, got, "UTF-8 text")


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
            self.skip(_JSON_SPACE.match(self.window, self.position).end() - self.position)
            if self.position < len(self.window):
                return self.window[self.position]
            if not self.more():
                return ""


def _blocks(path: str | os.PathLike, size: int) -> Iterator[str]:
    """The text of a file in blocks of about `size` bytes, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, line_start = 1, 0
    with files.reading(path) as handle:
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
    """Decodes the object at the window's position; reads more text while the window cuts it off."""
    while True:
        try:
            value, end = parsed(decoder.raw_decode, text.window, text.position)
            break
        except json.JSONDecodeError as err:
            line = text.line + text.window.count("\n", text.position, err.pos)
            cut = len(text.window) - err.pos < _LONGEST_CUT_TOKEN or "Unterminated" in err.msg
            if cut and len(text.window) - text.position > largest:
                got = f"no end within {largest:,} characters of the object that starts here"
                raise error(text.path, text.line, got, "a JSON array of objects") from None
            if not (cut and text.more()):
                got = f"invalid JSON ({err.msg})"
                raise error(text.path, line, got, "a JSON array of objects") from None
        except ValueError as err:
            expected = "a JSON array of objects"
            raise error(text.path, text.line, str(err), expected) from None
    if not isinstance(value, dict):
        raise error(text.path, text.line, f"a JSON {type(value).__name__}", "a JSON object")
    text.skip(end - text.position)
    return value
