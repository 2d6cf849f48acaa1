"""One token a passage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dgr_jax.identifiers.scheme import CorpusSize, Material, Scheme, Sizes, TableSizes
from dgr_jax.identifiers.table import IdentifierTable


@dataclass(frozen=True)
class Atomic(Scheme):
    """A token of its own for every passage (Tay et al. 2022, unstructured atomic identifiers)."""

    def tables(self, material: Material) -> list[IdentifierTable]:
        """Rows int32 [P, 1]: first_code_id + passage index."""
        count, first = len(material.store), material.first_code_id
        if count == 0:
            raise ValueError("the corpus has no passages to number")
        rows = np.arange(first, first + count, dtype=np.int32)[:, None]
        table = IdentifierTable.from_rows(rows, view="atomic", num_code_tokens=count)
        return [table.require_docids()]

    def sizes(self, corpus: CorpusSize) -> Sizes:
        """As many codes as passages."""
        return Sizes((TableSizes(corpus.passages, (corpus.passages,)),), codes=corpus.passages)
