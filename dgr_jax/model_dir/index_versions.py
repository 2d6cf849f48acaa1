"""Versions of the index of a prepare stage: what passages there are now, beside those of training.

MODEL_DIR/index/IDENTITY/3          a version: what the prepare stage has for readers, changed
MODEL_DIR/index/IDENTITY/current.json   the version that answers; none: the prepare stage, version 0

IDENTITY is that of a prepare stage, so that no student meets identifiers of another one. A version
is written beside the others and then named in current.json, which is replaced as a whole: whoever
is killed leaves the old version or the new one. No stage of an
experiment reads any of this; that of a refreshed student does (`dgr_jax.update --refresh`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dgr_jax.model_dir import kept, writer_lock
from dgr_jax.model_dir.places import INDEX
from dgr_jax.model_dir.records import read_record

logger = logging.getLogger(__name__)

CURRENT, ABOUT = "current.json", "version.json"
MOST = 10  # versions that are kept

# What makes an index one of a student: what its tokens mean, and which passages they named.
_IDENTITY = ("identifiers/", "passages/", "vocabulary.json", "spiece.model", "views.json", "text/")
_APART = "passages/queries.jsonl"  # which came later
_PARTIAL = ".partial"
_threads = threading.Lock()  # the lock of MODEL_DIR is one of the whole process


@dataclass(frozen=True)
class Version:
    """What is said of a version. before: the one that it was made of; made: when.

    passages: all that it has; added and removed: those by which it differs from the one before; of
    a passage that was replaced, both count it.
    """

    version: int
    before: int
    made: str
    passages: int
    added: int
    removed: int
    identity: str


@dataclass(frozen=True)
class Versions:
    """The versions of the index of a prepare stage in the folder `prepared`."""

    model_dir: Path
    prepared: Path
    identity: str

    @classmethod
    def of(cls, model_dir: Path, prepared: Path) -> Versions:
        """Those of a MODEL_DIR, by the prepare stage that a student was trained on."""
        return cls(model_dir, prepared, identity(prepared))

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.model_dir / INDEX / self.identity

    def current(self) -> int:
        """The version that answers."""
        path = self.folder / CURRENT
        if not path.is_file():
            if versions := self._numbers():
                raise kept.Damaged(
                    path,
                    f"is missing, expected it beside {len(versions)} versions of the index to say "
                    "which one answers",
                )
            return 0
        with kept.reading(path):
            return int(kept.read_json(path)["version"])

    def at(self, version: int) -> Path:
        """The folder of a version, which readers open in place of the prepare stage.

        Raises FileNotFoundError where there is none, ValueError for one of another student.
        """
        if version == 0:
            return self.prepared
        folder = self.folder / str(version)
        if self.about(version).identity != self.identity:
            raise ValueError(
                f"{folder}: is an index of another student, expected one of the identifiers of "
                f"{self.prepared}; remove {self.folder}"
            )
        return folder

    def about(self, version: int) -> Version:
        """What is said of a version other than 0."""
        path = self.folder / str(version) / ABOUT
        with kept.reading(path):
            return Version(**kept.read_json(path))

    def all(self) -> list[Version]:
        """The versions that are there, in the order in which they were made; of one whose record
        cannot be read, a line tells."""
        versions = []
        for number in self._numbers():
            try:
                versions.append(self.about(number))
            except kept.Damaged as error:
                logger.warning("%s", error.what)
        return versions

    def _numbers(self) -> list[int]:
        """Those of the versions that are there, in the order in which they were made."""
        names = [path.parent.name for path in self.folder.glob(f"[0-9]*/{ABOUT}")]
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def strangers(self) -> list[Path]:
        """Folders with versions of other identifiers, which no student here reads."""
        return [path.parent for path in (self.model_dir / INDEX).glob(f"*/{CURRENT}")
                if path.parent != self.folder]  # fmt: skip

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which nobody else writes into MODEL_DIR, another thread included.

        Raises writer_lock.Locked naming the process that does.
        """
        with _threads:
            ours = writer_lock.holder(self.model_dir) == "this process"
            writer_lock.take(self.model_dir)
            try:
                yield
            finally:
                if not ours:
                    writer_lock.release(self.model_dir)

    @contextlib.contextmanager
    def new(self, version: Version) -> Iterator[Path]:
        """A context with a new folder; when it ends, what was written there is this version, and
        the one that answers. Where it fails, nothing of it stays.

        Raises OSError that says so where the disk is full.
        """
        partial = self.folder / f"{version.version}{_PARTIAL}"
        current, versions = self.current(), self._numbers()
        if not versions and not current:
            self.switch(0)  # so that versions are never without the file that names one
        whole = {str(version) for version in (*versions, current)}
        for left in self.folder.glob("[0-9]*"):  # of whoever was killed
            if left.name not in whole:
                shutil.rmtree(left)
        try:
            partial.mkdir(parents=True)
            yield partial
            (partial / ABOUT).write_text(json.dumps(asdict(version), indent=1), encoding="utf-8")
            kept.write_manifest(partial)
            partial.rename(self.folder / str(version.version))
            self.switch(version.version)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    f"{self.folder}: the disk is full ({error.strerror}); nothing was changed, "
                    f"version {self.current()} answers as before; --compact of dgr_jax.update, or "
                    "less in MODEL_DIR, makes room"
                ) from error
            raise

    def next(self) -> int:
        """The number of a version that comes."""
        names = [path.name for path in self.folder.glob("[0-9]*")]
        return max([int(name.removesuffix(_PARTIAL)) for name in names], default=0) + 1

    def switch(self, version: int) -> None:
        """Makes a version the one that answers."""
        self.at(version)
        path = self.folder / CURRENT
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{CURRENT}.partial-{os.getpid()}")
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"version": version}, file)
            file.flush()
            os.fsync(file.fileno())  # or a power failure would leave the new name and no contents
        partial.replace(path)

    def rollback(self) -> int:
        """Makes the version before the current one answer or, where damage hides which one that
        is, the newest before it that is whole; -> its number.

        Raises ValueError where there is none, or where it was dropped.
        """
        try:
            current = self.current()
        except kept.Damaged as error:
            logger.warning("%s", error.what)
            return self._newest_whole(self.next())
        if current == 0:
            raise ValueError(
                f"{self.model_dir}: version 0, the prepare stage, answers; expected a later one to "
                "go back from"
            )
        try:
            before = self.about(current).before
        except (kept.Damaged, FileNotFoundError):
            logger.warning("%s: what is said of version %d is lost", self.folder, current)
            return self._newest_whole(current if current in self._numbers() else self.next())
        if before and before not in self._numbers():
            raise ValueError(
                f"{self.model_dir}: version {before}, from which {current} was made, was dropped; "
                f"there are {', '.join(map(str, self._numbers()))}; remove {self.folder} to answer "
                "with the passages of the prepare stage"
            )
        return self._newest_whole(before + 1)

    def _newest_whole(self, end: int) -> int:
        """Makes the newest whole version before `end` answer, or else the prepare stage; -> its
        number."""
        for version in reversed(self._numbers()):
            if version >= end:
                continue
            try:
                kept.whole(self.at(version))
            except ValueError as error:
                logger.warning("%s", getattr(error, "what", error))
            else:
                self.switch(version)
                return version
        self.switch(0)
        return 0

    def copy_current(self, model_dir: Path) -> None:
        """Copies the version that answers into another MODEL_DIR of the same students."""
        if version := self.current():
            target = model_dir / INDEX / self.identity
            shutil.copytree(self.at(version), target / str(version))
            shutil.copyfile(self.folder / CURRENT, target / CURRENT)

    def drop(self, most: int = MOST) -> None:
        """Removes all but the newest `most` versions; the current one stays."""
        current, versions = self.current(), self._numbers()
        for version in [v for v in versions if v != current][: max(0, len(versions) - most)]:
            folder = self.folder / str(version)
            (folder / ABOUT).unlink()  # from here on it is no version
            shutil.rmtree(folder)


def now() -> str:
    """The time, as versions say it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def identity(prepared: Path) -> str:
    """What tells a prepare stage from others: its settings, and the files that give tokens their
    meaning."""
    record = read_record(prepared)
    files = {
        name: entry for name, entry in (record.get(kept.KEY) or {}).items()
        if name.startswith(_IDENTITY) and name != _APART
    }  # fmt: skip
    text = json.dumps([record.get("fingerprint"), files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
