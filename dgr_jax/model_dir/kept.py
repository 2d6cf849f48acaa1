"""Whether files are as they were written: sizes and hashes, compared when a file is opened.

A finished folder has a list of its files: `files_made` in the stage.json of a stage, or a
files_made.json of its own (a checkpoint, the runs of a system). Sizes are compared at every opening
and contents once: a file with the size and the times of change of an earlier check is not read
again. Checks are remembered in the process and, for large files where MODEL_DIR can be written, in
MODEL_DIR/checked.json. A file that no list names is opened without a check.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgr_jax.model_dir.places import RECORD, model_dir_of, stage_of

logger = logging.getLogger(__name__)

KEY = "files_made"
MANIFEST = "files_made.json"
MEMORY = "checked.json"
# Files of a stage that no list names: they are added later, or nothing reads them once it is done.
APART = (RECORD, "runs", "tfds", "tensorboard")
UNFINISHED = (
    "*.partial*",
    "*.part",
    "*.tmp.npy",
    "*.old-*",
    "*.damaged*",
    "*checkpoint-tmp*",
    ".nfs*",
)
LARGE = 1 << 20  # bytes from which the check of a file is remembered in MODEL_DIR
HUGE = 4 << 30  # bytes from which a check takes so long that it is logged
_JUST_CHANGED = 100_000_000  # nanoseconds within which two changes may get the same time

# The errors that reading a file with wrong contents raises.
UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, RuntimeError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip

Listed = dict[str, dict[str, Any]]
_Look = tuple[int, int, int, str | None]  # bytes, times of change of contents and of status, sha256


class Damaged(ValueError):
    """A file was changed since it was written. what: the message without the advice."""

    def __init__(self, path: str | os.PathLike, problem: str) -> None:
        self.path = Path(path)
        self.what = f"{path}: {problem}"
        super().__init__(f"{self.what}{_advice(self.path)}")


@dataclass(frozen=True)
class _List:
    """A list of the files of its folder."""

    file: Path
    entries: Listed

    @property
    def folder(self) -> Path:
        return self.file.parent


_looks: dict[str, _Look] = {}
_remembered: set[Path] = set()  # MODEL_DIRs whose memory has been read
_lists: dict[Path, tuple[tuple[int, int, int], Listed | None]] = {}
_process = {"reads contents": True}


def leave_contents_to_others() -> None:
    """From now on this process compares sizes alone: another process reads the contents for all."""
    _process["reads contents"] = False


def sign(folder: str | os.PathLike, skip: Sequence[str] = APART) -> Listed:
    """Relative name -> bytes and sha256 of every file in a finished folder.

    skip: names in the folder itself that are left out. Unfinished files are left out everywhere. A
    sub-folder with a manifest of its own is represented by the manifest alone.
    """
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): entry(path)
        for path in sorted(_files(folder))
        if path.relative_to(folder).parts[0] not in skip
    }


def _files(folder: Path, inner: bool = False) -> Iterator[Path]:
    if inner and (folder / MANIFEST).is_file():
        yield folder / MANIFEST
        return
    for path in folder.iterdir():
        if any(fnmatch.fnmatch(path.name, form) for form in UNFINISHED):
            continue
        if path.is_dir():
            yield from _files(path, inner=True)
        elif inner or path.name != MANIFEST:
            yield path


def entry(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Gives a finished folder a list of its own."""
    _write_json(folder / MANIFEST, {KEY: sign(folder, skip=())})


def adopt(written: Path, path: Path) -> None:
    """Gives a new file its final name, after adding it to the manifest of the folder."""
    manifest = path.parent / MANIFEST
    try:
        entries = _read_list(manifest) or {}
    except (FileNotFoundError, Damaged):
        entries = {}
    _write_json(manifest, {KEY: {**entries, path.name: entry(written)}})
    written.replace(path)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
    partial.replace(path)


def opened(path: str | os.PathLike) -> Path:
    """The path of a file; raises Damaged where a list names it and it was changed since then."""
    is_listed(path)
    return Path(path)


def is_listed(path: str | os.PathLike) -> bool:
    """Whether a list names the file; raises Damaged where it does and the file was changed."""
    path = Path(path)
    listed, name = _list_above(path)
    if listed is None or name not in listed.entries:
        return False
    with _memory(listed.folder) as looks:
        looks += _compare(path, listed.entries[name])
    return True


def whole(folder: str | os.PathLike) -> None:
    """Raises Damaged for the first file in a folder, or below it, that its list does not match."""
    folder = Path(folder)
    with _memory(folder) as looks:
        _compare_all(folder, looks)


def _compare_all(folder: Path, looks: list[str]) -> None:
    listed, _ = _list_above(folder / "any")
    if listed is None:
        return
    if listed.file.name == MANIFEST:
        is_listed(listed.file)
    here = os.path.abspath(folder) + os.sep
    for name, written in listed.entries.items():
        path = listed.folder / name
        if os.path.abspath(path).startswith(here):
            looks += _compare(path, written)
            if path.name == MANIFEST and path != listed.file:
                _compare_all(path.parent, looks)


def listed_in(folder: str | os.PathLike) -> list[str]:
    """Names, relative to a folder, of the files in it that the nearest list above names."""
    folder = Path(folder)
    listed, name = _list_above(folder / "any")
    if listed is None:
        return []
    before = name.removesuffix("any")
    return [n.removeprefix(before) for n in listed.entries if n.startswith(before)]


def clear(folder: Path) -> None:
    """Removes the output of a damaged stage, so that it is made again.

    Undamaged checkpoints stay, with the metrics of their run, and training goes on from them. The
    damaged ones are renamed. Files that the stage did not make stay.
    """
    stays: set[str] = set()
    for name in listed_in(folder):
        if not name.endswith(f"/{MANIFEST}"):
            continue
        place = (folder / name).parent
        try:
            whole(place)
            stays |= {name, "metrics.jsonl", "tensorboard"}
        except Damaged:
            set_aside(place)
    for name in listed_in(folder):
        if name not in stays:
            (folder / name).unlink(missing_ok=True)
    for name in set(APART) - {RECORD} - stays:
        _remove(folder / name)
    for place in sorted(folder.rglob("*"), reverse=True):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def set_aside(folder: Path) -> Path:
    """Renames a damaged folder, if it exists, to <name>.damaged, or .damaged.2 ... where that name
    is taken; returns the new path."""
    aside, count = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{folder.name}.damaged.{count}")
    if folder.exists():
        folder.rename(aside)
    return aside


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[Path]:
    """A context with the checked path of a file; in it, errors of wrong contents become Damaged."""
    path = opened(path)
    try:
        yield path
    except Damaged:
        raise
    except FileNotFoundError as error:
        if Path(error.filename or path) != path:
            raise
        raise FileNotFoundError(f"{path}: there is no such file{_advice(path)}") from error
    except UNREADABLE as error:
        said = str(error).strip().splitlines()[:1] or [""]
        raise Damaged(
            path, f"cannot be read ({type(error).__name__}: {said[0][:200]}); truncated or damaged"
        ) from error


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The value in a JSON file. Raises Damaged where it is no JSON, or of another type."""
    with reading(path) as file:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise TypeError(f"got JSON of {type(value).__name__}, expected {kind.__name__}")
        return value


def _list_above(path: Path) -> tuple[_List | None, str]:
    """The nearest list above a file, and the file's name in it."""
    for parent in path.parents:
        manifest, record = parent / MANIFEST, parent / RECORD
        for file in (manifest, record):
            if file == path:
                continue
            try:
                entries = _read_list(file)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if entries is not None:
                return _List(file, entries), path.relative_to(parent).as_posix()
            return None, ""  # a stage that is not done, or that was made before there were lists
    return None, ""


def _read_list(file: Path) -> Listed | None:
    """The entries of a list; None for a stage without one. Raises Damaged for an unreadable
    manifest."""
    status = file.stat()
    mark = (status.st_size, status.st_mtime_ns, status.st_ino)
    if file in _lists and _lists[file][0] == mark:
        return _lists[file][1]
    entries = None
    try:
        entries = json.loads(file.read_text(encoding="utf-8")).get(KEY)
        if entries is None and file.name == MANIFEST:
            raise ValueError(f"got no {KEY}")
        for name, written in (entries or {}).items():
            if not isinstance(written, dict) or not _is_inside(name):
                raise TypeError(f"got {KEY} of another form at {name!r}")
    except UNREADABLE as error:
        if file.name == MANIFEST:
            raise Damaged(file, f"cannot be read ({type(error).__name__}: {error})") from error
        entries = None
    if time.time_ns() - status.st_mtime_ns > _JUST_CHANGED:
        _lists[file] = mark, entries
    return entries


def _is_inside(name: str) -> bool:
    """Whether a name stays in the folder of its list, for `clear` removes what is listed."""
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _compare(path: Path, written: Mapping[str, Any]) -> list[str]:
    """Compares a file with its entry in a list; returns its name if the contents were read.

    Raises Damaged where the two differ.
    """
    size, sha256 = written.get("bytes"), written.get("sha256")
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(path, f"is missing, expected {size} bytes as it was written") from error
    if status.st_size != size:
        raise Damaged(
            path,
            f"got {status.st_size} bytes, expected {size} as it was written; damaged or edited",
        )
    name = os.path.abspath(path)
    look = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256)
    if not _process["reads contents"] or _looks.get(name) == look:
        return []
    if status.st_size >= HUGE:
        logger.info("%s: %.1f GB are compared with what was written", path, status.st_size / 1e9)
    if _digest(path) != sha256:
        raise Damaged(
            path, f"got other contents than the {size} bytes that were written; damaged or edited"
        )
    if time.time_ns() - status.st_ctime_ns < _JUST_CHANGED:
        return []
    _looks[name] = look
    return [name]


def _advice(path: Path) -> str:
    """The end of a message, which says how to make a file of a MODEL_DIR again."""
    folder, stage = model_dir_of(path), stage_of(path)
    if folder is None:
        return ""
    if stage is None:
        command = f"python -m dgr_jax.update --model_dir={folder}"
        return f". `{command} --rollback` goes back to a whole version before, --list names all"
    command, refresh = "train", ""
    if stage.name.startswith("refreshed-"):
        command, refresh = "update", " --refresh"
    with contextlib.suppress(OSError):
        if re.search(rb"^PseudoQueries\.model_dir", (folder / "config.gin").read_bytes(), re.M):
            command = "pseudo_queries"
    # Without a list, which older stages lack, the command would not notice the damage by itself.
    before = "" if _read_list(stage / RECORD) is not None else f"Remove {stage}, then "
    asked = f"python -m dgr_jax.{command} --model_dir={folder}{refresh}"
    return f". {before}`{asked}` makes it again"


@contextlib.contextmanager
def _memory(folder: Path) -> Iterator[list[str]]:
    """A context with a list for the names of checked files; reads the checks that other processes
    remembered in MODEL_DIR, and adds those of large files in the list."""
    place = model_dir_of(folder / "any")
    if place is not None and place not in _remembered:
        _remembered.add(place)
        for name, look in _remembered_in(place).items():
            _looks.setdefault(os.path.abspath(place / name), look)
    names: list[str] = []
    try:
        yield names
    finally:
        large = [name for name in names if _looks[name][0] >= LARGE]
        if large and place is not None:
            news = {os.path.relpath(name, place): _looks[name] for name in large}
            with contextlib.suppress(OSError):
                _write_json(place / MEMORY, {**_remembered_in(place), **news})


def _remembered_in(place: Path) -> dict[str, _Look]:
    """The checks that MODEL_DIR/checked.json holds; none where it cannot be read."""
    try:
        looks = json.loads((place / MEMORY).read_text(encoding="utf-8"))
        return {name: (int(a), int(b), int(c), str(d)) for name, (a, b, c, d) in looks.items()}
    except (OSError, *UNREADABLE):
        return {}
