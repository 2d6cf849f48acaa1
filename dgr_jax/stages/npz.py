"""Arrays of many rows, written into one .npz file block by block."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """An array of this dtype and shape, in blocks of its rows."""

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]


def write(path: Path, columns: Mapping[str, Rows]) -> None:
    """What `numpy.savez` writes; one block is in memory."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, (dtype, shape, blocks) in columns.items():
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                rows = 0
                for block in blocks:
                    member.write(np.ascontiguousarray(block, dtype).tobytes())
                    rows += len(block)
            if rows != shape[0]:
                raise RuntimeError(f"{path.name}: got {rows} rows of {name}, expected {shape[0]}")
