"""A folder of arrays: a .npy file for each, and a header with the sha256 of every file.

The header is written last, so that an interrupted write leaves none. Arrays are read memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dgr_jax.model_dir import kept


def save(
    folder: str | pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    *,
    kind: str,
    version: int,
    settings: Mapping[str, Any],
) -> None:
    """Writes arrays and then the header, which holds JSON settings too."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "header.json").unlink(missing_ok=True)
    digests = {}
    for name, array in arrays.items():
        written = folder / f"{name}.tmp.npy"
        np.save(written, array)
        digests[name] = _digest(written)
        written.replace(folder / f"{name}.npy")  # these arrays may be a map of the old file
    header = {"format": kind, "version": version, **settings, "sha256": digests}
    (folder / "header.json").write_text(json.dumps(header, indent=1))


def load(
    folder: str | pathlib.Path, *, kind: str, version: int, needed: Mapping[str, Iterable[str]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, header), with large arrays memory-mapped.

    needed: part of the header -> the names that it must have; those of "sha256" are the arrays.

    Raises ValueError naming the file, for a header that is missing, of another format or version,
    or incomplete; and kept.Damaged, for arrays that are missing or were changed.
    """
    folder = pathlib.Path(folder)
    header = _read_header(folder / "header.json", kind, version, needed)
    arrays = {}
    with kept.reading(folder / "header.json"):
        digests = dict(header["sha256"])
    for name, digest in digests.items():
        path = folder / f"{name}.npy"
        if not kept.is_listed(path) and (not path.exists() or _digest(path) != digest):
            state = "differs from its sha256 in header.json" if path.exists() else "is missing"
            raise kept.Damaged(path, f"{state}: the index is damaged; build it again")
        with kept.reading(path):
            mode = "r" if path.stat().st_size > 4096 else None
            arrays[name] = np.load(path, mmap_mode=mode, allow_pickle=False)
    return arrays, header


def _read_header(path, kind, version, needed):
    kept.opened(path)
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        written_kind, written_version = header["format"], header["version"]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not a folder of {kind}") from None
    except kept.UNREADABLE:
        raise kept.Damaged(
            path, f"is not a header of {kind}; expected JSON with a format and a version"
        ) from None
    if (written_kind, written_version) != (kind, version):
        raise ValueError(
            f"{path}: got {written_kind!r} version {written_version}; expected {kind!r} version "
            f"{version}: build the index again"
        )
    for part, names in needed.items():
        if missing := sorted(set(names) - set(header.get(part, ()))):
            raise ValueError(
                f"{path}: {part} lacks {', '.join(missing)}; expected those of version {version}: "
                "build the index again"
            )
    return header


def _digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
