"""Scores of passages: worked examples, a slow twin, gradients, and what must change nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.decoding.passage_scoring import (
    BODY,
    QUERY,
    TITLE,
    VIEWS,
    Identifiers,
    Scoring,
    identifier_weights,
    occurrences,
    passage_scores,
)
from tests.reference import passage_scoring as reference

many = settings(max_examples=100, deadline=None)
K, T, E, N = 6, 5, 24, 1000.0  # one shape for all examples, so that the score compiles once

compiled = functools.partial(  # quick to compile, slow to run
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
weigh = compiled(identifier_weights, static_argnames="scoring")


@functools.partial(compiled, static_argnames=("scoring", "special_ids"))
def both(found, num_tokens, **settings):
    """(scores, their gradient): one program for all tests."""
    of = lambda log_probs: passage_scores(
        found._replace(log_probs=log_probs), num_tokens, **settings
    )
    scores, pull = jax.vjp(of, found.log_probs)
    return scores, pull(jnp.ones_like(scores))[0]


def score(found, num_tokens, **settings):
    return np.asarray(both(found, num_tokens, **settings)[0])


def gradient(found, num_tokens):
    return np.asarray(both(found, num_tokens)[1])


def arrays(passage, identifiers, special_ids=(1,)):
    """Identifiers of one passage from tuples as of the twin, padded."""
    found = Identifiers(
        log_probs=np.full(K, np.nan, np.float32),
        counts=np.full(K, -7, np.int32),
        tokens=np.zeros((K, T), np.int32),
        views=np.zeros(K, np.int32),
        mask=np.arange(K) < len(identifiers),
        spans=np.full(E, -1, np.int32),
        starts=np.zeros(E, np.int32),
    )
    for k, (log_prob, count, tokens, view) in enumerate(identifiers):
        found.log_probs[k], found.counts[k] = log_prob, count
        found.tokens[k, : len(tokens)] = tokens
        found.views[k] = VIEWS.index(view)
    spans = np.zeros((K, T), np.int32)
    for k in np.flatnonzero(found.views == BODY):
        text = [token for token in identifiers[k][2] if token not in special_ids]
        spans[k, : len(text)] = text
    spans, starts = occurrences(np.array(passage), spans)
    found.spans[: len(spans)], found.starts[: len(spans)] = spans, starts
    return found


def scored(passage, identifiers, **settings):
    return float(score(arrays(passage, identifiers), N, **settings))


# worked by hand


def weights(log_probs, counts, views, num_tokens, **settings):
    given = (np.array(x) for x in (np.float32(log_probs), counts, views))
    return np.asarray(weigh(*given, num_tokens, scoring=Scoring(**settings))).tolist()


def test_weights_worked_by_hand():
    # F = 5 of N = 95: e^c = 10 / 100, odds 1/9.
    # l = log 1/2 has odds 1: w = (log 9)^2; l = log 9/10 has odds 9: w = (2 log 9)^2.
    # l = log 1/10 is as likely as in the corpus, l = log 1/20 less likely: 0.
    log9 = math.log(9)
    got = weights(np.log([0.5, 0.9, 0.1, 0.05]), [5] * 4, [BODY] * 4, 95)
    assert got == pytest.approx([log9**2, 4 * log9**2, 0, 0], rel=1e-5, abs=1e-6)
    assert weights([math.log(0.5)], [5], [TITLE], 95, exponent=1) == pytest.approx([log9])
    # smoothing 10: e^c = 15 / 105 = 1/7, odds 1/6.
    assert weights([math.log(0.5)], [5], [BODY], 95, smoothing=10) == pytest.approx(
        [math.log(6) ** 2]
    )


def test_pseudo_queries_are_shifted_and_capped():
    # -20 + 14 = -6, as a title of -6; -10 + 14 is cut at -1, as a title of -1.
    shifted = weights([-20.0, -10.0, 0.0], [1] * 3, [QUERY] * 3, 10_000)
    assert shifted == weights([-6.0, -1.0, -1.0], [1] * 3, [TITLE] * 3, 10_000)
    assert shifted[0] > 0
    other = weights([-10.0], [1], [QUERY], 10_000, query_shift=4, query_cap=-3)
    assert other == weights([-6.0], [1], [TITLE], 10_000)
    assert weights([-1.0], [1], [QUERY], 10_000, query_cap=-3) == weights(
        [-3.0], [1], [TITLE], 10_000
    )


@functools.cache
def plain(log_prob, count=1):
    """w of a title or body span, from the twin."""
    return reference.weight(log_prob, count, "body", N, Scoring())


def test_covered_tokens_worked_by_hand():
    # Best first: "7 8 7 9" (3 different tokens, all new: r = 1); "8 5": one of two is covered,
    # r = 0.2 + 0.8 / 2 = 0.6; "9": covered, r = 0.2.
    identifiers = [
        (-4.0, 1, [9], "query"),
        (-2.0, 1, [8, 5], "title"),
        (-0.5, 1, [7, 8, 7, 9], "title"),
    ]
    w = [reference.weight(x, f, view, N, Scoring()) for x, f, _, view in identifiers]
    assert w[2] > w[0] > w[1]  # the pseudo-query is capped at -1
    assert scored([], identifiers) == pytest.approx(w[2] + 0.2 * w[0] + 0.6 * w[1], rel=1e-5)


def test_overlapping_spans_worked_by_hand():
    text = [3, 4, 5, 6, 7, 3, 4]
    best = (-1.0, 1, [4, 5], "body")
    # [5, 6] shares position 2 with the best; [6, 7] is beside it; [3, 4] is free at the end only.
    assert scored(text, [best, (-2.0, 1, [5, 6], "body")]) == pytest.approx(plain(-1.0), rel=1e-5)
    apart = scored(text, [best, (-2.0, 1, [6, 7], "body")])
    assert apart == pytest.approx(plain(-1.0) + plain(-2.0), rel=1e-5)
    again = scored(text, [best, (-2.0, 1, [3, 4], "body")])
    assert again == pytest.approx(plain(-1.0) + 0.6 * plain(-2.0), rel=1e-5)
    # A title with the same tokens overlaps nothing.
    title = scored(text, [best, (-2.0, 1, [5, 6], "title")])
    assert title == pytest.approx(plain(-1.0) + 0.6 * plain(-2.0), rel=1e-5)
    # What does not count neither covers nor blocks: [5, 6] is out, so [6, 7] is in, all new.
    chain = [best, (-2.0, 1, [5, 6], "body"), (-3.0, 1, [6, 7], "body")]
    assert scored(text, chain) == pytest.approx(plain(-1.0) + plain(-3.0), rel=1e-5)
    # A prefix lies inside of its span; the better of both counts.
    prefix = [best, (-0.5, 1, [4], "body")]
    assert scored(text, prefix) == pytest.approx(plain(-0.5), rel=1e-5)


def test_all_occurrences_of_a_counted_span_block():
    text = [3, 4, 9, 9, 3, 4, 5]
    both = [(-1.0, 1, [3, 4], "body"), (-2.0, 1, [4, 5], "body")]
    assert scored(text, both) == pytest.approx(plain(-1.0), rel=1e-5)


def test_spans_without_a_listed_occurrence_overlap_nothing():
    both = [(-1.0, 1, [3, 4], "body"), (-2.0, 1, [4, 5], "body")]
    unseen = arrays([3, 4, 5], both)._replace(spans=np.full(E, -1, np.int32))
    expected = plain(-1.0) + 0.6 * plain(-2.0)
    assert float(score(unseen, N)) == pytest.approx(expected, rel=1e-5)
    none = unseen._replace(spans=unseen.spans[:0], starts=unseen.starts[:0])
    assert float(score(none, N)) == pytest.approx(expected, rel=1e-5)


def test_special_tokens_are_not_counted():
    # Without the closing token, "7 1" is one token, all covered: r = 0.2.
    ended = [(-1.0, 1, [7, 8, 1], "title"), (-2.0, 1, [7, 1], "title")]
    assert scored([], ended) == pytest.approx(plain(-1.0) + 0.2 * plain(-2.0), rel=1e-5)
    # As a text token it is covered: 1 of 2 new is 0, r = 0.2; as no token of its own, nothing is.
    other = [(-1.0, 1, [7, 9], "title"), (-2.0, 1, [8, 9], "title")]
    marked = scored([], other, special_ids=(1, 9))
    assert marked == pytest.approx(plain(-1.0) + plain(-2.0), rel=1e-5)
    # A marker is no part of a span: [3, 4] ends before 5.
    spans = [(-1.0, 1, [1, 3, 4], "body"), (-2.0, 1, [5, 1], "body")]
    assert scored([3, 4, 5], spans) == pytest.approx(plain(-1.0) + plain(-2.0), rel=1e-5)
    assert scored([], [(-1.0, 1, [1], "title")]) == 0


def test_equal_weights_are_ordered_by_log_prob_then_place():
    # Both pseudo-queries are capped: the likelier one covers the other, wherever it stands.
    w = reference.weight(-1.0, 1, "query", N, Scoring())
    likely, other = (-1.0, 1, [7, 8, 9], "query"), (-2.0, 1, [7], "query")
    assert scored([], [likely, other]) == scored([], [other, likely]) == pytest.approx(1.2 * w)
    # Equal in all: the first covers. [7] first: 1 + (0.2 + 0.8 * 2 / 3).
    first, second = (-2.0, 1, [7], "query"), (-2.0, 1, [7, 8, 9], "query")
    assert scored([], [first, second]) == pytest.approx((1.2 + 1.6 / 3) * w, rel=1e-5)
    assert scored([], [second, first]) == pytest.approx(1.2 * w, rel=1e-5)


# against the twin

token = st.integers(1, 6)  # 1 is a closing token: special
log_prob = st.sampled_from([0.0, -1e-7, -0.25, -1.0, -2.5, -4.0, -14.0, -15.5, -300.0, -math.inf])
identifier = st.tuples(
    log_prob,
    st.sampled_from([0, 1, 5, 40, 900, 5000]),
    st.lists(token, min_size=1, max_size=T - 1),
    st.sampled_from(VIEWS),
)


@st.composite
def passages(draw):
    """(passage, identifiers): most body spans are taken from the passage."""
    passage = draw(st.lists(st.integers(2, 6), max_size=9))
    identifiers = draw(st.lists(identifier, max_size=K))
    if passage:
        begin = st.integers(0, len(passage) - 1)
        span = st.tuples(begin, st.integers(1, 3)).map(lambda x: passage[x[0] : x[0] + x[1]])
        spans = st.tuples(log_prob, st.sampled_from([1, 5, 40]), span, st.just("body"))
        identifiers = draw(st.permutations(identifiers[:2] + draw(st.lists(spans, max_size=K - 2))))
    return passage, identifiers


@many
@given(case=passages())
def test_scores_are_those_of_the_twin(case):
    passage, identifiers = case
    got = scored(passage, identifiers)
    expected = reference.passage_score(passage, identifiers, N, Scoring())
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(case=passages())
def test_scores_of_other_settings_are_those_of_the_twin(case):
    scoring = Scoring(exponent=1.5, repetition=0.3, smoothing=2, query_shift=3, query_cap=-0.5)
    expected = reference.passage_score(*case, 5000.0, scoring, special_ids=(1, 4))
    found = arrays(*case, special_ids=(1, 4))
    got = float(score(found, 5000.0, scoring=scoring, special_ids=(1, 4)))
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


@many
@given(case=passages(), data=st.data())
def test_order_padding_and_masked_values_change_nothing(case, data):
    found = arrays(*case)
    keys = [(reference.weight(i[0], i[1], i[3], N, Scoring()), i[0]) for i in case[1]]
    order = np.array(data.draw(st.permutations(range(K))))
    if len(set(keys)) < len(keys):  # equal ones are taken in the order given
        order = np.sort(order)
    events = np.array(data.draw(st.permutations(range(E))))
    new_place = np.append(np.argsort(order), -1)
    moved = Identifiers(
        *(leaf[order] for leaf in found[:5]),
        spans=new_place[found.spans][events].astype(np.int32),
        starts=found.starts[events],
    )
    hidden = ~moved.mask
    moved.log_probs[hidden] = data.draw(st.sampled_from([0.0, 5.0, np.inf, np.nan, -np.inf]))
    moved.tokens[hidden] = data.draw(st.integers(0, 9))
    moved.counts[hidden], moved.views[hidden] = 1, BODY
    shifted = moved._replace(tokens=np.roll(moved.tokens, 1, 1))  # padding may stand in front, too
    longer = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), moved)
    longer = longer._replace(spans=np.append(moved.spans, np.full(E, -1, np.int32)))
    expected = float(score(found, N))
    for other in (moved, shifted, longer):
        assert float(score(other, N)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(cases=st.lists(passages(), min_size=6, max_size=6))
def test_a_batch_scores_each_of_its_passages(cases):
    found = [arrays(*case) for case in cases]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(2, 3, *leaves[0].shape), *found)
    got = score(batch, N)
    assert got.shape == (2, 3) and got.dtype == np.float32
    each = [float(score(one, N)) for one in found]
    np.testing.assert_allclose(got.reshape(-1), each, rtol=1e-6)


# gradients


@many
@given(case=passages())
def test_gradients_are_finite_and_0_for_masked_identifiers(case):
    found = arrays(*case)
    got = gradient(found, N)
    assert np.isfinite(got).all()
    assert (got >= 0).all()
    assert (got[~found.mask] == 0).all()
    value = score(found, N)
    assert np.isfinite(value)


def test_gradient_worked_by_hand():
    # w = x^2 with dx / dl = 1 / (1 - e^l); r is a constant: 1, then 0.6.
    identifiers = [(-0.5, 1, [7, 8], "title"), (-2.0, 1, [8, 9], "title"), (-3.0, 1, [8], "query")]
    got = gradient(arrays([], identifiers), N)
    slope = lambda x: 2 * math.sqrt(plain(x)) / (1 - math.exp(x))
    assert got[:3] == pytest.approx([slope(-0.5), 0.6 * slope(-2.0), 0], rel=1e-4)
    # A pseudo-query below the cap has a gradient, that of its shifted log-probability.
    below = gradient(arrays([], [(-16.0, 1, [8], "query")]), N)
    assert below[0] == pytest.approx(slope(-2.0), rel=1e-4)


def test_gradients_at_the_ends():
    extremes = [0.0, -1e-8, -1e-6, -1e-5, -1e-3, -20.0, -1e5, -math.inf]
    weight = lambda log_prob: identifier_weights(log_prob, 1, TITLE, 1e9)
    value, slope = compiled(jax.vmap(jax.value_and_grad(weight)))(jnp.array(extremes))
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    assert (np.diff(value) <= 0).all()
    assert value[0] == value[1] and slope[:2].tolist() == [0, 0]
    assert slope[3] > slope[4] > slope[5] == 0  # 1e-9 is less likely than in the corpus
    assert value[-2:].tolist() == [0, 0] and slope[-2:].tolist() == [0, 0]


def test_a_corpus_beyond_int32_and_a_count_beyond_the_corpus():
    most = float(score(arrays([], [(-1.0, 1, [7], "title")]), 3.5e9))
    expected = reference.weight(-1.0, 1, "title", 3_500_000_000, Scoring())
    assert most == pytest.approx(expected, rel=1e-5)
    found = arrays([], [(-1e-7, 20, [7], "title"), (-1.0, 20, [8], "title")])
    assert np.isfinite(score(found, 10.0)) and np.isfinite(gradient(found, 10.0)).all()


# the rest


def test_occurrences_in_several_texts():
    text = np.array([3, 3, 3, 0, 4, 3, 3], np.uint16)
    spans = np.array([[3, 3, 0], [4, 0, 0], [0, 0, 0], [9, 9, 9], [3, 4, 0], [3, 3, 3]])
    owners, starts = occurrences(text, spans)
    assert owners.tolist() == [0, 0, 0, 1, 5]
    assert starts.tolist() == [0, 1, 5, 4, 0]
    assert owners.dtype == starts.dtype == np.int32
    owners, starts = occurrences(text[:1], spans)
    assert owners.tolist() == starts.tolist() == []


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("exponent", 0, "above 0"),
        ("repetition", 1.1, "0 to 1"),
        ("smoothing", 0.0, "above 0"),
        ("query_cap", 0.0, "below 0"),
        ("common", 0, "at least 1"),
        ("max_passages", 0, "at least 1"),
    ],
)
def test_settings_outside_of_their_ranges(field, value, expected):
    with pytest.raises(ValueError) as error:
        Scoring(**{field: value})
    assert str(error.value) == f"Scoring.{field}: got {value}, expected {expected}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.ones(2, int)}, "counts has shape (2,); expected (6,), that of log_probs"),
        (
            {"tokens": np.ones(6, int)},
            "tokens have shape (6,); expected (6,) and a length: those of log_probs, then the "
            "tokens",
        ),
        (
            {"spans": np.ones((2, 3), int)},
            "spans have shape (2, 3); expected () and a number of occurrences",
        ),
        ({"starts": np.ones(3, int)}, "starts have shape (3,); expected (24,), that of spans"),
    ],
)
def test_shapes_that_do_not_belong_together(change, message):
    with pytest.raises(ValueError) as error:
        passage_scores(arrays([], [])._replace(**change), N)
    assert str(error.value) == f"passage_scores: {message}"


def test_a_training_step_needs_little_memory():
    # 8 queries, 6 passages, 40 identifiers of 10 tokens; a table of 32,000 tokens a passage would
    # take 1.5 MB as bool, one an identifier 60 MB.
    shape = (8, 6)
    found = Identifiers(
        *(jax.ShapeDtypeStruct((*shape, 40), kind) for kind in (jnp.float32, jnp.int32)),
        jax.ShapeDtypeStruct((*shape, 40, 10), jnp.int32),
        *(jax.ShapeDtypeStruct((*shape, 40), kind) for kind in (jnp.int32, bool)),
        *[jax.ShapeDtypeStruct((*shape, 128), jnp.int32)] * 2,
    )
    memory = both.lower(found, 1e8).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 << 20
