"""A MODEL_DIR opened to be asked by many at a time, and exchanged for its next version."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgr_jax.corpora.types import Passage, Scalar
from dgr_jax.model_dir import records
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.retriever import Hit, Retriever

logger = logging.getLogger(__name__)

# Planned search of a query without known words asks the student too; a long one and a short one.
_NO_WORDS = ("zq" * 200, "")
_FILTERS = 16  # filters whose retrievers are kept, for each system


@dataclass(frozen=True)
class Filter:
    """Which passages may be found: those of `pids`, whose pid begins with `pid_prefix`, whose title
    contains `title` (upper and lower case are the same); None: any. metadata: (name, values): those
    with one of these values."""

    pids: frozenset[str] | None = None
    pid_prefix: str | None = None
    title: str | None = None
    metadata: tuple[tuple[str, tuple[Scalar, ...]], ...] = ()

    def admits(self, pid: str) -> bool:
        """Whether a passage of this pid may be found, its title aside."""
        return (self.pids is None or pid in self.pids) and pid.startswith(self.pid_prefix or "")

    def of(self, retriever: Retriever) -> Retriever:
        """The retriever of these passages. Raises ValueError for pids that are not in the corpus,
        metadata that no passage has, and where no passage is left."""
        if self.pids is not None:
            retriever = retriever.restrict(sorted(self.pids))
        if self.title is not None or self.metadata:
            return self._by_contents(retriever)
        if self.pid_prefix is not None:
            return retriever.restrict([pid for pid in retriever.store.pids if self.admits(pid)])
        return retriever

    def _by_contents(self, retriever: Retriever) -> Retriever:
        title, names = (self.title or "").casefold(), set()

        def admits(passage: Passage) -> bool:
            names.update(passage.metadata)
            same = (passage.metadata.get(name) in values for name, values in self.metadata)
            return self.admits(passage.pid) and title in passage.title.casefold() and all(same)

        try:
            return retriever.restrict(admits)
        except ValueError:
            for name, _ in self.metadata:
                if name not in names:
                    known = ", ".join(map(repr, sorted(names))) or "nothing: passages have none"
                    raise ValueError(f"metadata: got {name!r:.80}, expected {known}") from None
            raise


@dataclass
class OpenSystem:
    """A system of a MODEL_DIR: its retriever, and those of some of its passages."""

    retriever: Retriever
    _filtered: OrderedDict[Filter, Retriever] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, wanted: Filter) -> Retriever:
        """The retriever of the wanted passages; the last ones that were asked for are kept."""
        if wanted == Filter():
            return self.retriever
        with self._lock:
            kept = self._filtered.pop(wanted, None) or wanted.of(self.retriever)
            self._filtered[wanted] = kept
            if len(self._filtered) > _FILTERS:
                self._filtered.popitem(last=False)
            return kept


@dataclass(frozen=True)
class Served:
    """All systems of a MODEL_DIR that answer, in one version.

    mark: changes with what MODEL_DIR holds. default: the system that answers where none is named.
    """

    mark: str
    systems: dict[str, OpenSystem]
    default: str

    @classmethod
    def open(
        cls,
        model_dir: Path,
        wanted: Sequence[str] = (),
        sizes: Sequence[int] = (),
        before: Served | None = None,
    ) -> Served:
        """Opens the wanted systems; none named: all that are finished.

        sizes: what the number of queries that are decoded together is padded to. before: the
        version before; parameters that stay are not read again.
        Raises FileNotFoundError where no student is trained, and ValueError for an unknown system.
        """
        mark, untrained = mark_of(model_dir), kinds.untrained(model_dir)
        best = kinds.best_first(model_dir)
        opened: dict[str, OpenSystem] = {}
        for name in wanted or (*untrained, *best):
            old = before.systems.get(name) if before else None
            try:
                if old:
                    retriever = old.retriever.newest()
                else:
                    others = [system.retriever for system in opened.values()]
                    retriever = Retriever.load(model_dir, system=name, beside=others)
            except FileNotFoundError:
                if wanted:
                    raise
                continue  # it is not trained, or not yet
            retriever.decoder.pad_to(sizes)
            same = old if old and retriever is old.retriever else None
            opened[name] = same or OpenSystem(retriever)
        if not opened:
            Retriever.load(model_dir)  # says what is missing
        preferred = (n for n, s in untrained.items() if kinds.settings_of(s).preferred)
        order = (*preferred, *best, *opened)
        return cls(mark, opened, next(name for name in order if name in opened))

    def compile(self, sizes: Iterable[int], goes_on: Callable[[], bool] = lambda: True) -> None:
        """Has every shape compiled that a query can need, as long as it goes on."""
        for opened in self.systems.values():
            retriever = opened.retriever
            for query in (retriever.store[0].contents[:200], *_NO_WORDS):
                for size in sizes:
                    if goes_on():
                        retriever.search([query] * size, 1)


def mark_of(model_dir: Path) -> str:
    """What changes when another version of a student, of an evaluation or of the index is there.

    It is made of the records of the finished stages, wherever they lie while they are made again;
    one that is half made does not count.
    """
    digest = hashlib.sha256()
    names = dict.fromkeys((*kinds.best_first(model_dir), kinds.EVALUATION))
    for name in names:
        with contextlib.suppress(FileNotFoundError, ValueError):
            file = kinds.SYSTEMS if name == kinds.EVALUATION else records.STUDENT
            answering = records.answering(model_dir, (name,), file)
            for folder in (answering.student, answering.prepared):
                digest.update((folder / records.RECORD).read_bytes())
    for current in sorted(model_dir.glob("index/*/current.json")):
        with contextlib.suppress(OSError):
            digest.update(f"{current}".encode() + current.read_bytes())
    return digest.hexdigest()


class Model:
    """A MODEL_DIR by its name: what answers now, and what takes its place.

    wanted, sizes: see `Served.open`. told: hears 'switched' or 'failed' of each new version.
    """

    def __init__(
        self, name: str, model_dir: Path, wanted: Sequence[str], sizes: Sequence[int]
    ) -> None:
        self.name, self.model_dir = name, model_dir
        self._wanted, self._sizes = wanted, sizes
        self.told: Callable[[str], object] = lambda outcome: None
        self.served = Served.open(model_dir, wanted, sizes)
        self.ready = False
        self._refused = ""  # the mark of a version that could not be opened
        self._changing = threading.Lock()
        self._ends = threading.Event()

    def compile(self) -> None:
        """Has every shape compiled; then the model is ready."""
        self.served.compile(self._sizes, self._goes_on)
        self.ready = self._goes_on()

    def end(self) -> None:
        """Has whatever is compiled be the last."""
        self._ends.set()

    def _goes_on(self) -> bool:
        return not self._ends.is_set()

    def renew(self) -> bool:
        """Looks for another version, opens it beside the old one, has it compiled, and exchanges
        them; whether it did. Whoever has begun to ask the old one is answered by it.

        A version that cannot be opened is told of once; the old one goes on.
        """
        with self._changing:
            try:
                mark = mark_of(self.model_dir)
                if mark in (self.served.mark, self._refused):
                    return False
            except (OSError, ValueError):  # a stage changes its place at this moment
                return False
            try:
                served = Served.open(self.model_dir, self._wanted, self._sizes, self.served)
                served.compile(self._sizes, self._goes_on)
            except Exception as error:
                self._refused = mark
                what = f"{type(error).__name__}: {error}"
                logger.warning("%s: the new version does not answer, the old one does: %s",
                               self.model_dir, what)  # fmt: skip
                self.told("failed")
                return False
            self.served, self._refused = served, ""
            logger.info("%s: a new version answers", self.model_dir)
            self.told("switched")
            return True

    def change(self, method: str, argument: Sequence[object]) -> None:
        """Calls `Retriever.add` or `.remove`, and exchanges what answers.

        Raises NotImplementedError where a retriever cannot, and ValueError for what it refuses.
        """
        opened = self.served.systems[self.served.default]
        apart = copy.copy(opened.retriever)  # what is asked now stays as it is
        if not hasattr(apart, method):
            raise NotImplementedError(f"this version cannot {method} passages of an index")
        getattr(apart, method)(argument)
        self.renew()


def search(retriever: Retriever, asked: Sequence[tuple[str, int]]) -> list[list[Hit]]:
    """The hits of (query, k) pairs, searched together."""
    k = max(k for _, k in asked)
    found = retriever.search([query for query, _ in asked], k)
    return [hits[:own] for hits, (_, own) in zip(found, asked, strict=True)]


def explain(retriever: Retriever, query: str, pid: str | None) -> dict[str, Any] | ValueError:
    """What `Retriever.explain` tells, as JSON; the error, where it has one to tell."""
    try:
        return retriever.explain(query, pid).as_json()
    except ValueError as error:
        return error
