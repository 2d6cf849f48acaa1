"""The ranking losses against double loops, and what must never change them."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dgr_jax.losses import ranking
from tests.reference import ranking as twin

L = 6
CASES = [
    ("distilled_ranknet", {}),
    ("distilled_ranknet", {"margin": 0.25, "margin_gap": 0.125, "position_weights": "uniform"}),
    ("ltrgr", {}),
    ("ltrgr", {"positive_above": 0.0, "margin": 0.5}),
    ("ranknet", {"temperature": 2.0}),
    ("listnet", {"temperature": 0.5, "teacher_temperature": 3.0}),
    ("listmle", {}),
    ("listmle", {"temperature": 2.5}),
    ("lambda_loss", {"gains": "rank"}),
    ("lambda_loss", {"gains": "exponential", "temperature": 0.7}),
    ("kl_divergence", {"temperature": 1.5}),
    ("margin_mse", {"teacher_temperature": 2.0}),
]
IDS = [
    name + ("-" + "-".join(map(str, options.values())) if options else "")
    for name, options in CASES
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
each_loss = pytest.mark.parametrize("name", sorted(ranking.LOSSES))


def value_and_grad(name, options):
    """jitted (losses [B], gradient [B, L], teacher's gradient); compiled once a case and shape."""
    key = (name, tuple(options.items()))
    if key not in COMPILED:
        loss = ranking.bind(name, **options)

        def both(student, teacher, mask):
            values, pull = jax.vjp(lambda s, t: loss(s, t, mask), student, teacher)
            return values, *pull(jnp.ones_like(values))

        COMPILED[key] = jax.jit(both)
    return COMPILED[key]


COMPILED = {}


def lists(seed, batch=8, length=L):
    """Lists with ties on both sides, masks of every size, and arbitrary values where masked."""
    rng = np.random.default_rng(seed)
    # Multiples of 1/4 are exact in binary: a hinge that is exactly 0 is so on both sides.
    grid = rng.choice([1, 4])
    student, teacher = rng.normal(scale=2 * grid, size=(2, batch, length)).round() / grid
    mask = rng.random((batch, length)) < rng.random((batch, 1)) * 1.4
    garbage = rng.choice([np.nan, np.inf, -np.inf, 1e30, 7.0], size=(batch, length))
    student = np.where(mask, student, garbage).astype(np.float32)
    teacher = np.where(mask, teacher, garbage[:, ::-1]).astype(np.float32)
    return student, teacher, mask


@each_case
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_loss_equals_the_double_loop(name, options, seed):
    student, teacher, mask = lists(seed)
    got, _, _ = value_and_grad(name, options)(student, teacher, mask)
    expected = [
        getattr(twin, name)(*row, **options) for row in zip(student, teacher, mask, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert got.dtype == jnp.float32


@each_case
def test_gradient_equals_finite_differences_of_the_double_loop(name, options):
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 8, L)).astype(np.float32)
    mask = np.arange(L) < np.array([[6], [5], [3], [2], [6], [4], [6], [0]])
    _, got, _ = value_and_grad(name, options)(student, teacher, mask)
    step = 1e-5
    for b, i in np.ndindex(8, L):
        up, down = student[b].astype(np.float64), student[b].astype(np.float64)
        up[i] += step
        down[i] -= step
        high, low = (getattr(twin, name)(x, teacher[b], mask[b], **options) for x in (up, down))
        assert got[b, i] == pytest.approx((high - low) / (2 * step), abs=2e-4, rel=2e-4)


@each_case
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_order_of_the_list_changes_nothing(name, options, seed):
    student, teacher, mask = lists(seed)
    order = np.random.default_rng(seed).permutation(L)
    loss, gradient, _ = value_and_grad(name, options)(student, teacher, mask)
    moved = value_and_grad(name, options)(student[:, order], teacher[:, order], mask[:, order])
    np.testing.assert_allclose(moved[0], loss, rtol=1e-5, atol=1e-6)
    if name != "lambda_loss":  # there, passages tied on both sides stand in the list's order
        np.testing.assert_allclose(moved[1], gradient[:, order], rtol=1e-4, atol=1e-5)


@each_case
def test_padding_changes_nothing_and_gets_no_gradient(name, options):
    student, teacher, _ = np.random.default_rng(1).normal(size=(3, 8, L)).astype(np.float32)
    front, back = np.arange(L) < 4, np.arange(L) >= 2
    shift = (np.arange(L) - 2) % L  # the first four places, moved to the last four
    loss, gradient, _ = value_and_grad(name, options)(
        np.where(front, student, np.nan),
        np.where(front, teacher, np.inf),
        np.tile(front, (8, 1)),
    )
    moved_loss, moved_gradient, _ = value_and_grad(name, options)(
        np.where(back, student[:, shift], -np.inf),
        np.where(back, teacher[:, shift], np.nan),
        np.tile(back, (8, 1)),
    )
    np.testing.assert_allclose(moved_loss, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved_gradient[:, 2:], gradient[:, :4], rtol=1e-4, atol=1e-6)
    assert not np.any(gradient[:, 4:]) and not np.any(moved_gradient[:, :2])


def degenerate_lists():
    """Fully masked; one passage; satisfied; student tied; teacher tied; both tied, garbage masked;
    then two common lists."""
    nan, inf = np.nan, np.inf
    student = [
        [nan, inf, -inf, nan, inf, -inf],
        [nan, -3, inf, nan, -inf, inf],
        [100, 80, 60, 40, 20, 0],
        [2, 2, 2, 2, 2, 2],
        [1, 2, 3, 4, 5, 6],
        [0, 0, 0, inf, -inf, nan],
        [1, 3, 2, 5, 4, 6],
        [1, 3, 2, 5, 4, 6],
    ]
    teacher = [
        [inf, nan, -inf, nan, -inf, inf],
        [inf, 2, -inf, nan, nan, -inf],
        [6, 5, 4, 3, 2, 1],
        [1, 2, 3, 4, 5, 6],
        [3, 3, 3, 3, 3, 3],
        [1, 1, 1, -inf, nan, inf],
        [6, 2, 1, 4, 3, 5],
        [1, 2, 2, 1, 0, 0],
    ]
    mask = np.ones((8, L), bool)
    mask[0], mask[1] = False, np.arange(L) == 1
    mask[5, 3:] = False
    return np.array(student, np.float32), np.array(teacher, np.float32), mask


@each_case
def test_gradient_is_finite_on_lists_with_nothing_to_teach(name, options):
    student, teacher, mask = degenerate_lists()
    loss, gradient, _ = value_and_grad(name, options)(student, teacher, mask)
    assert np.all(np.isfinite(loss)) and np.all(np.isfinite(gradient))
    assert not np.any(np.asarray(gradient)[~mask])
    np.testing.assert_array_equal(loss[:2], 0)
    np.testing.assert_array_equal(gradient[:2], 0)


@pytest.mark.parametrize("name", ["distilled_ranknet", "ltrgr", "ranknet", "lambda_loss"])
def test_a_teacher_without_an_order_teaches_nothing(name):
    loss, gradient, _ = value_and_grad(name, {})(*degenerate_lists())
    np.testing.assert_array_equal(loss[4:6], 0)
    np.testing.assert_array_equal(gradient[4:6], 0)


@pytest.mark.parametrize("name", ["distilled_ranknet", "ltrgr"])
def test_a_satisfied_list_costs_exactly_nothing(name):
    loss, gradient, _ = value_and_grad(name, {})(*degenerate_lists())
    assert loss[2] == 0 and not np.any(gradient[2])
    assert loss[6] > 0 and np.any(gradient[6])


@each_loss
def test_a_tied_student_still_learns(name):
    _, gradient, _ = value_and_grad(name, {})(*degenerate_lists())
    assert gradient[3, 0] > 0 > gradient[3, -1]


@jax.jit
def every_loss_otherwise(student, teacher, mask):
    """{loss: (vmapped over single lists, loss of a bfloat16 student, its gradient)}."""
    half, results = student.astype(jnp.bfloat16), {}
    for name in ranking.LOSSES:
        loss = ranking.bind(name)
        value, pull = jax.vjp(lambda s, loss=loss: loss(s, teacher, mask), half)
        gradient = pull(jnp.ones_like(value))[0]
        results[name] = jax.vmap(loss)(student, teacher, mask), value, gradient
    return results


@each_loss
def test_vmap_over_single_lists_gives_the_batch(name):
    student, teacher, mask = lists(5)
    batch, _, _ = value_and_grad(name, {})(student, teacher, mask)
    one_by_one, _, _ = every_loss_otherwise(student, teacher, mask)[name]
    np.testing.assert_allclose(one_by_one, batch, rtol=1e-5, atol=1e-6)


@each_loss
def test_bfloat16_students_are_scored_in_float32(name):
    student, teacher, mask = lists(5)
    _, loss, gradient = every_loss_otherwise(student, teacher, mask)[name]
    rounded = student.astype(jnp.bfloat16).astype(np.float32)
    full, _, _ = value_and_grad(name, {})(rounded, teacher, mask)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, full, rtol=1e-5, atol=1e-6)


@each_loss
def test_no_gradient_reaches_the_teacher(name):
    student, teacher, mask = lists(7)
    _, student_gradient, teacher_gradient = value_and_grad(name, {})(student, teacher, mask)
    assert np.any(student_gradient) and not np.any(teacher_gradient)


def test_distilled_ranknet_by_hand():
    # The order is 2, 0, 1: (2,0) 3*(1-5+1) < 0, (2,1) 3*(4-5+1.5) = 1.5, (0,1) (4-1+1)/2 = 2.
    student, teacher = np.array([[1.0, 4.0, 5.0]]), np.array([[0.2, 0.1, 0.3]])
    loss, _, _ = value_and_grad("distilled_ranknet", {})(student, teacher, np.ones((1, 3), bool))
    assert float(loss[0]) == pytest.approx((1.5 + 2.0) / 2)


def test_exponential_gains_do_not_overflow():
    teacher = np.array([[300.0, 299.0, 0.0]])
    student, mask = np.array([[0.0, 1.0, 2.0]]), np.ones((1, 3), bool)
    loss, _, _ = value_and_grad("lambda_loss", {"gains": "exponential"})(student, teacher, mask)
    assert float(loss[0]) == pytest.approx(
        twin.lambda_loss(student[0], teacher[0], mask[0], gains="exponential"), rel=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s, t, m: ranking.distilled_ranknet(s, t, m, position_weights="linear"),
            "position_weights must be one of 'reciprocal', 'uniform'; got 'linear'",
        ),
        (
            lambda s, t, m: ranking.lambda_loss(s, t, m, gains="linear"),
            "gains must be one of 'rank', 'exponential'; got 'linear'",
        ),
        (
            lambda s, t, m: ranking.ranknet(s, t, m, temperature=0.0),
            "temperature must be above 0; got 0.0",
        ),
        (
            lambda s, t, m: ranking.kl_divergence(s, t, m, teacher_temperature=-1.0),
            "teacher_temperature must be above 0; got -1.0",
        ),
        (
            lambda s, t, m: ranking.listmle(s, t[:, :2], m),
            "student, teacher and mask must have one shape [..., L]; got (2, 3), (2, 2) and (2, 3)",
        ),
        (
            lambda s, t, m: ranking.bind("ranknets"),
            (
                "unknown ranking loss 'ranknets': expected one of ['distilled_ranknet', "
                "'kl_divergence', 'lambda_loss', 'listmle', 'listnet', 'ltrgr', 'margin_mse', "
                "'ranknet']; did you mean 'ranknet'?"
            ),
        ),
        (
            lambda s, t, m: ranking.bind("ranknet", margin=1.0),
            "ranknet has no setting 'margin': expected some of: temperature",
        ),
        (
            lambda s, t, m: ranking.listmle(s, t, m, temperature=0.0),
            "temperature must be above 0; got 0.0",
        ),
    ],
)
def test_wrong_settings_say_what_was_expected(call, message):
    with pytest.raises(ValueError) as caught:
        call(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones((2, 3), bool))
    assert str(caught.value) == message


# The prefix form.


def identifiers(seed, batch=4, length=L, tokens=4):
    """Short codes over three symbols, so that many prefixes are shared; some end early."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(3, 6, size=(batch, length, tokens)).astype(np.int32)
    ends = rng.integers(2, tokens + 1, size=(batch, length, 1))
    codes = np.where(np.arange(tokens) < ends, codes, 0).astype(np.int32)
    flat = codes.reshape(-1, tokens)
    table = {
        key: -rng.random() * 3 for row in flat for key in (tuple(row[:t]) for t in range(1, 5))
    }
    log_probs = np.array([[table[tuple(row[:t])] for t in range(1, tokens + 1)] for row in flat])
    log_probs = np.where(codes != 0, log_probs.reshape(codes.shape), np.nan)
    teacher = rng.normal(size=(batch, length)).round(1)
    mask = rng.random((batch, length)) < 0.8
    return log_probs.astype(np.float32), codes, teacher.astype(np.float32), mask


@pytest.mark.parametrize("name", ["distilled_ranknet", "listnet"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_prefix_loss_equals_the_loop(name, seed):
    options = {"prefix_lengths": (1, 2, 4), "prefix_weights": (0.25, 0.5, 1.0)}
    arrays = identifiers(seed)
    got = PREFIX[name](*arrays)
    loss = getattr(twin, name)
    expected = [twin.prefix_loss(loss, *row, **options) for row in zip(*arrays, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


PREFIX = {
    name: jax.jit(
        partial(
            ranking.prefix_loss,
            ranking.bind(name),
            prefix_lengths=(1, 2, 4),
            prefix_weights=(0.25, 0.5, 1.0),
        )
    )
    for name in ("distilled_ranknet", "listnet")
}


def test_passages_with_one_prefix_are_not_ordered_by_it():
    tokens = jnp.array([[[5, 6], [5, 7], [8, 6]]], jnp.int32)
    log_probs = jnp.array([[[-1.0, -9.0], [-1.0, -1.0], [-3.0, -1.0]]])
    teacher, mask = jnp.array([[3.0, 2.0, 1.0]]), jnp.ones((1, 3), bool)
    # After one token only 5 and 8 are told apart: 3 * max(0, -3 + 1 + 1.5) = 0 is satisfied.
    at = jax.jit(
        partial(ranking.prefix_loss, ranking.distilled_ranknet, log_probs, tokens, teacher, mask),
        static_argnames=("prefix_lengths", "prefix_weights"),
    )
    assert float(at(prefix_lengths=(1,), prefix_weights=(1.0,))[0]) == 0.0
    whole = jax.jit(ranking.distilled_ranknet)(log_probs.sum(-1), teacher, mask)
    np.testing.assert_allclose(at(prefix_lengths=(2,), prefix_weights=(0.5,)), 0.5 * whole)
    kept = ranking.distinct_prefixes(tokens, teacher, mask, 1)
    np.testing.assert_array_equal(kept, [[True, False, True]])
    without_the_best = ranking.distinct_prefixes(tokens, teacher, mask.at[0, 0].set(False), 1)
    np.testing.assert_array_equal(without_the_best, [[False, True, True]])


def test_prefix_gradient_is_finite_with_garbage_and_full_masks():
    log_probs, tokens, teacher, mask = identifiers(2)
    mask[0] = False
    mask[1] = [True] + [False] * (L - 1)
    log_probs[~mask] = np.nan
    loss = PREFIX["distilled_ranknet"]
    gradient = jax.grad(lambda x: loss(x, tokens, teacher, mask).sum())(log_probs)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[:2]) and not np.any(np.asarray(gradient)[tokens == 0])
    assert np.any(gradient[2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prefix_lengths": (2, 2)},
            "prefix_lengths must rise from 1 to at most T = 4; got (2, 2)",
        ),
        (
            {"prefix_lengths": (2, 5)},
            "prefix_lengths must rise from 1 to at most T = 4; got (2, 5)",
        ),
        ({"prefix_lengths": ()}, "prefix_lengths must rise from 1 to at most T = 4; got ()"),
        (
            {"prefix_weights": (1.0,)},
            "prefix_weights must be as many as prefix_lengths (2); got (1.0,)",
        ),
        (
            {"identifier_tokens": jnp.ones((1, 3, 4), bool)},
            (
                "identifier_tokens must be token ids, which tell equal prefixes apart from tied "
                "ones; got dtype bool"
            ),
        ),
        (
            {"identifier_tokens": jnp.ones((1, 3, 2), jnp.int32)},
            (
                "token_log_probs and identifier_tokens must have one shape [..., L, T]; "
                "got (1, 3, 4) and (1, 3, 2)"
            ),
        ),
    ],
)
def test_wrong_prefixes_say_what_was_expected(changes, message):
    arguments = {
        "token_log_probs": jnp.zeros((1, 3, 4)),
        "identifier_tokens": jnp.ones((1, 3, 4), jnp.int32),
        "teacher": jnp.zeros((1, 3)),
        "mask": jnp.ones((1, 3), bool),
        "prefix_lengths": (2, 4),
        "prefix_weights": (0.5, 1.0),
    }
    with pytest.raises(ValueError) as caught:
        ranking.prefix_loss(ranking.ranknet, **(arguments | changes))
    assert str(caught.value) == message
