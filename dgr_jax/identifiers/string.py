"""Passage numbers as identifiers, written digit by digit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax.identifiers.table import IdentifierTable

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore


@dataclass(frozen=True)
class NaiveString:
    """The passage index in decimal, zero-padded to one width (Tay et al. 2022, naive strings).

    One code token a digit, the same ten at every position; pids of the corpus do not enter.
    by_position: a digit at another position is another token (Wang et al. 2022).
    """

    by_position: bool = field(default=False, metadata={"fingerprint": "unless default"})

    @property
    def codes_by_position(self) -> bool:
        return self.by_position

    def build(
        self,
        store: PassageStore,
        *,
        encode: Callable[[str], list[int]],
        first_code_id: int,
        seed: int,
    ) -> IdentifierTable:
        """Rows int32 [P, digits of P-1]: first_code_id + digit, the highest digit first; by
        position first_code_id + 10 * position + digit."""
        del encode, seed
        if len(store) == 0:
            raise ValueError("the corpus has no passages to number")
        width = len(str(len(store) - 1))
        powers = 10 ** np.arange(width - 1, -1, -1)
        digits = np.arange(len(store))[:, None] // powers % 10
        alphabets = width if self.by_position else 1
        first = first_code_id + 10 * (np.arange(width) % alphabets)
        rows = (first + digits).astype(np.int32)
        table = IdentifierTable.from_rows(rows, view="string", num_code_tokens=10 * alphabets)
        return table.require_docids()
