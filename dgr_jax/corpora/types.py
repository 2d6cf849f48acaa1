"""The five records that readers yield and writers take, and what a collection offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieval unit. `pid` is the corpus's own id; `text` may be blank. metadata: what else is
    known of it, by which searches can be restricted; no system reads it."""

    pid: str
    text: str
    title: str = ""
    metadata: Mapping[str, Scalar] = field(default_factory=dict, hash=False)

    @property
    def contents(self) -> str:
        """Title and text in one string: what is embedded, indexed and ranked."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True, slots=True)
class Query:
    """A question. `answers` are strings that a right passage contains, where they are known."""

    qid: str
    text: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Qrel:
    """One judgement: `relevance` 0 is judged and not relevant, 1 and more are grades."""

    qid: str
    pid: str
    relevance: int


@dataclass(frozen=True, slots=True)
class ScoredPassage:
    """A passage in a run: higher scores rank first."""

    pid: str
    score: float


@dataclass(frozen=True, slots=True)
class RankList:
    """The passages of one query, best first; scores never increase."""

    qid: str
    passages: tuple[ScoredPassage, ...]


class Collection(Protocol):
    """Passages, queries and judgements from one place, all as streams."""

    def check(self, splits: Iterable[str] = ()) -> None:
        """Raise FileNotFoundError naming every missing file, its columns and how to get it."""

    def inputs(self, splits: Iterable[str] = ()) -> Mapping[str, Path | None]:
        """Name -> file, for the files that `splits` are read from; None where a file is missing.

        Files that come with a library or with this package are left out.
        """

    def lacking(self, splits: Sequence[str]) -> tuple[str, ...] | None:
        """The names among `splits` that have no judgements, as far as the collection can tell; None
        where its files are missing."""
        return ()

    @property
    def has_queries(self) -> bool:
        """Whether there are any queries, as far as the collection can tell."""
        return True

    def passages(self) -> Iterator[Passage]:
        """All passages in corpus order; a second call starts again."""

    def queries(self, split: str) -> Iterator[Query]:
        """The queries of a split."""

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The judgements of a split."""
