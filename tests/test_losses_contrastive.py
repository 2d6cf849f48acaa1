"""The contrastive losses against their formulas, at extreme scores, and what their gradients do."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dgr_jax.losses import contrastive
from tests.reference import contrastive as twin

BATCH, N = 8, 7
KEY = np.array([0, 5], np.uint32)
# All defaults, and other settings of each loss.
OPTIONS = (
    {},
    {
        "single_lh": {"temperature": 2.0},
        "rand1_lh": {"temperature": 0.5},
        "joint_lh": {"per_positive": True, "temperature": 2.0},
        "sum_marg_lh": {"temperature": 0.5},
        "lse_pair": {"temperature": 3.0},
    },
)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
each_loss = pytest.mark.parametrize("name", sorted(contrastive.LOSSES))


@functools.cache
def _compiled(which):
    """All losses and gradients in one program, as compiling takes most of the time."""
    bound = {
        name: functools.partial(loss, **OPTIONS[which].get(name, {}))
        for name, loss in contrastive.LOSSES.items()
    }

    def both(scores, positive, mask, key):
        results = {}
        for name, loss in bound.items():
            values, pull = jax.vjp(lambda s, f=loss: f(s, positive, mask, key), scores)
            results[name] = values, pull(jnp.ones_like(values))[0]
        return results

    return jax.jit(both)


def padded(x, dtype=None):
    """[B, n] -> [8, 7], so that all tests share a program."""
    x = np.asarray(x, dtype)
    return np.pad(x, [(0, BATCH - x.shape[0]), (0, N - x.shape[1])])


def value_and_grad(name, scores, positive, mask, *, which=0):
    """(losses [B], gradient of the scores [B, n]) in float64."""
    arrays = padded(scores), padded(positive, bool), padded(mask, bool)
    values, grad = _compiled(which)(*arrays, KEY)[name]
    batch, width = np.shape(scores)
    return np.asarray(values, np.float64)[:batch], np.asarray(grad, np.float64)[:batch, :width]


def lists(seed, batch=BATCH):
    """Scores with arbitrary values where masked, and masks of every size."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=rng.choice([0.1, 3.0, 40.0]), size=(batch, N)).astype(np.float32)
    mask = rng.random((batch, N)) < rng.random((batch, 1)) * 1.4
    scores[~mask] = rng.choice([np.nan, np.inf, -np.inf, 1e30], (~mask).sum())
    return scores, rng.random((batch, N)) < rng.random((batch, 1)) * 1.2, mask


def expected(name, scores, positive, mask, options):
    if name != "rand1_lh":
        rows = zip(scores, positive, mask, strict=True)
        return [getattr(twin, name)(*row, **options) for row in rows]
    draws = np.asarray(jax.random.uniform(KEY, (len(scores), 1)))[:, 0]
    number = np.floor(draws * (positive & mask).sum(1)).astype(int)
    return [
        twin.rand1_lh(*row, draw=draw, **options)
        for *row, draw in zip(scores, positive, mask, number, strict=True)
    ]


@each_loss
@pytest.mark.parametrize("which", [0, slow(1)], ids=["defaults", "others"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equal_the_formulas(name, which, seed):
    case = lists(seed)
    values, grad = value_and_grad(name, *case, which=which)
    options = OPTIONS[which].get(name, {})
    np.testing.assert_allclose(values, expected(name, *case, options), rtol=2e-5, atol=1e-5)
    _, positive, mask = case
    assert np.isfinite(grad).all() and not grad[~mask].any()
    usable = (positive & mask).any(1) & (~positive & mask).any(1)
    assert not values[~usable].any() and not grad[~usable].any()


@each_loss
def test_gradients_are_those_of_differences(name):
    scores = np.array([[1.0, -0.5, 0.25, 2.0, -1.0, 0.0, 0.5]], np.float32)
    positive, mask = np.array([[1, 1, 0, 0, 1, 0, 0]]), np.array([[1, 1, 1, 1, 1, 1, 0]])
    _, grad = value_and_grad(name, scores, positive, mask)
    step = 1e-2
    for i in range(N):
        up, down = scores.copy(), scores.copy()
        up[0, i] += step
        down[0, i] -= step
        change = [value_and_grad(name, s, positive, mask)[0][0] for s in (up, down)]
        assert grad[0, i] == pytest.approx((change[0] - change[1]) / (2 * step), abs=2e-3)
    assert grad.sum() == pytest.approx(0.0, abs=1e-6)  # a common shift changes nothing


@each_loss
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_extreme_scores(name, dtype):
    """The loss is finite and of the right size: that of a positive far too low is its distance."""
    huge = 2.0**100
    scores = np.array(
        [[-huge, huge, huge], [huge, -huge, -huge], [huge, huge, huge], [1e4, -1e4, 0.0]],
        jnp.dtype(dtype),
    )
    positive = np.array([[1, 0, 0]] * 3 + [[0, 1, 0]])
    values, grad = value_and_grad(name, scores, positive, np.ones((4, 3)))
    np.testing.assert_allclose(values[0], 2 * huge, rtol=1e-6)
    np.testing.assert_allclose(values[1], 0, atol=1e-30)
    np.testing.assert_allclose(values[2], np.log(3), rtol=1e-6)
    np.testing.assert_allclose(values[3], float(scores[3, 0] - scores[3, 1]), rtol=1e-6)
    np.testing.assert_allclose(grad[0], [-1, 0.5, 0.5], atol=1e-2)
    np.testing.assert_allclose(grad[1], 0)
    np.testing.assert_allclose(grad[2], [-2 / 3, 1 / 3, 1 / 3], atol=1e-2)
    np.testing.assert_allclose(grad[3], [1, -1, 0], atol=1e-2)


@pytest.mark.parametrize("name", sorted(contrastive.LOSSES.keys() - {"joint_lh"}))
def test_satisfied_to_the_last_digit(name):
    """A small loss is exact, although it is the difference of two large sums."""
    values, _ = value_and_grad(name, np.array([[1020.0, 1000.0]], np.float32), [[1, 0]], [[1, 1]])
    np.testing.assert_allclose(values, np.exp(-20.0), rtol=1e-4)


@each_loss
def test_order_changes_nothing_but_the_first_positive(name):
    scores, positive, mask = lists(3)
    positive[:, 3:] = False
    order = np.array([0, 1, 2, 6, 4, 5, 3])
    turned = [x[:, order] for x in (scores, positive, mask)]
    for ours, theirs in zip(
        value_and_grad(name, scores, positive, mask), value_and_grad(name, *turned), strict=True
    ):
        np.testing.assert_allclose(ours if ours.ndim == 1 else ours[:, order], theirs, rtol=1e-5)


def test_with_one_positive_all_are_the_same():
    scores = np.random.default_rng(0).normal(size=(4, N)).astype(np.float32)
    positive, mask = np.eye(4, N), np.ones((4, N))
    values = {k: value_and_grad(k, scores, positive, mask) for k in contrastive.LOSSES}
    for value, grad in values.values():
        np.testing.assert_allclose(value, values["single_lh"][0], rtol=1e-5)
        np.testing.assert_allclose(grad, values["single_lh"][1], atol=1e-6)


# what each does to its positives: a strong one, a weak one, two negatives

APART = np.array([[2.0, -1.0, 0.5, 0.0]], np.float32)
TWO = np.array([[1, 1, 0, 0]])
ALL = np.ones((1, 4))


def descended(name, steps=400, rate=0.05):
    """The scores after gradient descent on them."""
    scores = APART.copy()
    for _ in range(steps):
        scores -= rate * value_and_grad(name, scores, TWO, ALL)[1].astype(np.float32)
    return scores[0]


def test_joint_pulls_positives_equal():
    _, grad = value_and_grad("joint_lh", APART, TWO, ALL)
    assert grad[0, 0] > 0 > grad[0, 1]  # the strong one takes more than its half: it goes down
    strong, weak, *negatives = descended("joint_lh")
    assert abs(strong - weak) < 0.01 and weak > max(negatives) + 3


def test_sum_marginal_favours_the_strong_one():
    _, grad = value_and_grad("sum_marg_lh", APART, TWO, ALL)
    assert grad[0, 0] < 0 and grad[0, 1] < 0
    # by the share of each in the positives' mass
    np.testing.assert_allclose(grad[0, 0] / grad[0, 1], np.exp(2.0 + 1.0), rtol=1e-5)
    strong, weak, *_ = descended("sum_marg_lh")
    assert strong - weak > APART[0, 0] - APART[0, 1]


def test_lse_pair_lifts_the_weakest():
    _, grad = value_and_grad("lse_pair", APART, TWO, ALL)
    assert grad[0, 0] < 0 and grad[0, 1] < 0
    np.testing.assert_allclose(grad[0, 1] / grad[0, 0], np.exp(2.0 + 1.0), rtol=1e-5)
    strong, weak, *negatives = descended("lse_pair")
    assert weak > max(negatives) + 2 and strong - weak < 1  # they were 3 apart


def test_the_others_do_not_meet_the_single_one():
    for name in ("single_lh", "rand1_lh"):
        _, grad = value_and_grad(name, APART, TWO, ALL)
        assert np.count_nonzero(grad[0, :2]) == 1


def test_rand1_draws_by_its_key():
    batch = 2000
    scores, mask = np.zeros((batch, 5), np.float32), np.ones((batch, 5), bool)
    positive = np.tile(np.array([1, 0, 1, 1, 0], bool), (batch, 1))
    grads = jax.jit(
        jax.grad(lambda s, key: contrastive.rand1_lh(s, positive, mask, key).sum(), argnums=0)
    )

    def drawn(number):
        chosen = np.asarray(grads(scores, np.array([7, number], np.uint32))) < 0
        assert (chosen.sum(1) == 1).all()
        return chosen.argmax(1)

    first = drawn(1)
    np.testing.assert_array_equal(drawn(1), first)
    assert 0.2 < (drawn(2) == first).mean() < 0.5
    share = np.bincount(first, minlength=5) / batch
    assert not share[[1, 4]].any() and (np.abs(share[[0, 2, 3]] - 1 / 3) < 0.05).all()


def test_errors():
    scores, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    for loss in contrastive.LOSSES.values():
        with pytest.raises(ValueError) as error:
            loss(scores, mask[:, :2], mask, KEY)
        assert str(error.value) == (
            "scores, positive_mask and mask must have one shape [B, N]; got (2, 3), (2, 2) and "
            "(2, 3)"
        )
        with pytest.raises(ValueError, match=r"^temperature must be above 0; got 0\.0$"):
            loss(scores, mask, mask, KEY, temperature=0.0)
    with pytest.raises(ValueError) as error:
        contrastive.rand1_lh(scores, mask, mask)
    assert str(error.value) == (
        "rand1_lh draws its positives: got key=None, expected a key of jax.random"
    )
