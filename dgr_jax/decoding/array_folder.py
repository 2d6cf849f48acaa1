"""A folder of arrays: one .npy file each and a header that names their sha256.

Written so that an interrupted write leaves no header, and read back memory-mapped.
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
    """Writes arrays, and JSON settings into the header, which goes last."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "header.json").unlink(missing_ok=True)
    digests = {}
    for name, array in arrays.items():
        written = folder / f"{name}.tmp.npy"
        np.save(written, array)
        digests[name] = _digest(written)
        written.replace(folder / f"{name}.npy")  # the old file may be mapped by these arrays
    header = {"format": kind, "version": version, **settings, "sha256": digests}
    (folder / "header.json").write_text(json.dumps(header, indent=1))


def load(
    folder: str | pathlib.Path, *, kind: str, version: int, needed: Mapping[str, Iterable[str]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, header), large arrays memory-mapped.

    needed: what parts of the header must name; those of "sha256" are the arrays.

    Raises ValueError that names the file for a header that is missing, foreign, of another version
    or incomplete, and for arrays that are missing or differ from what was written (kept.Damaged).
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
            large = path.stat().st_size > 4096
            arrays[name] = np.load(path, mmap_mode="r" if large else None, allow_pickle=False)
    return arrays, header


def _read_header(path, kind, version, needed):
    kept.opened(path)
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        found = (header["format"], header["version"])
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not a folder of {kind}") from None
    except kept.UNREADABLE:
        raise kept.Damaged(
            path, f"is not a header of {kind}; expected JSON with a format and a version"
        ) from None
    if found != (kind, version):
        raise ValueError(
            f"{path}: got {found[0]!r} version {found[1]}; expected {kind!r} version {version}: "
            "build the index again"
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
