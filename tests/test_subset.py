"""Nested parts of a collection."""

from __future__ import annotations

import pytest

from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.subset import Subset

WHOLE = QuickstartCollection()


def pids(part):
    return [passage.pid for passage in part.passages()]


def test_smaller_parts_lie_within_larger_ones_in_corpus_order():
    small, large = (pids(Subset(WHOLE, size)) for size in (20, 90))
    assert len(small) == 20 and set(small) < set(large) and len(large) == 90
    order = [passage.pid for passage in WHOLE.passages()]
    assert large == [pid for pid in order if pid in set(large)]
    assert set(pids(Subset(WHOLE, 20, seed=1))) != set(small)
    assert pids(Subset(WHOLE, 240)) == order


def test_judgements_and_queries_are_those_of_the_part():
    part = Subset(WHOLE, 50)
    kept = set(pids(part))
    for split in ("train", "test"):
        judged = list(part.qrels(split))
        assert judged == [qrel for qrel in WHOLE.qrels(split) if qrel.pid in kept]
        assert {q.qid for q in part.queries(split)} == {qrel.qid for qrel in judged}


def test_the_core_asks_the_same_of_every_size():
    small, large = (Subset(WHOLE, size, core=30) for size in (30, 200))
    assert list(small.qrels("test")) == list(large.qrels("test")) != []
    assert list(small.queries("test")) == list(large.queries("test"))
    assert len(list(small.qrels("train"))) < len(list(large.qrels("train")))


def test_parts_that_cannot_be():
    with pytest.raises(ValueError, match="Subset.core: got 9, expected at most 5"):
        Subset(WHOLE, 5, core=9)
    with pytest.raises(
        ValueError, match="Subset.size: got 241, expected at most 240, the passages"
    ):
        Subset(WHOLE, 241).passages()
    missing = Subset(WHOLE, 5).inputs(("test",))
    assert missing == WHOLE.inputs(("test",))
