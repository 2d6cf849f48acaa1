"""A living index: passages that are added and removed after training.

    python -m dgr_jax.update --model_dir=DIR --add=new.jsonl --remove=pids.txt

The students stay as they are. What they read besides their parameters, passages, identifiers,
tries, postings and vectors, is written anew as a version of the index (`model_dir.index_versions`),
in which passages that stay keep their identifiers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dgr_jax.corpora import changes, store
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage
from dgr_jax.model_dir import records
from dgr_jax.model_dir.index_versions import Version, Versions, now
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.living import docids, rows, vectors, views, words
from dgr_jax.retrieval.living.change import Change
from dgr_jax.retrieval.living.incdsi import IncDSI

logger = logging.getLogger(__name__)

DEFAULT = IncDSI()

# What a version has of each kind of system. Each of them writes nothing where it is not used.
PARTS = (docids.write, rows.write, views.write, vectors.write, words.write)


def versions(model_dir: str | Path) -> Versions:
    """The versions of the index of the student that answers.

    Raises FileNotFoundError where none is trained.
    """
    folder = Path(model_dir)
    return Versions.of(folder, records.answering(folder, kinds.best_first(folder)).prepared)


def update(
    versions: Versions,
    added: Iterable[Passage] = (),
    removed: Iterable[str] = (),
    incdsi: IncDSI = DEFAULT,
) -> Version:
    """Makes a version with some passages more, and without others; -> what is said of it.

    A passage whose pid is there replaces the one that was; one that is there as it is changes
    nothing, and where all are, no version is made. incdsi: how the rows of atomic identifiers are
    found. Raises ValueError, and changes nothing, for what `corpora.changes` refuses, a passage
    that can have no identifier, and where no passage is left; writer_lock.Locked where another
    process writes into MODEL_DIR.
    """
    added, removed = changes.check_added(added), changes.check_pids(removed)
    if not added and not removed:
        raise ValueError("got no passages to add and no pids to remove, expected one or more")
    with versions.writing():
        passages = _passages(versions)
        changes.check_known(removed, passages)
        if both := sorted({passage.pid for passage in added} & set(removed)):
            raise ValueError(
                f"pids: got {both[0]!r}, which is among the passages that are added too; expected "
                "it there alone: it replaces the passage that was"
            )
        current, given = versions.current(), len(added)
        added = [passage for passage in added if not _is_there(passage, passages)]
        if len(added) < given:
            logger.info("index: %s passages are there as they are", f"{given - len(added):,}")
        if not added and not removed:
            logger.info("index: version %d stays as it is", current)
            first = Version(0, 0, "", len(passages), 0, 0, versions.identity)
            return versions.about(current) if current else first
        gone = [*removed, *(passage.pid for passage in added if passage.pid in passages)]
        stay = np.ones(len(passages), bool)
        stay[[passages.index_of(pid) for pid in gone]] = False
        return _make(versions, passages, stay, added, incdsi=incdsi)


def _passages(versions: Versions) -> PassageStore:
    """Those that the current version has."""
    folder = versions.at(versions.current()) / "passages"
    return PassageStore(folder, versions.prepared / "passages")


def _is_there(passage: Passage, passages: PassageStore) -> bool:
    return passage.pid in passages and passages[passages.index_of(passage.pid)] == passage


def compact(versions: Versions) -> Version:
    """Makes a version of the same passages, in which all is as if they had always been there, apart
    from identifiers; and removes all other versions: what was removed is then in none."""
    with versions.writing():
        passages = _passages(versions)
        version = _make(versions, passages, np.ones(len(passages), bool), [], renew=True)
        versions.drop(most=1)
        return version


def rollback(versions: Versions) -> int:
    """Makes the version before answer; -> its number."""
    with versions.writing():
        return versions.rollback()


def _make(
    versions: Versions,
    passages: PassageStore,
    stay: np.ndarray,
    added: Sequence[Passage],
    *,
    renew: bool = False,
    incdsi: IncDSI = DEFAULT,
) -> Version:
    start, before = time.perf_counter(), versions.current()
    left, gone = int(np.count_nonzero(stay)), int(np.count_nonzero(~stay))
    if left + len(added) < 2:
        raise ValueError(
            f"pids: got {gone:,} of {len(passages):,} passages, expected two or more to be left"
        )
    number = versions.next(), before, now(), left + len(added), len(added), gone
    version = Version(*number, versions.identity)
    with versions.new(version) as folder:
        store.write_changed(passages, stay, added, folder / "passages")
        change = Change(
            versions.model_dir, versions.prepared, versions.at(before), folder, passages, stay,
            added, renew, incdsi,
        )  # fmt: skip
        for write in PARTS:
            write(change)
    versions.drop()
    logger.info(
        "index: version %d has %s passages (%s added, %s removed), made in %.1f s",
        version.version,
        *(f"{count:,}" for count in (version.passages, version.added, version.removed)),
        time.perf_counter() - start,
    )
    return version
