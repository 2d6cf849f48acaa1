"""The k largest of long rows against sorting."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.decoding.selection import check_k, joint_top_k, masked_top_k, top_k

few = settings(max_examples=20, deadline=None)
compiled = functools.partial(  # quick to compile, slow to run
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
find = compiled(top_k, static_argnums=1)
find_jointly = compiled(joint_top_k, static_argnums=2)
find_masked = compiled(masked_top_k, static_argnums=3)


def slow_top_k(values, k):
    """Largest first, of equal values the smaller index."""
    order = np.argsort(-values, kind="stable", axis=-1)[..., :k]
    return np.take_along_axis(values, order, -1), order


def draw_values(seed, shape, levels):
    """Values with many ties when there are few levels."""
    return np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)


@few
@given(
    seed=st.integers(0, 99),
    n=st.sampled_from([30, 3000, 3083]),
    levels=st.sampled_from([3, 10**6]),
)
def test_top_k(seed, n, levels):
    values = draw_values(seed, (2, 3, n), levels)
    for found, wanted in zip(find(values, 5), slow_top_k(values, 5), strict=True):
        np.testing.assert_array_equal(found, wanted)


@few
@given(
    seed=st.integers(0, 99),
    n=st.sampled_from([30, 3000, 3083]),
    levels=st.sampled_from([3, 300, 10**6]),
)
def test_joint_top_k(seed, n, levels):
    values = draw_values(seed, (2, 3, n), levels)
    prior = -draw_values(seed + 1, (2, 3), 3)
    prior[1, 0] = -np.inf
    wanted = slow_top_k((values + prior[..., None]).reshape(2, -1), 5)
    for found, want in zip(find_jointly(values, prior, 5), wanted, strict=True):
        np.testing.assert_array_equal(found, want)


@few
@given(
    seed=st.integers(0, 99),
    words=st.sampled_from([2, 60]),
    levels=st.sampled_from([3, 300, 10**6]),
    density=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
)
def test_masked_top_k(seed, words, levels, density):
    rng = np.random.default_rng(seed)
    values = draw_values(seed, (2, 3, 32 * words), levels)
    prior = -draw_values(seed + 1, (2, 3), 3)
    prior[0, 1] = -np.inf
    legal = rng.random(values.shape) < density
    planes = legal.reshape(2, 3, 32, words)
    bits = (planes.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]).sum(-2)
    found, place = find_masked(values, bits.astype(np.uint32), prior, 4)
    totals = np.where(legal, values, -np.inf) + prior[..., None]
    wanted, order = slow_top_k(totals.reshape(2, -1), 4)
    np.testing.assert_array_equal(found, wanted)
    valid = wanted > -np.inf
    np.testing.assert_array_equal(np.where(valid, place, 0), np.where(valid, order, 0))


@pytest.mark.parametrize("k", [1, 7])
def test_entries_that_tie_with_the_last_block_are_all_searched(k):
    values = np.ones((1, 2, 32 * 64), np.float32)
    bits = np.full((1, 2, 64), 0xFFFFFFFF, np.uint32)
    found, place = find_masked(values, bits, np.zeros((1, 2), np.float32), k)
    assert found[0].tolist() == [1] * k
    assert place[0].tolist() == list(range(k))


def test_more_scores_than_places_can_tell_apart():
    """Places in the M * V scores of a query are int32."""
    shaped = lambda shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    half, prior = 1 << 30, shaped((1, 2), "float32")
    for allowed in (half - (1 << 15), half):
        many = allowed == half
        words = shaped((1, 2, allowed // 32), "uint32")
        for search, *arguments in (
            (joint_top_k, shaped((1, 2, allowed)), prior),
            (masked_top_k, shaped((1, 2, allowed)), words, prior),
            (top_k, shaped((1, 2 * allowed))),
        ):
            evaluated = functools.partial(jax.eval_shape, lambda *a, s=search: s(*a, 5), *arguments)
            if many:
                with pytest.raises(
                    ValueError, match="got 2,147,483,648, expected at most 2,147,418,112"
                ):
                    evaluated()
            else:
                assert evaluated()[1].dtype == np.int32


@pytest.mark.parametrize("k", [0, -1, 1.5, None, True])
def test_a_k_that_is_none(k):
    with pytest.raises(ValueError, match=f"k: got {k}, expected"):
        check_k(k)
    check_k(np.int32(3))
