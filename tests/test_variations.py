"""Questions with typos and without some of their words."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from dgr_jax.corpora.types import Query
from dgr_jax.corpora.variations import Variation, slipped
from dgr_jax.experiments.common import Evaluate
from dgr_jax.retrieval.generative import Search
from dgr_jax.settings import describe

QUERIES = [Query(f"q{i}", "how far can an owl turn its head around", ("270",)) for i in range(200)]


def test_a_word_slips_in_one_of_four_ways():
    random = np.random.default_rng(0)
    slips = collections.Counter(slipped("turn", random) for _ in range(4000))
    swapped, left_out, doubled = {"trun", "tunr"}, {"trn", "tun"}, {"tuurn", "turrn"}
    beside = {"tyrn", "tirn", "tuen", "tutn"}
    assert slips.keys() == swapped | left_out | doubled | beside
    for kind in (swapped, left_out, doubled, beside):
        assert sum(slips[word] for word in kind) == pytest.approx(1000, abs=120)
    assert {slipped("1984", random)[0] for _ in range(50)} == {"1"}  # no keys of letters beside


def test_as_many_words_slip_as_were_asked_for():
    words = QUERIES[0].text.split()
    long = [place for place, word in enumerate(words) if len(word) >= 4]
    varied = [Variation(typos=0.3).of(query).text.split() for query in QUERIES]
    changed = [{i for i, word in enumerate(row) if word != words[i]} for row in varied]
    assert set().union(*changed) == set(long)
    # A swap of equal letters, of which these words have none, would change nothing.
    share = np.mean([len(places) for places in changed]) / len(long)
    assert share == pytest.approx(0.3, abs=0.06)


def test_words_are_left_out_but_never_all():
    words = QUERIES[0].text.split()
    left = [Variation(dropped=0.4).of(query).text.split() for query in QUERIES]
    expected = 1 - 0.4 * (1 - 1 / len(words))
    assert np.mean([len(row) for row in left]) / len(words) == pytest.approx(expected, abs=0.03)
    assert all([word for word in words if word in row] == row for row in left)
    alone = [Variation(dropped=1.0).of(query).text for query in QUERIES]
    assert set(alone) == set(words)
    assert Variation(typos=1.0, dropped=1.0).of(Query("q", "")).text == ""


def test_a_question_is_varied_by_its_id_and_the_seed_alone():
    varied = Variation(typos=0.5, dropped=0.3)
    once = [varied.of(query) for query in QUERIES]
    assert [varied.of(query) for query in reversed(QUERIES)] == once[::-1]
    assert [query.qid for query in once] == [query.qid for query in QUERIES]
    assert once[0].answers == QUERIES[0].answers
    assert len({query.text for query in once}) > 100
    other = Variation(typos=0.5, dropped=0.3, seed=1)
    assert [other.of(query) for query in QUERIES] != once
    assert Variation(seed=1).of(QUERIES[0]) is QUERIES[0]


def test_finished_evaluations_stay_finished():
    assert "variation" not in describe(Evaluate(Search()))
    assert "variation" in describe(Evaluate(Search(), variation=Variation(dropped=0.1)))
