"""Titles as identifiers: several passages of one page share theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax.identifiers.table import EOS_ID, IdentifierTable

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Title:
    """The first `max_tokens` tokens of the title, then EOS; of the text where there is no title."""

    max_tokens: int = 15

    def build(
        self,
        store: PassageStore,
        *,
        encode: Callable[[str], list[int]],
        first_code_id: int,
        seed: int,
    ) -> IdentifierTable:
        """Rows int32 [P, <= max_tokens + 1] in the text vocabulary; nothing is drawn.

        Passages without title and text share the row [EOS].
        """
        del first_code_id, seed
        if self.max_tokens < 1:
            raise ValueError(f"Title.max_tokens = {self.max_tokens}, expected 1 or more")
        if len(store) == 0:
            raise ValueError("the corpus has no passages to take titles from")
        tokens_of = lru_cache(maxsize=65_536)(lambda text: encode(text)[: self.max_tokens])
        rows = np.zeros((len(store), self.max_tokens + 1), np.int32)
        without_title = 0
        for row, passage in zip(rows, store, strict=True):
            title = passage.title.strip()
            without_title += not title
            tokens = tokens_of(title or self._beginning(passage.text))
            row[: len(tokens)] = tokens
            row[len(tokens)] = EOS_ID
        if without_title:
            _log.warning(
                "%d of %d passages have no title; the first words of the text stand for it",
                without_title,
                len(store),
            )
        return IdentifierTable.from_rows(rows, view="title")

    def _beginning(self, text: str) -> str:
        """Words enough for `max_tokens` tokens: a word has at least one."""
        return " ".join(text.split(maxsplit=self.max_tokens)[: self.max_tokens])
