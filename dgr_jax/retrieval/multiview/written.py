"""The identifiers that beam search wrote for queries in one view, on the host.

Axis letters: B queries, M identifiers of a view, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.identifiers.table import IdentifierTable


class Written(NamedTuple):
    """The identifiers that beam search wrote in one view, on the host.

    view: one of VIEWS. tokens: int32 [B, M, T], 0 at padding. log_probs: f32 [B, M], -inf where
    there is no identifier. lo, hi: int64 [B, M], the interval of its occurrences among the suffixes
    of the text or the entries of table.passages.
    """

    view: str
    tokens: np.ndarray
    log_probs: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def written_spans(result: BeamResult) -> Written:
    """All prefixes that a search under a SubstringConstraint kept, as body spans.

    Raises ValueError for a search that did not record them.
    """
    if result.prefixes is None:
        raise ValueError(
            "written_spans: the search kept no prefixes; expected beam_search(record=True)"
        )
    tokens, log_probs, state = jax.device_get(result.prefixes)
    flat = lambda leaf: leaf.reshape(len(leaf), -1, *leaf.shape[3:])
    lo, hi = (flat(leaf).astype(np.int64) for leaf in (state.lo, state.hi))
    return Written("body", flat(tokens), flat(log_probs), lo, hi)


def written_rows(
    view: str, result: BeamResult, rows: np.ndarray, table: IdentifierTable
) -> Written:
    """The rows of a table that a search under its trie gave; rows int [B, M], -1 for none."""
    return table_rows(view, np.asarray(result.tokens), np.asarray(result.log_probs), rows, table)


def table_rows(
    view: str, tokens: np.ndarray, log_probs: np.ndarray, rows: np.ndarray, table: IdentifierTable
) -> Written:
    """Rows of a table int [B, M], -1 for none, as Written. The count of a row is the number of its
    passages."""
    rows = np.asarray(rows)
    known, at = rows >= 0, np.maximum(rows, 0)
    lo, hi = (np.where(known, table.offsets[at + i], 0) for i in (0, 1))
    return Written(view, tokens, np.where(known, log_probs, -np.inf), lo, hi)
