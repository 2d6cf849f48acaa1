"""Two queries are the same when their words are, whatever their case, spacing and punctuation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import NamedTuple

from dgr_jax.corpora.types import Query
from dgr_jax.corpora.words import UNSEEN


class _Spaces(dict):
    """For str.translate: punctuation, symbols, separators and control characters -> a space."""

    def __missing__(self, code: int) -> int:
        self[code] = 32 if unicodedata.category(chr(code))[0] in "PSZC" else code
        return self[code]


_SPACES = _Spaces()
_UNSEEN = re.compile(f"[{UNSEEN}]")


def normalised(text: str) -> str:
    """The words of a text, case folded (NFKC), with one space between them and without characters
    that no reader sees.

    Two queries are the same when this is equal. A text without a letter, digit or mark stays as it
    is.
    """
    folded = unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).casefold()
    # The folded Turkish dotted capital leaves its dot as a mark.
    folded = unicodedata.normalize("NFKC", folded).replace("i\u0307", "i")
    return " ".join(folded.translate(_SPACES).split()) or text.strip()


class Shared(NamedTuple):
    """Queries of a training split that are test queries too: those with the same qid, and those
    that have only the same text."""

    by_id: frozenset[str]
    by_text: frozenset[str]

    @property
    def qids(self) -> frozenset[str]:
        return self.by_id | self.by_text


def shared(
    queries: Mapping[str, Query], test_qids: Collection[str], test_texts: Collection[str]
) -> Shared:
    """Which of the queries (by qid) are test queries. test_texts are `normalised`."""
    by_id = frozenset(qid for qid in queries if qid in test_qids)
    by_text = frozenset(
        qid
        for qid, query in queries.items()
        if qid not in by_id and normalised(query.text) in test_texts
    )
    return Shared(by_id, by_text)
