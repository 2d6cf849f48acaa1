"""Planned identifiers and their bonus, against lists of tuples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.decoding.beam_search import beam_search
from dgr_jax.decoding.guide import PlannedRows, PlannedState
from dgr_jax.retrieval.multiview.guided import PlannedIdentifiers
from dgr_jax.retrieval.simultaneous import PlannedPassages
from tests.reference import decoding
from tests.reference import guide as reference
from tests.test_beam_search import compiled, model, score_fn, start, step_fn, tokens
from tests.test_multiview import table

COUNT, LENGTH = 9, 5
many = settings(max_examples=25, deadline=None)


def planned(queries, fixed=False):
    """PlannedRows of each query's [(row, plan score)], at most COUNT of LENGTH tokens."""
    rows = np.zeros((len(queries), COUNT, LENGTH), np.int32)
    bonus = np.full(rows.shape[:2], -np.inf, np.float32)
    for query, pairs in enumerate(queries):
        for i, (row, score) in enumerate(sorted(pairs)):
            rows[query, i, : len(row)], bonus[query, i] = row, score
    return planned_rows(rows, bonus, fixed=fixed)


planned_rows = compiled(PlannedRows.of, static_argnames="fixed")


@functools.partial(compiled, static_argnames=("beams", "fixed", "score"))
def search(rows, bonus, beams, fixed, score=None):
    guide = PlannedRows.of(rows, bonus, fixed=fixed)
    result = beam_search(
        step_fn, guide, start(2, beams), batch_size=2, num_beams=beams, guide=guide, score_fn=score
    )
    return result, guide.log_probs(result)


@functools.partial(compiled, static_argnames=("step", "beams"))
def searched_by(step, guide, beams):
    """The steps of one query."""
    return beam_search(step, guide, {}, batch_size=1, num_beams=beams, guide=guide)


def searched(queries, beams, fixed=False, score=None):
    guide = planned(queries, fixed)
    bonus = np.full((2, COUNT), -np.inf, np.float32)
    for query, pairs in enumerate(queries):
        bonus[query, : len(pairs)] = [score for _, score in sorted(pairs)]
    result, log_probs = search(guide.tokens, jnp.asarray(bonus), beams, fixed, score)
    return jax.tree.map(np.asarray, result), np.asarray(log_probs)


def scores():
    return st.integers(-48, 48).map(lambda n: n / 8)


def plans(lengths):
    """Of two queries: identifiers of which none begins another, some of several passages."""

    def prefix_free(pairs):
        kept = []
        for row, score in pairs:
            row = tuple(row)
            others = {r for r, _ in kept if r != row}
            if not any(r[: len(row)] == row or row[: len(r)] == r for r in others):
                kept.append((row, score))
        return kept

    pair = st.tuples(lengths.flatmap(tokens), scores())
    repeat = st.tuples(st.integers(0, 3), scores())
    several = st.tuples(
        st.lists(pair, max_size=COUNT - 2).map(prefix_free), st.lists(repeat, max_size=2)
    )

    def with_repeats(parts):
        pairs, repeats = parts
        return pairs + [(pairs[i][0], score) for i, score in repeats if i < len(pairs)]

    query = several.map(with_repeats)
    return st.lists(query, min_size=2, max_size=2)


def check(queries, beams, result, log_probs):
    for query, pairs in enumerate(queries):
        expected = reference.guided_search(model, query, pairs, beams)
        assert result.valid[query].tolist() == [i < len(expected) for i in range(beams)]
        found = [tuple(t for t in row if t) for row in result.tokens[query][: len(expected)]]
        assert found == [row for row, _ in expected]
        by_row = dict(expected)
        np.testing.assert_allclose(
            result.log_probs[query][: len(expected)], [p for _, p in expected], atol=2e-4
        )
        best = [reference.bonus(pairs, row) for row, _ in expected]
        np.testing.assert_allclose(result.bonus[query][: len(expected)], best, rtol=1e-6)
        planned_rows = [row for row, _ in sorted(pairs)]
        rows = [planned_rows[row] for row in result.rows[query][: len(expected)]]
        assert rows == found
        each = [by_row.get(row, -np.inf) for row in planned_rows]
        np.testing.assert_allclose(log_probs[query][: len(pairs)], each, atol=2e-4)
        assert (log_probs[query][len(pairs) :] == -np.inf).all()


@pytest.mark.parametrize(("beams", "score"), [(2, None), (3, score_fn)])
@many
@given(queries=plans(st.integers(1, LENGTH)))
def test_beams_are_chosen_by_log_probability_and_the_bonus_of_their_prefix(queries, beams, score):
    check(queries, beams, *searched(queries, beams, score=score))


@pytest.mark.parametrize("score", [None, score_fn])
@many
@given(queries=plans(st.just(LENGTH)))
def test_identifiers_of_one_length(queries, score):
    check(queries, 2, *searched(queries, 2, fixed=True, score=score))


@many
@given(queries=plans(st.integers(1, LENGTH)))
def test_as_many_beams_as_planned_score_every_one_of_them(queries):
    result, log_probs = searched(queries, COUNT)
    for query, pairs in enumerate(queries):
        legal = sorted({row for row, _ in pairs})
        exact = dict(decoding.exhaustive(model, query, legal))
        each = [exact[row] for row, _ in sorted(pairs)]
        np.testing.assert_allclose(log_probs[query][: len(pairs)], each, atol=2e-4)
        order = sorted(exact, key=lambda row: -exact[row] - reference.bonus(pairs, row))
        found = [tuple(t for t in row if t) for row in result.tokens[query][: len(order)]]
        assert found == order


@many
@given(queries=plans(st.integers(1, LENGTH)))
def test_intervals_and_their_largest_bonus(queries):
    guide = jax.tree.map(np.asarray, planned(queries))
    for query, pairs in enumerate(queries):
        pairs = sorted(pairs)
        padded = [(*row, *[0] * (LENGTH - len(row))) for row, _ in pairs]
        for depth in range(LENGTH + 1):
            for i, row in enumerate(padded):
                same = [j for j, other in enumerate(padded) if other[:depth] == row[:depth]]
                assert guide.starts[query, depth, i] == same[0]
                if depth:  # at depth 0 blank rows are among them
                    largest = max(pairs[j][1] for j in same)
                    assert guide.best[query, depth, same[0]] == largest


def test_the_bonus_of_a_prefix_is_not_added_up():
    """Two identifiers of equal log-probabilities: bonuses of 1 at each of five prefixes would let
    the first win, were they added up; so would a bonus in the reported log-probability."""
    flat = lambda tokens, cache, position: (jnp.zeros((*tokens.shape, 12)), cache)
    guide = planned([[((2, 3, 4, 5, 6), 1.0), ((7, 7, 7, 7, 7), 1.5)]], fixed=True)
    result = searched_by(flat, guide, 2)
    assert result.tokens[0, 0].tolist() == [7] * 5
    assert result.bonus[0].tolist() == [1.5, 1.0]
    np.testing.assert_allclose(result.log_probs[0], [-5 * np.log(12)] * 2, rtol=1e-6)


def test_a_bonus_saves_a_prefix_that_one_beam_would_drop():
    likely, planned_best = (2, 2, 2, 2, 2), (9, 9, 9, 9, 9)
    logits = jnp.zeros(12).at[2].set(3.0)
    step = lambda tokens, cache, position: (jnp.broadcast_to(logits, (*tokens.shape, 12)), cache)
    for score, expected in [(0.0, likely), (14.0, likely), (16.0, planned_best)]:
        guide = planned([[(likely, 0.0), (planned_best, score)]], fixed=True)
        result = searched_by(step, guide, 1)
        # The first token decides: 3 against the bonus.
        chosen = expected if score != 14.0 else planned_best
        assert result.tokens[0, 0].tolist() == list(chosen)


def test_without_a_bonus_planned_rows_are_a_constraint():
    rows = [(2, 3), (2, 4, 4), (5,), (6, 6, 6, 6, 6)]
    guide = planned([[(row, 3.0) for row in rows]] * 2)
    search = functools.partial(beam_search, step_fn, batch_size=2, num_beams=2)
    result = compiled(search)(guide, start(2, 2))
    assert result.bonus is None
    for query in range(2):
        expected = decoding.beam_search(model, query, sorted(rows), 2)
        found = [tuple(int(t) for t in row if t) for row in result.tokens[query]]
        assert found == [row for row, _ in expected]


def test_other_plans_of_one_shape_do_not_compile_again():
    sizes = []
    for seed in range(3):
        drawn = np.random.default_rng(seed)
        rows = sorted({tuple(map(int, row)) for row in drawn.integers(2, 12, (4, LENGTH))})
        searched([[(row, float(drawn.normal())) for row in rows]] * 2, 2, fixed=True)
        sizes.append(search._cache_size())
    assert sizes == [sizes[0]] * 3


def test_a_query_with_nothing_planned_finds_nothing():
    result, log_probs = searched([[], [((3, 4), 1.0)]], 2)
    assert result.valid.tolist() == [[False, False], [True, False]]
    assert (log_probs[0] == -np.inf).all()
    assert np.isfinite(log_probs[1, 0])


def test_states_of_rows():
    guide = planned([[((2, 3), 1.0), ((2, 4), 2.0)]])
    state = PlannedState(jnp.array([[0, -3, -1]]), jnp.array([[1, 2, -1]]))
    assert guide.rows(state).tolist() == [[-1, 1, -1]]
    assert guide.bonus(state)[0, :2].tolist() == [2.0, 2.0]


# Titles of one to three tokens, which passages may share; a passage may have two, or none.
titled = st.lists(st.integers(2, 5), min_size=1, max_size=LENGTH - 2).map(lambda row: (*row, 1))
titles = st.lists(st.lists(titled, max_size=2), min_size=6, max_size=6).filter(any)
plan_scores = st.integers(1, 64).map(lambda score: score / 8)
passage_plan = st.dictionaries(st.integers(0, 5), plan_scores, max_size=4)


def planned_passages(plans, size=4):
    """PlannedPassages of dictionaries passage -> plan score."""
    passages = np.full((len(plans), size), -1, np.int32)
    scores = np.full(passages.shape, -np.inf, np.float32)
    for query, of_query in enumerate(plans):
        for place, pair in enumerate(sorted(of_query.items(), key=lambda pair: -pair[1])):
            passages[query, place], scores[query, place] = pair
    return PlannedPassages(passages, scores)


def padded(rows, tokens):
    known = np.where(rows[..., None] >= 0, tokens[np.maximum(rows, 0)], 0)
    return np.pad(known, ((0, 0), (0, 0), (0, LENGTH - tokens.shape[1])))


@many
@given(rows=titles, plans=st.lists(passage_plan, min_size=2, max_size=2))
def test_beams_write_the_identifiers_of_planned_passages_by_their_best_plan_score(rows, plans):
    of_view = table(rows, 6)
    identifiers = PlannedIdentifiers(of_view, 4)
    found, best = identifiers.of(planned_passages(plans))
    assert found.shape == best.shape == (2, identifiers.width)
    twins = [reference.planned_identifiers(rows, of_query) for of_query in plans]
    for query, twin in enumerate(twins):
        there = found[query] >= 0
        tokens = [tuple(t for t in row if t) for row in of_view.tokens[found[query][there]]]
        assert list(zip(tokens, best[query][there].tolist(), strict=True)) == twin
        assert not there[len(twin) :].any() and (best[query][~there] == -np.inf).all()

    result, _ = search(padded(found[:, :COUNT], of_view.tokens), best[:, :COUNT], 2, False)
    for query, twin in enumerate(twins):
        expected = reference.guided_search(model, query, twin, 2) if twin else []
        written = [tuple(t for t in row if t) for row in result.tokens[query].tolist()]
        assert written == [row for row, _ in expected] + [()] * (2 - len(expected))
        values = [log_prob for _, log_prob in expected]  # without the bonus
        np.testing.assert_allclose(result.log_probs[query][: len(values)], values, atol=2e-4)
