"""What a search has looked at: the same as beam search on the device; where it lost a passage."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dgr_jax.retrieval.explanation import SHOWN, searched
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.simultaneous import Lexical
from tests import served as small
from tests import students, test_planned

BEAMS, COUNT = 4, 40
QUERY = students.queries(3)[:1]
ROWS = {"rq": students.codes(COUNT, seed=3), "text": students.texts(COUNT, seed=3)}


def decoder(kind, beams=BEAMS, **settings):
    search = Search(num_beams=beams, depth=COUNT, batch_size=1, query_length=8, **settings)
    return students.decoder(ROWS[kind], search)


def written(levels):
    """Identifier -> log-probability, of all that the levels have written."""
    return {p.tokens: p.log_prob for level in levels for p in level.live if p.complete}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("rq", {}), ("text", {}), pytest.param("rq", {"renormalise": True}, marks=pytest.mark.slow)],
)
def test_it_searches_as_the_device_does(kind, settings):
    student = decoder(kind, **settings)
    ((passages, scores),) = zip(*student.passages(QUERY), strict=True)
    levels, followed = searched(student.may_write(QUERY))
    assert followed is None
    best = sorted(written(levels).values(), reverse=True)[:BEAMS]
    by_row = dict(zip(student.rows[passages[passages >= 0]], scores, strict=False))
    np.testing.assert_allclose(best, sorted(by_row.values(), reverse=True), atol=1e-4)
    for before, level in zip(levels, levels[1:], strict=False):
        assert all(
            p.tokens[:-1] == before.live[p.parent].tokens and p.score <= before.live[p.parent].score
            for p in (*level.live, *level.dropped)
        )
    first = levels[0]
    assert len(first.live) >= BEAMS and len(first.dropped) == min(first.count, SHOWN) > 0
    tokens = len(np.unique(student.table.tokens[:, 0]))
    assert len(first.live) + first.count == tokens


@pytest.mark.parametrize("kind", ["rq", "text"])
def test_every_passage_is_followed_to_where_it_was_lost(kind):
    student = decoder(kind)
    (found,), _ = student.passages(QUERY)
    writes, lost = student.may_write(QUERY), 0
    for passage in range(COUNT):
        levels, followed = searched(writes, passage)
        tokens = tuple(int(t) for t in writes.rows[writes.row_of(passage)] if t)
        assert followed.path[-1].tokens == tokens and followed.path[-1].complete
        if followed.fell_at is None:
            continue
        lost += 1
        assert passage not in found and followed.by >= 0
        level, prefix = levels[followed.fell_at - 1], followed.path[followed.fell_at - 1]
        if prefix.tokens in {p.tokens for p in level.live}:
            assert kind == "text" and level is levels[-1]  # the search ended before it could
            continue
        least = min(p.score for p in level.live if kind == "rq" or p.complete == prefix.complete)
        assert followed.by == pytest.approx(least - prefix.score, abs=1e-4)
    assert lost >= COUNT - 3 * BEAMS


def test_with_as_many_beams_as_identifiers_nothing_is_lost():
    student = decoder("rq", beams=COUNT)
    levels, followed = searched(student.may_write(QUERY), 7)
    assert [level.count for level in levels] == [0] * len(levels) and followed.fell_at is None
    assert len(written(levels)) == len(student.table)


def test_a_plan_decides_with():
    plan = Lexical(planned=test_planned.PLANNED, ranked_by="beams", num_beams=4, weight=0.5)
    system = test_planned.planned_decoder(ROWS["rq"], plan)
    asked = test_planned.asked(system, test_planned.QUERIES[:1])
    writes = system.may_write(asked)
    levels, _ = searched(writes)
    ((hits),) = system.hits(asked)
    by_search = [h.parts["log_prob"] for h in hits if np.isfinite(h.parts["log_prob"])]
    np.testing.assert_allclose(sorted(written(levels).values()), sorted(by_search), atol=1e-4)
    planned, scores = (part[0] for part in asked.planned)
    for prefix in levels[0].live:
        under = [s for p, s in zip(planned, scores, strict=True)
                 if tuple(ROWS["rq"][p][:1]) == prefix.tokens]  # fmt: skip
        assert prefix.bonus == pytest.approx(max(under) / 0.5, abs=1e-4)
        assert prefix.score == pytest.approx(prefix.log_prob + prefix.bonus, abs=1e-4)
    assert writes.row_of(int(planned[0])) >= 0
    other = next(p for p in range(COUNT) if p not in planned)
    assert searched(writes, other)[1] is None
    last = scores.min()
    assert writes.missing(other) == (
        f"it is not among the {test_planned.PLANNED} planned passages, of which the last has the "
        f"plan score {last:.2f}"
    )


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return small.retriever(tmp_path_factory.mktemp("store"))


def test_a_retriever_tells_of_a_passage(retriever):
    (hits,) = retriever.search(["who dances"], 4)
    told = retriever.explain("who dances", hits[1].pid)
    assert (told.rank, told.said) == (2, "found at rank 2")
    lost = next(p.pid for p in small.PASSAGES if p.pid not in {hit.pid for hit in hits})
    told = retriever.explain("who dances", lost)
    step = told.followed.fell_at
    assert told.rank is None and told.said.startswith(
        f"not among the {len(hits)} passages that were found: at step {step} its prefix has the "
        "score -"
    )
    as_json = json.loads(json.dumps(told.as_json(), allow_nan=False))
    assert as_json["path"][-1]["complete"] and as_json["fell_at"] == step and as_json["by"] >= 0
    assert as_json["levels"][0]["live"][0]["prefix"].startswith("<")
    assert as_json["levels"][0]["dropped_in_all"] == len(as_json["levels"][0]["dropped"])
    with pytest.raises(ValueError, match="pid: got 'nobody', expected one of the 12 passages"):
        retriever.explain("who dances", "nobody")


def test_a_filtered_passage_cannot_be_written(retriever):
    some = retriever.restrict(["bees-00", "bees-01"])
    assert "no identifier of it may be written" in some.explain("who", "bees-02").said
