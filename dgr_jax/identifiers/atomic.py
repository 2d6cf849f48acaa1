"""One token a passage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dgr_jax import ranges
from dgr_jax.identifiers.scheme import Addition, CorpusSize, Material, Scheme, Sizes, TableSizes
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.settings import unless_default


@dataclass(frozen=True)
class Atomic(Scheme):
    """A token of its own for every passage (Tay et al. 2022, unstructured atomic identifiers).

    reserve: further tokens, for passages that come later (`dgr_jax.update`).
    """

    reserve: int = unless_default(0)

    def __post_init__(self) -> None:
        ranges.check(self, reserve=ranges.tokens(0))

    def tables(self, material: Material) -> list[IdentifierTable]:
        """Rows int32 [P, 1]: first_code_id + passage index."""
        count, first = len(material.store), material.first_code_id
        if count == 0:
            raise ValueError("the corpus has no passages to number")
        rows = np.arange(first, first + count, dtype=np.int32)[:, None]
        codes = count + self.reserve
        table = IdentifierTable.from_rows(rows, view="atomic", num_code_tokens=codes)
        return [table.require_docids()]

    def rows(self, addition: Addition) -> np.ndarray:
        """See Scheme: the first tokens of the reserve that no passage has."""
        end = addition.first_code_id + addition.table.num_code_tokens
        free = np.setdiff1d(np.arange(end - self.reserve, end), addition.table.tokens)
        count = len(addition.passages)
        if count > len(free):
            raise ValueError(
                f"Atomic: got {count:,} passages, expected at most {len(free):,}: so many of the "
                f"{self.reserve:,} rows of Atomic.reserve are left; remove some of those that "
                "were added, or prepare and train again with all passages, or with a larger "
                "Atomic.reserve"
            )
        return free[:count, None].astype(np.int32)

    def sizes(self, corpus: CorpusSize) -> Sizes:
        """As many codes as passages, and the reserve."""
        table = TableSizes(corpus.passages, (corpus.passages,))
        return Sizes((table,), codes=corpus.passages + self.reserve)
