"""One writer at a time in a MODEL_DIR; readers do not wait.

The writer holds a record lock (fcntl) on the file `.lock` in the folder, which says who holds it.
The operating system frees the lock when the process ends, however it ends, so that a dead writer
blocks nobody. NFS passes such locks on to its server; on a file system without locks a warning says
so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

FILE = ".lock"
PATIENCE = 1.0  # seconds that a writer waits for a lock; a reader may hold it for a moment
_PAUSE = 0.05
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # errors of a folder that cannot be written
_HELD_BY_OTHERS = (errno.EAGAIN, errno.EACCES)

# Closing any descriptor of a file frees all locks that the process has on it. So while a lock file
# is held, this module does not open it a second time.
_held: dict[Path, IO[str] | None] = {}
_new: set[Path] = set()  # the held folders that were created for the lock


class Locked(ValueError):
    """Another process writes into the folder."""


def take(folder: str | Path) -> None:
    """Makes this process the only writer of a folder until `release` or the end of the process.

    The folder is created if it is absent. Nothing happens where this process is the writer already,
    or where the folder cannot be written anyway. Raises Locked naming the process that holds it.
    """
    place = Path(folder).resolve()
    if place in _held:
        return
    if new := not place.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    try:
        file = _locked(place)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return
    _held[place] = file
    if new:
        _new.add(place)
    if file is not None:
        file.truncate(0)
        json.dump(_this_process(), file)
        file.flush()


def release(folder: str | Path) -> None:
    """Lets other processes write again; nothing happens where this one does not hold the folder.

    A folder that `take` created is removed if nothing was written into it.
    """
    place = Path(folder).resolve()
    file = _held.pop(place, None)
    if file is not None:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        file.close()
    if place in _new:
        _new.remove(place)
        with contextlib.suppress(OSError):
            place.rmdir()


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """A context in which this process holds a folder, which is released afterwards."""
    take(folder)
    try:
        yield
    finally:
        release(folder)


def holder(folder: str | Path) -> str:
    """The process that writes into the folder, such as "process 12 on host since ... (command)".

    Blank where none does, or where that cannot be found out.
    """
    place = Path(folder).resolve()
    if place in _held:
        return "this process"
    try:
        with (place / FILE).open(encoding="utf-8") as file:
            if _try(file, shared=True):
                return ""
            return _described(file.read())
    except OSError:
        return ""


def _locked(place: Path) -> IO[str] | None:
    """The lock file, opened and locked; None where its file system has no locks.

    A writer removes the file before it frees the lock. So the locked file may not be in the folder
    any more, and then the lock of the file that is there is tried.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            file = (place / FILE).open("a+", encoding="utf-8")
        except PermissionError:
            if not os.access(place, os.W_OK):
                raise
            _take_over(place)
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)
            continue
        try:
            if _try(file) and _is_at(file, place / FILE):
                return file
        except OSError as error:
            file.close()
            logger.warning(
                "MODEL_DIR %s cannot be locked (%s): let no second command write there meanwhile",
                place,
                error.strerror or error,
            )
            return None
        file.seek(0)
        said = file.read()
        file.close()
        if time.monotonic() > deadline:
            raise _locked_by(place, _described(said))
        time.sleep(_PAUSE)


def _take_over(place: Path) -> None:
    """Removes the lock file of a dead writer of another user, which this user may not write into.

    Raises Locked where that writer lives, or where that cannot be found out.
    """
    lock, writer = place / FILE, holder(place)
    if not writer and os.access(lock, os.R_OK):
        with contextlib.suppress(PermissionError):
            lock.unlink(missing_ok=True)
    if lock.exists():
        raise _locked_by(place, writer or "a process of another user")


def _locked_by(place: Path, writer: str) -> Locked:
    """The error for a locked folder.

    Some file servers keep the lock of a host that is gone, so for a writer on another host the
    message says which file to remove.
    """
    here = f" on {socket.gethostname()} since " in writer
    gone = "" if here else f"; if it has ended, remove {place / FILE}"
    return Locked(
        f"MODEL_DIR {place} is being written by {writer}. Wait for it, stop it, or give another "
        f"--model_dir{gone}"
    )


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try(file: IO[str], *, shared: bool = False) -> bool:
    """Whether the lock of an open file was obtained. Raises OSError where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _try_region(file)
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_OTHERS:
            return False
        raise
    return True


def _try_region(file: IO[str]) -> bool:
    """`_try` with the locks of Windows, on a byte beyond the text of the file."""
    import msvcrt

    file.seek(1 << 20)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        file.seek(0)
    return True


def _this_process() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": " ".join(shlex.join(sys.orig_argv).split())[:400],
    }


def _described(text: str) -> str:
    try:
        it = json.loads(text)
        return f"process {it['process']} on {it['host']} since {it['since']} ({it['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
