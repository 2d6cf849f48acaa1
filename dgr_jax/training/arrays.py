"""Token arrays on disk: one .npy file a feature and a JSON header, in a folder.

Written in one pass in bounded memory, read memory mapped; NumPy only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.model_dir import kept

HEADER = "arrays.json"
FORMAT = 1

Features = dict[str, np.ndarray]


def blocks_of(examples: Iterable[Mapping[str, Any]], size: int = 1024) -> Iterator[Features]:
    """Feature dicts of one example each -> blocks [size or fewer, ...] for `write_arrays`."""
    held: list[Mapping[str, Any]] = []
    for example in examples:
        held.append(example)
        if len(held) == size:
            yield {name: np.stack([features[name] for features in held]) for name in held[0]}
            held = []
    if held:
        yield {name: np.stack([features[name] for features in held]) for name in held[0]}


class _Column:
    """One feature's .npy file, written block by block; its header is completed at the end."""

    def __init__(self, path: Path, first: np.ndarray) -> None:
        self.dtype, self.shape, self.count = first.dtype, first.shape[1:], 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb")
        self._write_header()
        self._start = self._file.tell()

    def _write_header(self) -> None:
        # NumPy pads the header so that the first axis may grow in place.
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, name: str, rows: np.ndarray, start: int) -> None:
        if rows.dtype != self.dtype or rows.shape[1:] != self.shape:
            raise ValueError(
                f"feature {name!r} of examples {start} to {start + len(rows)}: got {rows.dtype} "
                f"{rows.shape[1:]}, expected {self.dtype} {self.shape} as in the first"
            )
        data = np.ascontiguousarray(rows).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.count += len(rows)

    def finish(self) -> dict[str, Any]:
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._start:
            raise RuntimeError("the .npy header grew beyond its padding")
        self.close()
        return {
            "dtype": self.dtype.str,
            "shape": list(self.shape),
            "sha256": self._digest.hexdigest(),
        }

    def close(self) -> None:
        self._file.close()


def write_arrays(folder: str | Path, blocks: Iterable[Mapping[str, np.ndarray]]) -> int:
    """Writes features as .npy files and a header; only one block is in memory.

    The folder appears whole or not at all, and replaces one of the same name.

    Args:
      folder: where.
      blocks: dicts of arrays [n, ...] with equal n and the same names, dtypes and trailing shapes.
        One example at a time: `blocks_of(examples)`.

    Returns the number of examples. Raises ValueError on no examples and on differing blocks.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        count = _write_columns(partial, blocks)
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _write_columns(folder: Path, blocks: Iterable[Mapping[str, np.ndarray]]) -> int:
    columns: dict[str, _Column] = {}
    count = 0
    try:
        for block in blocks:
            rows = {name: np.asarray(values) for name, values in block.items()}
            if not columns:
                columns = {name: _Column(folder / f"{name}.npy", a) for name, a in rows.items()}
            if rows.keys() != columns.keys() or len({len(a) for a in rows.values()}) != 1:
                got = ", ".join(f"{name} of shape {list(a.shape)}" for name, a in rows.items())
                raise ValueError(
                    f"block from example {count}: got {got}; expected {', '.join(sorted(columns))} "
                    "with equally many rows"
                )
            for name, values in rows.items():
                columns[name].append(name, values, count)
            count += len(next(iter(rows.values())))
        if not count:
            raise ValueError(f"{folder.name}: got no examples, expected at least one")
        features = {name: column.finish() for name, column in columns.items()}
    finally:
        for column in columns.values():
            column.close()
    header = {"format": FORMAT, "count": count, "features": features}
    (folder / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
    return count


def read_arrays(folder: str | Path, *, verify: bool = False) -> Features:
    """Memory-mapped features of a folder that `write_arrays` made.

    Args:
      verify: also compare the data with their checksums, which reads them all.

    Raises FileNotFoundError or ValueError (kept.Damaged) when the folder is not whole, or a file of
    it not as it was written.
    """
    folder = Path(folder)
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the header of exported token arrays")
    header = kept.read_json(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: got format {header.get('format')!r}, expected {FORMAT}")
    with kept.reading(path):
        described = {
            name: (np.dtype(of["dtype"]), (header["count"], *of["shape"]), of["sha256"])
            for name, of in header["features"].items()
        }
    features = {}
    for name, (dtype, shape, sha256) in described.items():
        array = _map(folder / f"{name}.npy", dtype, shape)
        if verify and hashlib.sha256(array.tobytes()).hexdigest() != sha256:
            raise kept.Damaged(
                folder / f"{name}.npy", f"its data differ from the checksum in {HEADER}"
            )
        features[name] = array
    return features


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    with kept.reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{path}: got {array.dtype} {array.shape}, expected {dtype} {shape}; export again"
        )
    return array
