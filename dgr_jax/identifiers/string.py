"""Passage numbers as identifiers, written digit by digit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax.identifiers.table import IdentifierTable

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore


@dataclass(frozen=True)
class NaiveString:
    """The passage index in decimal, zero-padded to one width (Tay et al. 2022, naive strings).

    One code token a digit, the same ten at every position; pids of the corpus do not enter.
    """

    def build(
        self,
        store: PassageStore,
        *,
        encode: Callable[[str], list[int]],
        first_code_id: int,
        seed: int,
    ) -> IdentifierTable:
        """Rows int32 [P, digits of P-1]: first_code_id + digit, the highest digit first."""
        del encode, seed
        if len(store) == 0:
            raise ValueError("the corpus has no passages to number")
        width = len(str(len(store) - 1))
        powers = 10 ** np.arange(width - 1, -1, -1)
        digits = np.arange(len(store))[:, None] // powers % 10
        rows = (first_code_id + digits).astype(np.int32)
        table = IdentifierTable.from_rows(rows, view="string", num_code_tokens=10)
        return table.require_docids()
