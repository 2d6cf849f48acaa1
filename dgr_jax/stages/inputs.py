"""What stages read from elsewhere: which files, whether they are there, and have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgr_jax.corpora import lines
from dgr_jax.experiments.stage import Stage, fields
from dgr_jax.model_dir.records import read_record
from dgr_jax.settings import paths

LARGE = 64 << 20  # bytes from which a file's contents are not looked at


def named_by(*names: str) -> Callable[[Any], dict[str, str]]:
    """The files that these settings of an experiment name."""
    return lambda experiment: paths(tuple(fields(*names)(experiment).values()))


def of_collection(experiment: Any) -> dict[str, Any]:
    """The files of the collection, and those that it or the settings of the prepare stage name."""
    files = experiment.collection.inputs(experiment.prepare.splits)
    return {"collection": files, **named_by("collection", "prepare")(experiment)}


def check_collection(experiment: Any) -> None:
    """Raises FileNotFoundError where the collection lacks a file."""
    if splits := experiment.prepare.splits:
        experiment.collection.check(splits)
    else:
        next(iter(experiment.collection.passages()))


def signatures(experiment: Any, stage: Stage) -> dict[str, Any]:
    """What the files that a stage reads hold now; of a missing one, what it held when it was read,
    so that MODEL_DIR goes on where the data is not."""
    record = read_record(Path(experiment.model_dir) / stage.name)
    before = record.get("settings", {}).get("files", {})
    signed = {
        name: _signed(read) or before.get(name) for name, read in stage.reads(experiment).items()
    }
    return {name: signature for name, signature in signed.items() if signature}


def missing(experiment: Any, stage: Stage) -> dict[str, str]:
    """Name -> path of the files that the settings of a stage name and that are not there."""
    return {
        name: path
        for name, path in stage.reads(experiment).items()
        if isinstance(path, str) and not lines.place(path).is_file()
    }


def _signed(read: str | Mapping[str, Path | None]) -> dict[str, Any] | None:
    """Tells whether a file, or one of several, has changed; None where it is not there."""
    if isinstance(read, str):
        there = lines.place(read)
        return _signature(there) if there.is_file() else None
    there = {name: path for name, path in read.items() if path}
    whole = len(there) == len(read)
    return {name: _signature(path) for name, path in there.items()} if whole else None


def _signature(path: Path) -> dict[str, Any]:
    """Tells whether a file has changed, wherever it lies."""
    status = path.stat()
    if status.st_size > LARGE:
        return {"bytes": status.st_size, "modified": int(status.st_mtime)}
    with path.open("rb") as file:
        return {"bytes": status.st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
