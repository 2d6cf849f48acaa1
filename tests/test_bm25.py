import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.corpora import words
from dgr_jax.corpora.types import Passage
from dgr_jax.retrieval import bm25
from dgr_jax.retrieval.bm25 import WORDS, Bm25
from tests.reference import bm25 as reference


class ListStore(list):
    """Passages in memory with the face of a PassageStore."""

    @property
    def pids(self):
        return [passage.pid for passage in self]


def corpus(*texts):
    return ListStore(Passage(f"p{i}", text) for i, text in enumerate(texts))


NOUNS = ["bee", "hive", "honey", "queen", "sail", "mast"]
texts = st.lists(
    st.lists(st.sampled_from(NOUNS), max_size=8).map(" ".join), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(texts, st.lists(st.sampled_from([*NOUNS, "unknown"]), max_size=4), st.integers(1, 15))
def test_search_equals_the_formula(texts, query, k):
    store = corpus(*texts)
    index = Bm25(k1=1.2, b=0.6, stop_words="", stemmer="").fit(store)
    listed = [text.split() for text in texts]
    if not any(listed):
        assert index.search({"q": " ".join(query)}, k) == {"q": []}
        return
    expected = reference.scores(query, listed, 1.2, 0.6)
    scores = index.scores(" ".join(query))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    found = index.search({"q": " ".join(query)}, k)["q"]
    assert len(found) == min(k, sum(score > 0 for score in expected))
    by_pid = {pid: float(score) for pid, score in zip(store.pids, scores, strict=True)}
    assert [(p.pid, p.score) for p in found] == sorted(
        ((pid, score) for pid, score in by_pid.items() if score > 0),
        key=lambda item: (-item[1], item[0]),
    )[:k]


def test_n_grams_count_as_words_do():
    texts, query = ["bee hives", "the beehive", "a sail"], "beehiwes"
    settings = Bm25(k1=1.2, b=0.6, grams=4)
    listed = [words.grams(text, 4) for text in texts]
    expected = reference.scores(words.grams(query, 4), listed, 1.2, 0.6)
    np.testing.assert_allclose(settings.fit(corpus(*texts)).scores(query), expected, rtol=1e-5)
    assert min(expected[:2]) > 0 == expected[2] == Bm25().fit(corpus(*texts)).scores(query).max()
    with pytest.raises(ValueError, match="Bm25.grams: got -1, expected at least 0"):
        Bm25(grams=-1)


def test_ties_go_by_pid_also_at_the_cut():
    store = ListStore(Passage(pid, "bee hive") for pid in ("b", "c", "a", "d"))
    found = Bm25().fit(store).search({"q": "bee"}, 2)["q"]
    assert [p.pid for p in found] == ["a", "b"]


def test_the_best_of_many_are_those_of_all():
    rng = np.random.default_rng(0)
    for values in (3, 100_000):  # with many ties, and with hardly any
        for filled in (0.002, 0.9):
            scores = rng.integers(1, values + 1, 5000) * (rng.random(5000) < filled)
            scores = scores.astype(np.float32)
            pids = [f"p{place}" for place in rng.permutation(5000)]
            best = sorted(np.flatnonzero(scores), key=lambda i: (-scores[i], pids[i]))
            for k in (1, 10, 39, 60):
                assert bm25.places(scores, k, pids) == best[:k]
    assert bm25.places(np.zeros(0, np.float32), 3, []) == []


@settings(max_examples=40, deadline=None)
@given(texts, st.lists(st.sampled_from([*NOUNS, "unknown"]), max_size=4))
def test_scores_of_a_few_are_those_of_all(texts, query):
    index = Bm25().fit(corpus(*texts))
    places = np.arange(len(texts))[::-2]
    text = " ".join(query)
    assert np.array_equal(index.scores_of(text, places), index.scores(text)[places])


def test_stop_words_single_letters_and_case():
    store = corpus("The bee and a hive", "THE SAIL", "x y z")
    index = Bm25().fit(store)
    found = index.search({"a": "the x", "b": "BEE", "c": "", "d": "zebra"}, 5)
    assert {qid: [p.pid for p in listed] for qid, listed in found.items()} == {
        "a": [],
        "b": ["p0"],
        "c": [],
        "d": [],
    }
    assert [p.pid for p in Bm25(stop_words="").fit(store).search({"q": "the"}, 5)["q"]] == [
        "p1",
        "p0",
    ]


def test_english_stop_words_are_those_of_bm25s():
    tokenizer = pytest.importorskip("bm25s.tokenization").Tokenizer(stopwords="english")
    assert frozenset(tokenizer.stopwords) == bm25.ENGLISH


def test_title_is_indexed_too():
    store = ListStore([Passage("p0", "sail"), Passage("p1", "mast", title="Bees")])
    assert [p.pid for p in Bm25().fit(store).search({"q": "bees"}, 5)["q"]] == ["p1"]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="the corpus has no passages to index"):
        Bm25().fit(corpus())
    with pytest.raises(ValueError, match="got k = 0, expected 1 or more"):
        Bm25().fit(corpus("bee")).search({"q": "bee"}, 0)
    with pytest.raises(ValueError, match=r"Bm25\.stop_words = 'klingon'"):
        Bm25(stop_words="klingon")


def found(settings, query, *texts):
    """The places of the passages that are found for a query, best first."""
    listed = settings.fit(corpus(*texts)).search({"q": query}, 9)["q"]
    return [int(passage.pid.removeprefix("p")) for passage in listed]


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        (Bm25(), [0, 1]),
        (WORDS, [1]),
        (Bm25(stemmer="porter"), [0, 1]),
        (Bm25(stemmer="", language="finnish"), [1]),
    ],
)
def test_words_count_by_their_stems_or_as_they_stand(settings, places):
    texts = ("A hive dances on and on and on", "the dance of a hive", "danger")
    assert found(settings, "dance", *texts) == places


@pytest.mark.parametrize(
    ("language", "query", "text"),
    [("german", "Häuser", "Haus"), ("russian", "книги", "книга"), ("french", "chevaux", "cheval")],
)
def test_stems_of_a_language(language, query, text):
    assert found(Bm25(language=language, stop_words=""), query, text) == [0]
    assert found(Bm25(), query, text) == []


def test_a_language_without_a_stemmer_is_refused_with_those_that_have_one():
    with pytest.raises(ValueError) as error:
        Bm25(language="chinese")
    said = str(error.value)
    assert said.startswith("Bm25.language: got 'chinese', expected one of arabic, armenian, ")
    assert said.endswith(", turkish, yiddish; words stay as they stand by Bm25.stemmer=''")
    with pytest.raises(ValueError, match=r"^Bm25\.stemmer: got 'xx', expected snowball, arabic, "):
        Bm25(stemmer="xx")


@pytest.mark.parametrize("settings", [Bm25(), Bm25(language="german"), Bm25(language="serbian")])
@pytest.mark.parametrize("text", ["養蜂家は蜂蜜を集めます。", "ผึ้งเก็บน้ำหวาน", "蜜蜂在采蜜"])
def test_pairs_of_unspaced_characters_have_no_stems(settings, text):
    words_of = bm25._words(settings, alone=True)
    assert list(words_of(text)) == words.words(text, alone=True)


def test_numbers_and_names_beside_unspaced_text_are_kept():
    assert found(Bm25(), "bees 42", "42 匹の蜂", "a bee") == [1, 0]
