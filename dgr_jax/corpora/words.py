"""The words of a text in any script: what BM25, TF-IDF and the windows of texts count.

A word is a run of letters, digits, underscores and combining marks, case-folded, of two characters
or more, or one syllable of Korean. For ASCII that is the pattern \\b\\w\\w+\\b in lower case; other
texts are first brought to Unicode's compatibility form (NFKC), as the students' vocabularies do, so
that composed and decomposed, full-width and ligature spellings meet, and ß meets SS. A mark belongs
to its letter: the vowel signs of Hindi do not end a word. The points of Hebrew and Arabic, which
most writers leave out, are no part of it.

Scripts that write no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Myanmar and their
neighbours) give the pairs of neighbouring characters instead, marks with their letter:

    words("The café in 東京都")  ->  ["the", "café", "in", "東京", "京都"]
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from functools import cache
from typing import NamedTuple

# The number of these rules: what is kept of words by others, of texts beyond ASCII, is made again.
RULES = 2

_ASCII_WORD = re.compile(r"\w\w+", re.ASCII)
_WORD_CHARACTERS = 2  # how many characters of an unspaced script count as a word of a window

# Characters whose compatibility forms would join the word beside them: 5½ must not become 51/2,
# nor Lego™ "legotm".
_APART = re.compile("[\u00bc-\u00be\u2116\u2120-\u2122\u2150-\u215f\u2189]")
_ARABIC = "\u0620-\u06ff\u0750-\u077f\u08a0-\u08ff"
_NON_JOINER = re.compile(f"(?<=[{_ARABIC}])\u200c(?=[{_ARABIC}])")  # parts Persian words
# Characters that no reader sees (soft hyphens, joiners, direction marks, variation selectors, tags,
# byte order marks), as the inside of a character class of `re`.
UNSEEN = (
    "\u00ad\u034f\u061c\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f"
    "\ufeff\U000e0000-\U000e01ef"
)
# These, and points that writers may leave out.
_DROPPED = re.compile(
    f"[{UNSEEN}"
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # Hebrew
    "\u0610-\u061a\u0640\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed]"
)
# Characters of scripts that write no spaces, as the inside of a character class of `re`.
UNSPACED = (
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"  # kana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ebd\u0ec0-\u0ece\u0edc-\u0edf"  # Thai, Lao
    # Myanmar, Khmer, Tai scripts, Balinese, Javanese
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a-\uaa7f"
    "\u1780-\u17d3\u17d7\u17dc\u17dd"
    "\u1950-\u1974\u1980-\u19c9\u1a20-\u1a7c\uaa80-\uaadd\u1b05-\u1b4c\ua984-\ua9c0"
)

_SYLLABLE = "[\uac00-\ud7a3]"  # of Hangul: 물, alone, is the Korean word for water

_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and a symbol that show nothing

# A sentence ends with a Latin mark before a space, and with those of other scripts anywhere.
_ENDS = re.compile(
    "([\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f\u1362\u1367\u0589\u0f0d\u0f0e\u17d4\u17d5"
    "\u104b]+[\u201d\u2019\u300d\u300f\uff09\u3011\u300b\u00bb]*)\\s*"
)
_THAI_PHRASE = re.compile("(?<=[\u0e01-\u0e4e\u0e81-\u0ede])\\s+(?=[\u0e01-\u0e4e\u0e81-\u0ede])")
_PARAGRAPH = "\u2029"
_ASCII_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_SENTENCE = re.compile(rf"{_ASCII_SENTENCE.pattern}|{_PARAGRAPH}")


class _Patterns(NamedTuple):
    """Patterns for texts beyond ASCII.

    word: two characters or more, or a syllable of Hangul. unspaced: a run of characters of an
    unspaced script. cluster: one such character with its marks. either: such a run, captured as
    group 1, or a word.
    """

    word: re.Pattern[str]
    unspaced: re.Pattern[str]
    cluster: re.Pattern[str]
    either: re.Pattern[str]


@cache
def marks() -> str:
    """All combining marks, as the inside of a character class of `re`."""
    planes = itertools.chain(range(0x20000), range(0xE0000, 0xE0200))  # the others have none
    points = (i for i in planes if unicodedata.category(chr(i))[0] == "M")
    runs: list[list[int]] = []
    for point in points:
        if runs and runs[-1][1] == point - 1:
            runs[-1][1] = point
        else:
            runs.append([point, point])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in runs)


@cache
def _patterns() -> _Patterns:
    word = rf"\w[\w{marks()}]+|{_SYLLABLE}"
    run = rf"[{UNSPACED}][{UNSPACED}{marks()}]*"
    return _Patterns(
        word=re.compile(word),
        unspaced=re.compile(run),
        cluster=re.compile(rf"[{UNSPACED}][{marks()}]*"),
        either=re.compile(f"({run})|{word}"),
    )


def words(text: str, *, alone: bool = False) -> list[str]:
    """The words of a text, in order.

    alone: also give each character of an unspaced script by itself, which an index needs because a
      query may be a single character.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    text, patterns = _folded(text), _patterns()
    if not patterns.unspaced.search(text):
        return patterns.word.findall(text)
    listed: list[str] = []
    for match in patterns.either.finditer(patterns.unspaced.sub(r" \g<0> ", text)):
        if match[1] is None:
            listed.append(match[0])
            continue
        clusters = patterns.cluster.findall(match[1])
        listed += map("".join, zip(clusters, clusters[1:], strict=False))
        if alone or len(clusters) == 1:
            listed += clusters
    return listed


def grams(text: str, size: int) -> list[str]:
    """The n-grams of characters of a text, `size` each, in order: of its words with one space
    before, between and after them, so that they hold ends of words, and parts of neighbours
    (McNamee and Mayfield 2004). Runs of unspaced scripts count as words.

        grams("Bees dance", 5)  ->  [" bees", "bees ", "ees d", "es da", "s dan", ..., "ance "]
    """
    if text.isascii():
        spaced = " ".join(_ASCII_WORD.findall(text.lower()))
    else:
        text, patterns = _folded(text), _patterns()
        text = patterns.unspaced.sub(r" \g<0> ", text)
        spaced = " ".join(match[0] for match in patterns.either.finditer(text))
    spaced = f" {spaced} " if spaced else ""
    return [spaced[i : i + size] for i in range(len(spaced) - size + 1)]


def _folded(text: str) -> str:
    """The text in NFKC, case-folded, without the characters that no reader sees."""
    text = _NON_JOINER.sub(" ", _APART.sub(r" \g<0> ", text))
    text = _DROPPED.sub("", unicodedata.normalize("NFKC", text)).casefold()
    # The folded Turkish dotted capital leaves its dot as a mark.
    return unicodedata.normalize("NFKC", text).replace("i\u0307", "i")


def visible(text: str) -> bool:
    """Whether a reader sees anything of the text: a letter, digit, sign or symbol.

    Spaces, joiners, direction marks, fillers and combining marks without a letter do not count.
    """
    if text.isascii():
        return any(33 <= ord(character) < 127 for character in text)
    seen = (character for character in text if character not in _BLANKS)
    return any(unicodedata.category(character)[0] in "LNPS" for character in seen)


def windows(text: str) -> tuple[list[str], str]:
    """(the text in pieces of about a word, the string that joins them again).

    Neighbouring pieces, joined by that string and stripped, are a part of the text with single
    spaces. In scripts with spaces the pieces are the words between the spaces; in unspaced scripts
    they are two characters each, and a piece that begins after a space keeps it.
    """
    if text.isascii() or not _patterns().unspaced.search(text):
        return text.split(), " "
    pieces: list[str] = []
    for word in text.split():
        if word.isascii() or not _patterns().unspaced.search(word):
            pieces.append(" " + word)
            continue
        cut = _cut(word)
        pieces += [" " + cut[0], *cut[1:]]
    return pieces, ""


def _cut(word: str) -> list[str]:
    """A word in pieces: two characters of an unspaced script each, with the marks and punctuation
    after them; text of other scripts between such characters is a piece of its own."""
    cluster = _patterns().cluster
    pieces, characters = [], 0
    for part in re.findall(rf"{cluster.pattern}|[^{UNSPACED}]+", word):
        unspaced = cluster.match(part) is not None
        bare = pieces and not all(any(map(str.isalnum, text)) for text in (pieces[-1], part))
        if bare or 0 < characters < _WORD_CHARACTERS:
            pieces[-1] += part
        else:
            pieces.append(part)
            characters = 0
        characters = (characters + 1) % _WORD_CHARACTERS if unspaced else 0
    return pieces


def sentences(text: str) -> list[str]:
    """The sentences of a text by the marks that end them, in Latin and other scripts.

    Thai and Lao have no such marks: there a space, which ends a phrase, divides.
    """
    if text.isascii():
        return list(filter(None, _ASCII_SENTENCE.split(text)))
    text = _THAI_PHRASE.sub(_PARAGRAPH, _ENDS.sub(rf"\1{_PARAGRAPH}", text))
    return list(filter(None, _SENTENCE.split(text)))
