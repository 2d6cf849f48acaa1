"""The contract of identifier schemes: how passages get identifiers, and how large that becomes.

A further scheme is one file with a frozen dataclass that subclasses `Scheme`, and its name in
`dgr_jax.config.configurables`.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from dgr_jax.corpora.store import PassageStore
    from dgr_jax.corpora.types import Passage
    from dgr_jax.identifiers.table import IdentifierTable

# Of English text and T5's vocabulary, where nothing is counted.
TOKENS_A_WORD = 1.35
TEXT_CHOICES = 2000  # tokens that may stand at a position of a text
TITLE_TOKENS, QUERY_TOKENS = 6, 10  # of a title and of a query, on average


class CorpusSize(NamedTuple):
    """Numbers that are not in the settings: passages, words of each, training queries,
    pseudo-queries a passage, and positives of the training queries (0: one each)."""

    passages: int
    words: float
    queries: int
    pseudo_queries: float
    positives: int = 0

    @property
    def pairs(self) -> int:
        """Training queries, each with one of its positives."""
        return self.positives or self.queries


@dataclass(frozen=True)
class TableSizes:
    """An identifier table before it is made.

    rows: identifiers. levels: how many tokens may stand at each position. closing: whether the end
    of sequence follows. mean_length: tokens of an identifier on average; None: all are as long.
    """

    rows: int
    levels: tuple[int, ...]
    closing: bool = False
    view: str = ""
    mean_length: float | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest identifier."""
        return len(self.levels) + self.closing

    @classmethod
    def of_text(cls, rows: float, most: int, mean: int, view: str = "") -> TableSizes:
        """Of texts cut to `most` tokens, `mean` on average; of a view, after its marker."""
        marker = (1,) if view else ()
        levels, mean_length = (*marker, *[TEXT_CHOICES] * most), len(marker) + min(most, mean) + 1
        return cls(round(rows), levels, closing=True, view=view, mean_length=mean_length)


@dataclass(frozen=True)
class Sizes:
    """What a scheme would make of a corpus, estimated before there is anything.

    tables: one, or one a view. codes: docid codes in the vocabulary. text_tokens: of the text whose
    spans, of span_tokens, are identifiers.
    """

    tables: tuple[TableSizes, ...]
    codes: int = 0
    text_tokens: int = 0
    span_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest identifier."""
        return max([self.span_tokens, *(table.length for table in self.tables)])


class Material(NamedTuple):
    """What identifiers are made of.

    store: the passages. encode: a text -> its tokens. first_code_id: the token of the first docid
    code. marker: a view -> the token that marks it. pseudo_queries: called once -> (passage index,
    text) of each. seed: of everything that is drawn. keep: a folder for what a scheme needs to give
    identifiers to passages that come later; None: there will be none.
    """

    store: PassageStore
    encode: Callable[[str], list[int]]
    first_code_id: int = 0
    marker: Callable[[str], int] = lambda view: 0
    pseudo_queries: Callable[[], Iterable[tuple[int, str]]] = tuple
    seed: int = 0
    keep: Path | None = None


class Addition(NamedTuple):
    """What passages that come later get identifiers from.

    passages: those that come. table: identifiers of the passages that are there, of one view.
    encode, first_code_id: as in Material. kept: the folder `Material.keep` of the prepare stage.
    """

    passages: Sequence[Passage]
    table: IdentifierTable
    encode: Callable[[str], list[int]]
    first_code_id: int
    kept: Path


class Scheme(abc.ABC):
    """How passages get identifiers. Subclasses are frozen dataclasses; their fields are settings.

    views: those that have a marker in the vocabulary, some of 'title', 'body' and 'query'; a
      passage then has many identifiers. (): it has one.
    span_tokens: tokens of an identifier of the view 'body', a span of the text.
    """

    views: tuple[str, ...] = ()
    span_tokens: int = 0

    @property
    def codes_by_position(self) -> bool:
        """Whether a code at another position is another token."""
        return False

    @abc.abstractmethod
    def tables(self, material: Material) -> list[IdentifierTable]:
        """The identifiers of all passages: one table, or one of each view that has a table."""

    @abc.abstractmethod
    def sizes(self, corpus: CorpusSize) -> Sizes:
        """What `tables` would make of a corpus of this size: all plans follow from it."""

    def build(
        self,
        store: PassageStore,
        *,
        encode: Callable[[str], list[int]],
        first_code_id: int = 0,
        seed: int = 0,
    ) -> IdentifierTable:
        """The one table of a scheme by which a passage has one identifier."""
        (table,) = self.tables(Material(store, encode, first_code_id, seed=seed))
        return table

    def rows(self, addition: Addition) -> np.ndarray:
        """int32 [n, T]: an identifier of each passage that comes, padded with 0; 0 at the first
        place where a passage can have none. No token is one that a student has not learned.

        Raises ValueError where there are no identifiers left, or where this scheme has none for
        passages that come later: then all are to be prepared again.
        """
        raise ValueError(
            f"{type(self).__name__} has no identifiers for passages that come later; expected "
            "another scheme (IDENTIFIERS), or prepare and train again with all passages"
        )

    def view_tables(self, material: Material) -> dict[str, IdentifierTable | None]:
        """View -> its table of passages that come later, as one of `tables`, their indices from 0
        on; None where they have no row. For schemes of several views alone."""
        raise NotImplementedError

    def text_tokens(self, material: Material, counts: Counter) -> Iterator[np.ndarray]:
        """int32 [n], the tokens of each passage whose spans are identifiers; `counts` is filled
        while they are read. For schemes of several views alone."""
        raise NotImplementedError
