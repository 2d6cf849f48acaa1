import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.corpora.types import Passage
from dgr_jax.retrieval.bm25 import Bm25
from tests.reference import bm25 as reference


class ListStore(list):
    """Passages in memory with the face of a PassageStore."""

    @property
    def pids(self):
        return [passage.pid for passage in self]


def corpus(*texts):
    return ListStore(Passage(f"p{i}", text) for i, text in enumerate(texts))


WORDS = ["bee", "hive", "honey", "queen", "sail", "mast"]
texts = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(texts, st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=4), st.integers(1, 15))
def test_search_equals_the_formula(texts, query, k):
    store = corpus(*texts)
    index = Bm25(k1=1.2, b=0.6, stop_words="").fit(store)
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


def test_ties_go_by_pid_also_at_the_cut():
    store = ListStore(Passage(pid, "bee hive") for pid in ("b", "c", "a", "d"))
    found = Bm25().fit(store).search({"q": "bee"}, 2)["q"]
    assert [p.pid for p in found] == ["a", "b"]


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


def test_title_is_indexed_too():
    store = ListStore([Passage("p0", "sail"), Passage("p1", "mast", title="Bees")])
    assert [p.pid for p in Bm25().fit(store).search({"q": "bees"}, 5)["q"]] == ["p1"]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="the corpus has no passages to index"):
        Bm25().fit(corpus())
    with pytest.raises(ValueError, match="got k = 0, expected 1 or more"):
        Bm25().fit(corpus("bee")).search({"q": "bee"}, 0)
    with pytest.raises(ValueError, match=r"Bm25\.stop_words = 'klingon'"):
        Bm25(stop_words="klingon").fit(corpus("bee"))


def test_stemmer_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(ImportError, match=r"^Bm25\.stemmer needs the extra 'dgr_jax\[stemmer\]'"):
        Bm25(stemmer="english").fit(corpus("bees"))

    class Stemmer:
        def __init__(self, language):
            if language != "english":
                raise KeyError(language)

        def stemWords(self, words):  # noqa: N802
            return [word.removesuffix("s") for word in words]

    fake = types.ModuleType("Stemmer")
    fake.Stemmer, fake.algorithms = Stemmer, lambda: ["english"]
    monkeypatch.setitem(sys.modules, "Stemmer", fake)
    index = Bm25(stemmer="english").fit(corpus("bees sail", "mast"))
    assert [p.pid for p in index.search({"q": "bee sails"}, 5)["q"]] == ["p0"]
    with pytest.raises(ValueError, match=r"Bm25\.stemmer = 'xx', expected one of \['english'\]"):
        Bm25(stemmer="xx").fit(corpus("bees"))
