"""A student of several views that a plan guides, from planned passages to what it finds."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.retrieval.multiview.guided import GuidedDecoder, PlannedIdentifiers, _Guided
from dgr_jax.retrieval.multiview.planned import PlannedViews
from dgr_jax.retrieval.multiview.search import MultiviewDecoder, MultiviewSearch
from dgr_jax.retrieval.planned import guided_fn
from dgr_jax.retrieval.simultaneous import Lexical
from tests import students
from tests.test_multiview import table
from tests.view_collections import SCORING, TEXTS, prepare

EOS = 1


def test_corpora_of_one_size_class_have_one_width():
    widths = [
        PlannedIdentifiers(table([[(2 + p, EOS)] * (p < count) for p in range(200)], 200), n).width
        for count, n in ((1, 4), (200, 64), (200, 65), (200, 128), (200, 200))
    ]
    assert widths == [64, 64, 128, 128, 256]


def test_what_a_search_of_all_finds_stands_beside_what_is_guided():
    """Of the second query alone, which has too few planned passages; no identifier twice."""
    of_view = table([[(2, EOS)], [(3, EOS)], [(4, EOS)], [(5, EOS)]], 4)
    inf = np.inf
    guided = np.array([[-1, -inf, -2], [-inf, -3, -inf], [0, 0, 0]], np.float32)  # 3 is padding
    all_of_it = np.array([[1, 3, 2]])  # rows, of the beams of a search of all
    beside = BeamResult(None, np.array([[-3, -4, -5]], np.float32), None, all_of_it)
    student = SimpleNamespace(
        search=SimpleNamespace(num_beams=3),
        tries={"title": SimpleNamespace(table_rows=lambda rows: rows)},
        index=SimpleNamespace(tables={"title": of_view}),
    )
    rows = np.array([[0, 1, 3], [0, 1, -1]], np.int32)
    result = _Guided(rows, guided, np.array([1]), beside)
    written = GuidedDecoder._of_view(student, "title", result, 2)
    assert written.tokens[..., 0].tolist() == [[2, 5, 0, 0, 0, 0], [3, 0, 0, 0, 5, 4]]
    assert written.log_probs.tolist() == [[-1, -2] + [-inf] * 4, [-3] + [-inf] * 3 + [-4, -5]]
    assert (written.hi - written.lo).tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1]]


@pytest.mark.slow
def test_a_guided_student_from_texts_to_passages(tmp_path):
    """Its log-probabilities are those of a search of all; other queries compile nothing."""
    vocabulary, indexes, passages, _ = prepare(tmp_path, views=("title",))
    config = dataclasses.replace(students.CONFIG, vocab_size=vocabulary.size)
    scoring = dataclasses.replace(SCORING, query_shift=100.0)  # of a random student all count
    search = MultiviewSearch(num_beams=16, batch_size=4, depth=4, query_length=16, scoring=scoring)
    mesh = make_mesh(Mesh(data=1), jax.devices()[:1])
    student = MultiviewDecoder.of(config, students.parameters(config), indexes, search, mesh)
    plan = Lexical(planned=3, num_beams=2, weight=0.5)
    system = PlannedViews.of(student, plan, plan.planner(passages))
    guided = system.student
    assert guided.search.num_beams == 2 and guided.index_bytes > student.index_bytes

    texts = [*TEXTS, "bees, owls and a glacier"]
    queries = system.encode(vocabulary, texts)
    short = (queries.planned.passages >= 0).sum(1) < 2
    assert short.sum() not in (0, 4)
    everything, of_plan = (
        decoder._written(4, {view: decoder._start(view, asked, 4) for view in student.markers})
        for decoder, asked in ((student, queries.tokens), (guided, queries))
    )
    for whole, part in zip(everything, of_plan, strict=True):
        owner = indexes.tables[part.view].passages
        for query, planned_for in enumerate(queries.planned.passages):
            written = lambda found, query=query: {
                int(lo): log_prob
                for lo, log_prob in zip(found.lo[query], found.log_probs[query], strict=True)
                if log_prob > -np.inf
            }
            known, values = written(whole), written(part)
            assert values and values.keys() <= known.keys()
            for place, log_prob in values.items():
                assert log_prob == pytest.approx(known[place], rel=1e-4)
                assert short[query] or owner[place] in planned_for

    found, scores = system.passages(queries)
    assert (found[:, 0] >= 0).all()
    program = guided_fn(config, 2, False, mesh, student.rules)
    before = program._cache_size()
    order = [3, 1, 0, 2]
    again = system.encode(vocabulary, [texts[i] for i in order])
    blocks = zip(*system.passages_of_blocks(iter([again[:1], again[1:]])), strict=True)
    passages_again, scores_again = map(np.concatenate, blocks)
    np.testing.assert_array_equal(passages_again, found[order])
    np.testing.assert_allclose(scores_again, scores[order], rtol=1e-5)
    some = system.restrict(np.array([False, True, True, False, False]))
    assert set(some.passages(some.encode(vocabulary, texts))[0].ravel().tolist()) == {-1, 1, 2}
    assert program._cache_size() == before > 0
