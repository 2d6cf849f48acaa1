"""Files of bytes, opened for reading wherever they lie and written whole or not at all.

What is read may be packed with gzip (recognised by its first bytes, not by its name), lie in a
bucket, or be a pipe such as /dev/stdin. What is written is packed where its name ends in .gz.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_GZIP_MAGIC = b"\x1f\x8b"
_BUFFER = 1 << 20
_DESCRIPTOR = re.compile(r"/dev/(?:(std(?:in|out|err))|fd/(\d+))|/proc/self/fd/(\d+)")
_copies: dict[str, str] = {}  # a pipe that is being read -> the file that holds its bytes


def place(path: str | os.PathLike) -> Path:
    """A file or folder that is read: local, with `~` resolved, or in a bucket (gs://, s3://).

    Raises ModuleNotFoundError naming what to install for a bucket, ValueError for another scheme.
    """
    if not isinstance(path, (str, os.PathLike)):
        return path  # a path in a bucket, which an earlier call made
    # Paths in buckets may be Paths too, which os.fspath is not for.
    text = str(path) if isinstance(path, Path) else os.fspath(path)
    if "://" not in text:
        return Path(text).expanduser()
    try:
        import upath

        in_bucket = upath.UPath(text)
        in_bucket.fs  # noqa: B018 - raises ImportError where the library of this scheme is missing
    except ImportError as err:
        raise ModuleNotFoundError(
            f"{text}: a bucket needs more libraries ({err}): pip install 'dgr_jax[buckets]'"
        ) from None
    except ValueError:
        raise ValueError(f"{text}: got this scheme, expected gs://, s3:// or a folder") from None
    return in_bucket


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """Opens `path` to read its bytes, unpacked; where it was packed, `.raw` of the handle is a
    GzipFile."""
    with rereadable(path):
        opened = place(_copies.get(str(path), path)).open("rb", _BUFFER)
        with opened if hasattr(opened, "peek") else io.BufferedReader(opened, _BUFFER) as raw:
            if raw.peek(2)[:2] == _GZIP_MAGIC:
                with gzip.GzipFile(fileobj=raw) as packed:
                    yield io.BufferedReader(packed, _BUFFER)
            else:
                yield raw


@contextmanager
def rereadable(path: str | os.PathLike) -> Iterator[None]:
    """While the block runs, `reading` can open `path` as often as it likes.

    A pipe gives its bytes once: they are kept in a temporary file, which goes with the block.
    """
    name = str(path)
    if name in _copies or not _is_pipe(place(path)):
        yield
        return
    with tempfile.NamedTemporaryFile(prefix="dgr_jax-") as copy:
        with place(path).open("rb") as pipe:
            shutil.copyfileobj(pipe, copy, _BUFFER)
        copy.flush()
        _copies[name] = copy.name
        try:
            yield
        finally:
            del _copies[name]


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens `path` to write bytes, packed where its name ends in .gz; it appears whole or not at
    all.

    The bytes go to a temporary file beside it, which takes the name when the block ends and is
    removed when the block fails. A link stays a link: the file that it leads to is replaced. A
    pipe or a device, such as /dev/stdout, is written to directly. The same bytes make the same .gz
    file at any time.
    """
    with _writing(Path(path)) as raw:
        if Path(path).suffix == ".gz":
            packed = gzip.GzipFile("", "wb", 6, raw, mtime=0)
            with packed, io.BufferedWriter(packed, _BUFFER) as handle:
                yield handle
        else:
            yield raw


@contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    if standing := _DESCRIPTOR.fullmatch(str(path)):
        # Opened by its name it would be cut, or written over from its beginning.
        sys.stdout.flush()
        names = {"stdin": 0, "stdout": 1, "stderr": 2}
        descriptor = names[standing[1]] if standing[1] else int(standing[2] or standing[3])
        with os.fdopen(os.dup(descriptor), "wb") as raw:
            yield raw
        return
    if path.exists() and not path.is_file():
        with open(path, "wb") as raw:
            yield raw
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as raw:
            yield raw
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _is_pipe(path: Path) -> bool:
    """Whether its bytes can be read once only: a pipe, a socket or a terminal."""
    if not isinstance(path, Path) or "://" in str(path):
        return False
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    if stat.S_ISCHR(mode):
        with open(path, "rb", buffering=0) as device:
            return device.isatty()
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
