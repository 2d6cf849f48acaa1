"""One token a passage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax.identifiers.table import IdentifierTable

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore


@dataclass(frozen=True)
class Atomic:
    """A token of its own for every passage (Tay et al. 2022, unstructured atomic identifiers)."""

    def build(
        self,
        store: PassageStore,
        *,
        encode: Callable[[str], list[int]],
        first_code_id: int,
        seed: int,
    ) -> IdentifierTable:
        """Rows int32 [P, 1]: first_code_id + passage index."""
        del encode, seed
        if len(store) == 0:
            raise ValueError("the corpus has no passages to number")
        rows = np.arange(first_code_id, first_code_id + len(store), dtype=np.int32)[:, None]
        table = IdentifierTable.from_rows(rows, view="atomic", num_code_tokens=len(store))
        return table.require_docids()
