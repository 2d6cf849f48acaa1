"""A corpus on disk: one JSON line for each passage, and the byte where each line begins.

passages.jsonl   {"pid": ..., "title": ..., "text": ...}, in corpus order; where there is any, also
                 "metadata": {name: value, ...}
pids.txt         the pids alone, one a line, to load them fast
offsets.npy      int64 [P+1], byte offsets into passages.jsonl; written last: a folder without it,
                 or where it does not fit passages.jsonl, is not taken for a store
queries.jsonl    where training queries are known: {"pid": ..., "queries": [...]} of every passage
                 that is a positive of some
"""

from __future__ import annotations

import json
import mmap
import operator
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.corpora import lines
from dgr_jax.corpora.types import Passage
from dgr_jax.model_dir import kept

_PASSAGES, _PIDS, _OFFSETS = "passages.jsonl", "pids.txt", "offsets.npy"
QUERIES = "queries.jsonl"
_encode = json.JSONEncoder(ensure_ascii=False).encode


class PassageStore:
    """The passages of a store by passage index, memory-mapped; safe to share between threads.

    before: folder of the store that this one was made of, whose training queries stand where none
      were kept here.
    Raises FileNotFoundError where a file of the store is missing, ValueError where the files do not
    fit each other, and kept.Damaged where one was changed since it was written.
    """

    def __init__(self, folder: str | os.PathLike, before: str | os.PathLike | None = None):
        self.folder, self._before = Path(folder), before
        missing = [n for n in (_PASSAGES, _PIDS, _OFFSETS) if not (self.folder / n).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} is not a whole passage store, it lacks {', '.join(missing)}; "
                f"expected what dgr_jax.corpora.store.write makes"
            )
        for name in (_PASSAGES, _PIDS):
            kept.opened(self.folder / name)
        with kept.reading(self.folder / _OFFSETS) as file:
            self._offsets = np.load(file, mmap_mode="r", allow_pickle=False)
        if self._offsets.dtype != np.int64 or self._offsets.ndim != 1 or len(self._offsets) < 2:
            shape = f"{self._offsets.dtype} {list(self._offsets.shape)}"
            raise ValueError(
                f"{self.folder / _OFFSETS}: found {shape}; expected int64 [P+1], P > 0"
            )
        size, expected = (self.folder / _PASSAGES).stat().st_size, int(self._offsets[-1])
        if size != expected:
            raise ValueError(
                f"{self.folder / _PASSAGES}: found {size:,} bytes; expected {expected:,} as in "
                f"{_OFFSETS}: write the store again"
            )

    def __reduce__(self):
        return PassageStore, (self.folder, self._before)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Passage:
        """The passage of a passage index; a negative one counts from the end, as in a list."""
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"passage index {row} of a store of {len(self):,} passages")
        row %= len(self)
        return self._passage(self._bytes[int(self._offsets[row]) : int(self._offsets[row + 1])])

    def __iter__(self) -> Iterator[Passage]:
        with open(self.folder / _PASSAGES, "rb") as handle:
            yield from map(self._passage, handle)

    def _passage(self, line: bytes) -> Passage:
        try:
            return Passage(**json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise kept.Damaged(
                self.folder / _PASSAGES, f"has a line that is no passage ({error})"
            ) from error

    @cached_property
    def pids(self) -> list[str]:
        """The pid of every passage index."""
        with kept.reading(self.folder / _PIDS) as file:
            text = file.read_bytes().decode("utf-8")
        pids = text.removesuffix("\n").split("\n")
        if len(pids) != len(self):
            raise ValueError(
                f"{self.folder / _PIDS}: found {len(pids):,} pids; expected {len(self):,} as in "
                f"{_OFFSETS}: write the store again"
            )
        return pids

    def pid_of(self, index: int) -> str:
        """The pid of a passage index."""
        return self.pids[index]

    def __contains__(self, pid: object) -> bool:
        """Whether the store has a passage of this pid."""
        return pid in self._rows

    def index_of(self, pid: str) -> int:
        """The passage index of a pid; KeyError naming it when the store has no such passage."""
        try:
            return self._rows[pid]
        except KeyError:
            raise KeyError(f"pid {pid!r} is not in the passage store {self.folder}") from None

    @cached_property
    def queries(self) -> dict[str, list[str]] | None:
        """pid -> the training queries of which the passage is a positive, of those that have some;
        None where they were not kept."""
        path = self.folder / QUERIES
        if self._before is not None and not path.is_file():
            path = Path(self._before) / QUERIES
        if not path.is_file():
            return None
        with kept.reading(path), open(path, "rb") as handle:
            records = map(json.loads, handle)
            return {record["pid"]: list(map(str, record["queries"])) for record in records}

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {pid: row for row, pid in enumerate(self.pids)}

    @cached_property
    def _bytes(self) -> mmap.mmap:
        with open(self.folder / _PASSAGES, "rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def write(passages: Iterable[Passage], folder: str | os.PathLike) -> PassageStore:
    """Writes passages in their order and returns their store; keeps pids and offsets in memory.

    An older store in the folder stays whole until the last passage was read. Raises ValueError for
    duplicate pids, pids that are empty or hold a line end, and a corpus without passages.
    """
    folder = Path(folder)
    pids: list[str] = []
    offsets = array("q", [0])
    with lines.writing(folder / _PASSAGES) as handle:
        for passage in passages:
            line = _line(passage)
            handle.write(line)
            pids.append(passage.pid)
            offsets.append(offsets[-1] + len(line))
        _check_pids(pids)
        for name in (_OFFSETS, QUERIES):
            (folder / name).unlink(missing_ok=True)
    _write_places(folder, pids, np.frombuffer(offsets, np.int64))
    return PassageStore(folder)


def write_queries(queries: Mapping[str, Sequence[str]], folder: str | os.PathLike) -> None:
    """Writes what `PassageStore.queries` reads: pid -> queries."""
    with lines.writing(Path(folder) / QUERIES) as handle:
        for pid, texts in queries.items():
            handle.write(_encode({"pid": pid, "queries": list(texts)}).encode() + b"\n")


def write_changed(
    old: PassageStore, keep: np.ndarray, added: Iterable[Passage], folder: str | os.PathLike
) -> PassageStore:
    """Writes the passages of a store that stay, bool [P], in their order, and then others; returns
    the new store, with the queries of all that are there. Lines are copied as they are. Raises
    ValueError as `write`."""
    folder, lines_added = Path(folder), [(passage.pid, _line(passage)) for passage in added]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    sizes = np.concatenate([np.diff(old._offsets)[keep], [len(line) for _, line in lines_added]])
    pids = [pid for pid, stays in zip(old.pids, keep.tolist(), strict=True) if stays]
    pids += [pid for pid, _ in lines_added]
    _check_pids(pids)
    with lines.writing(folder / _PASSAGES) as handle:
        for start, stop in edges.reshape(-1, 2):
            handle.write(memoryview(old._bytes)[old._offsets[start] : old._offsets[stop]])
        handle.writelines(line for _, line in lines_added)
    if old.queries is not None:
        there = set(pids)
        write_queries({p: texts for p, texts in old.queries.items() if p in there}, folder)
    _write_places(folder, pids, np.append(0, np.cumsum(sizes, dtype=np.int64)))
    return PassageStore(folder)


def _write_places(folder: Path, pids: list[str], offsets: np.ndarray) -> None:
    with lines.writing(folder / _PIDS) as handle:
        handle.write("\n".join([*pids, ""]).encode())
    with lines.writing(folder / _OFFSETS) as handle:
        np.save(handle, offsets)


def _line(passage: Passage) -> bytes:
    """One line of passages.jsonl; ValueError for a passage that no line of the store can hold."""
    if not passage.pid or "\n" in passage.pid or "\r" in passage.pid:
        raise ValueError(f"found the pid {passage.pid!r}; expected an id without line ends")
    fields: dict[str, Any] = {"pid": passage.pid, "title": passage.title, "text": passage.text}
    if passage.metadata:
        fields["metadata"] = dict(passage.metadata)
    try:
        return _encode(fields).encode() + b"\n"
    except UnicodeEncodeError as err:
        raise ValueError(
            f"found half of a surrogate pair in the passage {passage.pid!r} ({err}); "
            f"expected text that UTF-8 can hold"
        ) from None


def _check_pids(pids: list[str]) -> None:
    if not pids:
        raise ValueError("found an empty corpus; expected at least one passage")
    if len(set(pids)) == len(pids):
        return
    first: dict[str, int] = {}
    for place, pid in enumerate(pids, start=1):
        if pid in first:
            raise ValueError(
                f"found the pid {pid!r} twice, at the passages {first[pid]:,} and {place:,} of "
                f"the corpus; expected each pid once"
            )
        first[pid] = place
