"""Words of every script; those of English are the same as in earlier versions."""

import re
import string
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.corpora import words
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.types import Passage
from dgr_jax.data.examples import Sources
from dgr_jax.identifiers.embeddings import TfidfSvd
from dgr_jax.retrieval import bm25
from dgr_jax.retrieval.bm25 import WORDS, Bm25
from tests.test_bm25 import ListStore, corpus

PATTERN = re.compile(r"\b\w\w+\b")  # of scikit-learn and bm25s


def found(texts, query):
    """Places of the passages that BM25 finds for a query, best first."""
    index = Bm25(stop_words="").fit(corpus(*texts))
    return [int(p.pid[1:]) for p in index.search({"q": query}, len(texts))["q"]]


@settings(deadline=None)
@given(st.text(string.printable))
def test_words_of_ascii_are_those_of_the_usual_pattern(text):
    assert words.words(text) == PATTERN.findall(text.lower())


@settings(deadline=None)
@given(st.text(string.printable + "éüñçøåßœ“”–—’€°"))
def test_words_of_european_texts_are_too(text):
    assert words.words(text) == PATTERN.findall(text.casefold())


def test_stop_words_case_and_stems_of_english_are_as_before():
    text = "The bees, x_1 and THE Hive's 42 honeys a I"
    before = [word for word in PATTERN.findall(text.lower()) if word not in ("the", "and")]
    assert list(bm25._words(WORDS, alone=True)(text)) == before
    assert list(bm25._words(Bm25(), alone=True)(text)) == ["bee", "x_1", "hive", "42", "honey"]
    assert before == ["bees", "x_1", "hive", "42", "honeys"]
    assert list(bm25._words(Bm25(stop_words="german", stemmer=""))("Daß Bienen")) == ["bienen"]


def test_bm25_and_tfidf_of_the_quickstart_are_as_before(monkeypatch):
    """The same runs and vectors, to the last bit, with the pattern in place of `words`."""
    collection = QuickstartCollection()
    store = ListStore(collection.passages())
    queries = {query.qid: query.text for query in collection.queries("test")}
    runs = [settings.fit(store).search(queries, 50) for settings in (WORDS, Bm25())]
    vectors = TfidfSvd(dim=16).embed(store, 0)
    by_pattern = lambda text, alone=False: PATTERN.findall(text.lower())
    monkeypatch.setattr(words, "words", by_pattern)
    assert [settings.fit(store).search(queries, 50) for settings in (WORDS, Bm25())] == runs
    np.testing.assert_array_equal(TfidfSvd(dim=16).embed(store, 0), vectors)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी किताब है", ["हिन्दी", "किताब", "है"]),
        ("தமிழ் ஆறு", ["தமிழ்", "ஆறு"]),
        ("סֵפֶר גָּדוֹל", ["ספר", "גדול"]),  # points are left out by most writers
        ("كِتَابٌ", ["كتاب"]),
        ("می\u200cخواهم", ["می", "خواهم"]),
        ("क्\u200dष co\u00adoperate", ["क्ष", "cooperate"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("\ufb01ne ＡＢＣ ﾃﾚﾋﾞ", ["fine", "abc", "テレ", "レビ"]),
        ("İstanbul ISTANBUL", ["istanbul", "istanbul"]),
        ("Straße STRASSE STRAẞE", ["strasse"] * 3),
        ("ΟΔΟΣ οδος", ["οδοσ"] * 2),
        ("J\u030ca \u01f0a", ["\u01f0a"] * 2),
        ("Lego™ 10½ 5½", ["lego", "tm", "10"]),
        ("don\u00b4t", ["don"]),
        ("東京タワー2020年 x", ["東京", "京タ", "タワ", "ワー", "2020", "年"]),
        ("ab東京cd", ["ab", "東京", "cd"]),
        ("か\u3099くせい", ["がく", "くせ", "せい"]),
        ("물 불고기 2", ["물", "불고기"]),
        ("\u182e\u1823\u1829\u180b 葛\U000e0100城", ["\u182e\u1823\u1829", "葛城"]),
        ("แม่น้ำ", ["แม่", "ม่น้ํ", "น้ํา"]),
        ("ប្រទេស ພາສາ မြန်မာ", ["ប្រ", "រទេ", "ទេស", "ພາ", "າສ", "ສາ", "မြန်", "န်မာ"]),
        ("한국어 문서", ["한국어", "문서"]),
        ("\u0301 \u3099", []),
        ("𠮷野家", ["𠮷野", "野家"]),
    ],
)
def test_words_of_other_scripts(text, expected):
    expected = [unicodedata.normalize("NFKC", word) for word in expected]
    assert words.words(text) == expected
    assert words.words(unicodedata.normalize("NFD", text)) == expected


@pytest.mark.parametrize(
    ("texts", "query", "expected"),
    [
        (["हिन्दी किताब नदी", "पहाड़ पर घर"], "हिन्दी किताब", [0]),
        (["แม่น้ำใหญ่", "บ้านเล็ก"], "แม่น้ำ", [0]),
        (["தமிழ் ஆறு", "மலை வீடு"], "ஆறு", [0]),
        (["סֵפֶר גָּדוֹל", "בַּיִת"], "ספר", [0]),
        (["東京は日本の首都です", "大阪は西にあります"], "日本の首都", [0]),
        (["猫が好きです", "犬が好きです"], "犬", [1]),  # a single character is a query too
        (["北京是中国的首都", "上海很大"], "中国首都", [0]),
        (["DIE LANGE STRASSE", "der Weg"], "Straße", [0]),
        (["die lange Straße", "der Weg"], "strasse", [0]),
        (["un cafe\u0301 noir", "le the\u0301 vert"], "caf\u00e9", [0]),
    ],
)
def test_bm25_finds_in_every_script(texts, query, expected):
    assert found(texts, query) == expected


def test_tfidf_vectors_tell_such_passages_apart():
    store = corpus("हिन्दी किताब", "हिन्दी किताब", "पहाड़ पर घर", "東京は首都", "東京は首都")
    vectors = TfidfSvd(dim=8, stop_words="").embed(store, 0)
    same = vectors @ vectors.T > 0.99
    assert same[0].tolist() == [True, True, False, False, False]
    assert same[3].tolist() == [False, False, False, True, True]


@settings(deadline=None)
@given(st.text(string.printable))
def test_windows_of_spaced_texts_are_their_words(text):
    assert words.windows(text) == (text.split(), " ")


@settings(deadline=None)
@given(st.text("ab 東京都タワー、。1は\u3099แม่น้"))
def test_windows_of_any_text_are_the_text(text):
    pieces, between = words.windows(text)
    assert between.join(pieces).strip() == " ".join(text.split())


def test_passages_without_spaces_have_chunks_and_sentences():
    sources = Sources(chunk_words=4, min_sentence_words=2, max_sentence_words=3)
    passage = Passage("p", "東京は首都です。「大きい街です。」人が多い！", "題")
    assert list(sources.chunks(passage))[0] == "題 東京は首都です。「"
    assert len(list(sources.chunks(passage))) > 2
    assert list(sources.sentences(passage)) == ["東京は首都で", "「大きい街です。」", "人が多い！"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? 3.5 is it! Yes", ["One.", "Two?", "3.5 is it!", "Yes"]),
        ("यह नदी है। वह घर है।", ["यह नदी है।", "वह घर है।"]),
        ("هل هذا كتاب؟ نعم.", ["هل هذا كتاب؟", "نعم."]),
        ("แม่น้ำใหญ่ บ้านเล็ก 20 บาท", ["แม่น้ำใหญ่", "บ้านเล็ก 20 บาท"]),
        ("", []),
    ],
)
def test_sentences_end_by_the_marks_of_their_script(text, expected):
    assert words.sentences(text) == expected


def test_what_is_seen():
    seen = ["a", ".", "東", "हि", "☃", "\u200bx", "€"]
    unseen = ["", " \t\n", "\x00\x7f", "\u200b\u200d", "\u00a0\u3000", "\ufeff", "\u0301"]
    unseen += ["\u3164", "\u2800", "\u202e\u2069", "\ufe0f", "\u00ad"]
    assert all(map(words.visible, seen)) and not any(map(words.visible, unseen))


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        (
            "Bees, dance!",
            5,
            [" bees", "bees ", "ees d", "es da", "s dan", " danc", "dance", "ance "],
        ),
        ("\N{LATIN SMALL LIGATURE FI}n", 4, [" fin", "fin "]),
        ("\u6771\u4eac\u90fd in", 3, [" 東京", "東京都", "京都 ", "都 i", " in", "in "]),
        ("a ox", 4, [" ox "]),
        ("ox", 5, []),
        ("?!", 2, []),
        ("", 1, []),
    ],
)
def test_n_grams_of_characters(text, size, expected):
    assert words.grams(text, size) == expected
