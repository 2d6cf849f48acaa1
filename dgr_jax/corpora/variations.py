"""Questions as people type them: with slips of the fingers, and without some of their words."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora.types import Query

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_BESIDE = {
    key: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _ROWS for i, key in enumerate(row)
}
_SHORTEST = 4  # letters of a word that is mistyped; shorter ones seldom are, and change their sense


@dataclass(frozen=True)
class Variation:
    """How the questions of an evaluation differ from those that were asked.

    typos: chance of each word of four characters or more to have a slip at a character between its
      first and last one: it is swapped with the next, left out, doubled, or replaced by a key
      beside it, each as likely.
    dropped: chance of each word to be left out; one is always kept.
    seed: a question is varied by it and by its id, whatever questions there are beside.
    """

    typos: float = 0.0
    dropped: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(
            self, typos=ranges.between(0, 1), dropped=ranges.between(0, 1), seed=ranges.SEED
        )

    def of(self, query: Query) -> Query:
        """The varied question. Words are divided by spaces, and joined by single ones."""
        if not self.typos and not self.dropped:
            return query
        digest = hashlib.sha256(f"{self.seed} {query.qid}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        words = query.text.split()
        chances, kept = random.random((2, len(words))), random.integers(max(1, len(words)))
        words = [
            slipped(word, random) if typed < self.typos and len(word) >= _SHORTEST else word
            for place, (word, typed, left_out) in enumerate(zip(words, *chances, strict=True))
            if left_out >= self.dropped or place == kept
        ]
        return replace(query, text=" ".join(words))


def slipped(word: str, random: np.random.Generator) -> str:
    """A word of three characters or more with one slip between its first and last one."""
    at = int(random.integers(1, len(word) - 1))
    before, here, after = word[:at], word[at], word[at + 1 :]
    near = _BESIDE.get(here.lower(), "")
    kind = random.integers(4 if near else 3)
    if kind == 0:
        return before + after[0] + here + after[1:]
    if kind == 1:
        return before + after
    if kind == 2:
        return before + here + here + after
    return before + near[random.integers(len(near))] + after
