"""What a plan needs before it is made: its index on disk and in memory, and the time of a query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dgr_jax.corpora.words import sentences as cut_into_sentences

# Of English text, where none is at hand: words that BM25 counts, of all; and distinct ones, of
# passages of 60 to 230 words within a fifth of what was counted in six collections.
_COUNTED, _DISTINCT, _GROWTH = 0.69, 0.8, 0.9
# A vocabulary of so many words times counted words to this power (Heaps 1978).
_VOCABULARY, _HEAPS, _LETTERS = 11.0, 0.6, 6.5
# The same of n-grams of five characters, of all; and their vocabulary beside that of words, within
# a fourth in three collections.
_GRAMS, _COMMON_GRAMS, _MORE_GRAMS = 4.7, 3, 7.0
_SENTENCE = 20.0  # words
_NUMBER, _START = 4, 8  # bytes of an impact or a passage, and of where a word begins
_HEADER = 128  # of an array on disk
_QUERY, _PASSAGE = 1e-4, 4e-9  # seconds of one core, see `benchmarks.planning --plan_only`
_SLOWER = 3  # times that n-grams take, 2.2 for 21,000 passages and 3.2 for 105,000


class PlanSizes(NamedTuple):
    """disk, memory: bytes of the index, on disk and on each host that searches. planned: passages
    of a query. seconds: of a core, to plan a query."""

    disk: float
    memory: float
    planned: int
    seconds: float


def of_words(
    words_of: Callable[[str], Iterable[str]],
    sample: Sequence[str],
    passages: int,
    words: float,
    planned: int,
    rare: int,
    *,
    grams: int = 0,
    sentences: bool = False,
) -> PlanSizes:
    """The sizes of a plan by words, or by n-grams of `grams` characters; of passages, or of their
    sentences one by one.

    words_of: a text -> the words that count. sample: texts of some passages, evenly spread, or of
    all; none: sizes are those of English text. words: of a passage on average, divided by spaces.
    rare: words in more than one of so many passages have a number for every passage too.
    """
    counts = 0.0  # bytes of how many sentences each passage has
    if sentences:
        cut = [sentence for text in sample for sentence in cut_into_sentences(text)]
        each = len(cut) / len(sample) if sample else max(1.0, words / _SENTENCE)
        counts = float(_NUMBER) * passages
        sample, passages, words = cut, round(passages * each), words / each
    if sample:
        passages_of = Counter(word for text in sample for word in set(words_of(text)))
        entries = passages_of.total() / len(sample)
        common = sum(count > len(sample) / rare for count in passages_of.values())
        known = len(passages_of) * (passages / len(sample)) ** _HEAPS
        letters = sum(len(word.encode()) for word in passages_of) / max(1, len(passages_of))
    else:
        entries, common, letters = _DISTINCT * words**_GROWTH, round(words / 4), _LETTERS
        known = _VOCABULARY * (passages * words * _COUNTED) ** _HEAPS
        if grams:
            entries, common, letters = _GRAMS * words, round(_COMMON_GRAMS * words), float(grams)
            known *= _MORE_GRAMS
    postings = 2 * _NUMBER * entries * passages + (_START + letters) * known
    dense = float(_NUMBER) * common * passages
    postings += counts
    disk = postings + (1 + _NUMBER) * known + 5 * _HEADER  # a line end and its idf for every word
    per_query = _SLOWER if grams else 1
    seconds = per_query * (_QUERY + _PASSAGE * passages)
    return PlanSizes(disk, postings + dense, planned, seconds)


def summed(parts: Iterable[PlanSizes]) -> PlanSizes:
    """The sizes of a plan that adds up several."""
    disk, memory, planned, seconds = zip(*parts, strict=True)
    return PlanSizes(sum(disk), sum(memory), planned[0], sum(seconds))
