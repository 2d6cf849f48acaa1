"""Passage numbers as identifiers, written digit by digit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dgr_jax import ranges
from dgr_jax.identifiers.scheme import Addition, CorpusSize, Material, Scheme, Sizes, TableSizes
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.settings import unless_default


@dataclass(frozen=True)
class NaiveString(Scheme):
    """The passage index in decimal, zero-padded to one width (Tay et al. 2022, naive strings).

    One code token a digit, the same ten at every position; pids of the corpus do not enter.
    by_position: a digit at another position is another token (Wang et al. 2022).
    reserve: further numbers for which there are digits, for passages that come later
      (`dgr_jax.update`).
    """

    by_position: bool = unless_default(False)
    reserve: int = unless_default(0)

    def __post_init__(self) -> None:
        ranges.check(self, reserve=ranges.at_least(0))

    @property
    def codes_by_position(self) -> bool:
        return self.by_position

    def tables(self, material: Material) -> list[IdentifierTable]:
        """Rows int32 [P, digits of P + reserve - 1]: first_code_id + digit, the highest digit
        first; by position first_code_id + 10 * position + digit."""
        count = len(material.store)
        if count == 0:
            raise ValueError("the corpus has no passages to number")
        width, alphabets = self._digits(count)
        rows = self._rows(np.arange(count), width, material.first_code_id)
        table = IdentifierTable.from_rows(rows, view="string", num_code_tokens=10 * alphabets)
        return [table.require_docids()]

    def rows(self, addition: Addition) -> np.ndarray:
        """See Scheme: the numbers after the highest one, of as many digits."""
        tokens = np.asarray(addition.table.tokens)
        width, count = tokens.shape[1], len(addition.passages)
        digits = (tokens[-1].astype(np.int64) - addition.first_code_id) % 10
        first = int(digits @ 10 ** np.arange(width - 1, -1, -1)) + 1
        if first + count > 10**width:
            raise ValueError(
                f"NaiveString: got {count:,} passages, expected at most {10**width - first:,}: so "
                f"many numbers of {width} digits are left; prepare and train again with all "
                "passages, or with NaiveString.reserve"
            )
        return self._rows(np.arange(first, first + count), width, addition.first_code_id)

    def _rows(self, numbers: np.ndarray, width: int, first_code_id: int) -> np.ndarray:
        """int32 [n, width]: the digits of numbers [n]."""
        digits = numbers[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10
        alphabets = width if self.by_position else 1
        return (first_code_id + 10 * (np.arange(width) % alphabets) + digits).astype(np.int32)

    def sizes(self, corpus: CorpusSize) -> Sizes:
        """Ten choices a digit."""
        width, alphabets = self._digits(corpus.passages)
        return Sizes((TableSizes(corpus.passages, (10,) * width),), codes=10 * alphabets)

    def _digits(self, count: int) -> tuple[int, int]:
        """(digits of every number, alphabets of ten codes)."""
        width = len(str(count + self.reserve - 1))
        return width, width if self.by_position else 1
