"""Whether a text holds an answer, by the rules of DPR (Karpukhin et al. 2020)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache

from dgr_jax.corpora.words import UNSPACED, marks


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the text holds the words of one of the answers, one directly after the other.

    Text and answers are decomposed (Unicode NFD), lower-cased and cut by `tokenize`, so that case
    and spacing do not matter but accents and punctuation do.
    """
    text = _normalize(text)
    # Cutting a text is slow, so answers with a word that is no substring of it are left out before.
    wanted = [words for answer in answers if (words := _answer_words(answer))]
    wanted = [words for words in wanted if all(word in text for word in words)]
    if not wanted:
        return False
    tokens = tokenize(text)
    return any(
        tuple(tokens[i : i + len(words)]) == words
        for words in wanted
        for i in range(len(tokens) - len(words) + 1)
    )


def tokenize(text: str) -> list[str]:
    """Runs of letters, digits and combining marks, and every other visible character by itself; in
    scripts without spaces between words, every character with its marks."""
    tokens = _token_pattern().findall(text)
    return [t for t in tokens if len(t) > 1 or unicodedata.category(t)[0] != "C"]


@cache
def _token_pattern() -> re.Pattern[str]:
    # [^\W_] is exactly Unicode's letters and numbers, \S all but separators and some controls.
    return re.compile(rf"[{UNSPACED}][{marks()}]*|(?:[^\W_{UNSPACED}]|[{marks()}])+|\S")


@lru_cache(maxsize=1024)
def _answer_words(answer: str) -> tuple[str, ...]:
    return tuple(tokenize(_normalize(answer)))


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFD", text).lower()
