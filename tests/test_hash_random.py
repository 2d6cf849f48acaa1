"""Bits by hashing: as random as dropout needs, and the same wherever they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax import partitioning
from dgr_jax.training import hash_random

KEY = hash_random.key(jax.random.PRNGKey(3))


def test_a_key_is_made_of_any_threefry_key():
    typed = hash_random.key(jax.random.key(3))
    assert jnp.array_equal(jax.random.key_data(typed), jax.random.key_data(KEY))
    assert jax.random.key_impl(typed) == jax.random.key_impl(KEY)
    assert jax.random.key_impl(KEY) != jax.random.key_impl(jax.random.key(0))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_shares_rows_and_columns_are_those_of_independent_draws(rate):
    drawn = np.asarray(jax.random.bernoulli(KEY, rate, (512, 1024)))
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(drawn.mean() - rate) < 4 * deviation / np.sqrt(drawn.size)
    for axis, number in ((0, 512), (1, 1024)):
        assert drawn.mean(axis).std() * np.sqrt(number) == pytest.approx(deviation, rel=0.1)


def test_numbers_are_uniform_and_neighbours_do_not_know_each_other():
    drawn = np.asarray(jax.random.uniform(KEY, (800_000,)))
    expected = len(drawn) / 64
    found = np.histogram(drawn, 64, (0, 1))[0]
    assert ((found - expected) ** 2 / expected).sum() < 63 + 4 * np.sqrt(2 * 63)
    for lag in (1, 2, 64, 1024):
        correlation = np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(len(drawn))


def test_children_do_not_know_each_other():
    children = [*jax.random.split(KEY, 20), *(jax.random.fold_in(KEY, n) for n in range(20))]
    drawn = np.stack([np.asarray(jax.random.uniform(child, (20_000,))) for child in children])
    correlations = np.abs(np.corrcoef(drawn) - np.eye(40))
    assert correlations.max() < 4.5 / np.sqrt(20_000)
    words = jax.random.key_data(jax.random.split(KEY, 5000))
    assert len(np.unique(np.asarray(words), axis=0)) == 5000


def test_keys_and_steps_differ():
    other = hash_random.key(jax.random.PRNGKey(4))
    a, b = (np.asarray(jax.random.bits(key, (10_000,))) for key in (KEY, other))
    assert (a != b).mean() > 0.999
    assert (a == np.asarray(jax.random.bits(KEY, (10_000,)))).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_every_bit_is_used(dtype):
    drawn = np.asarray(jax.random.bits(KEY, (4000,), dtype))
    assert drawn.dtype == dtype
    bits = (drawn[:, None] >> np.arange(np.iinfo(dtype).bits, dtype=dtype)) & 1
    assert (np.abs(bits.mean(0) - 0.5) < 4 * 0.5 / np.sqrt(4000)).all()


def test_the_same_on_every_mesh():
    whole = jax.random.bits(KEY, (16, 3, 8))
    mesh = partitioning.make_mesh(partitioning.Mesh(data=4, model=2))
    cut = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    draw = jax.jit(lambda key: jax.random.bits(key, (16, 3, 8)), out_shardings=cut)
    assert jnp.array_equal(draw(KEY), whole)
