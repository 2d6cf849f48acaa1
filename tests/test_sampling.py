"""Sampled queries: what may be drawn, where it ends, and what it depends on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax import partitioning
from dgr_jax.models.t5 import Transformer
from dgr_jax.retrieval.sampling import Sampler, Sampling
from tests import students
from tests.reference.sampling import legal_tokens

CONFIG = dataclasses.replace(students.CONFIG, vocab_size=48)
LENGTH, TEXT_SIZE = 5, 9
WRITTEN = [1, *range(3, TEXT_SIZE)]  # EOS and the text pieces
PASSAGES = students.queries(5, 6) % 37 + 3 * (students.queries(5, 6) > 0)
SETTINGS = Sampling(number=6, top_k=3, batch_size=4)


def sampler(settings=SETTINGS, devices=1):
    mesh = partitioning.make_mesh(partitioning.Mesh(), jax.devices()[:devices])
    abstract = partitioning.abstract_params(Transformer(CONFIG), mesh)
    params = jax.tree.map(
        lambda x, to: jax.device_put(x, to.sharding), students.parameters(CONFIG), abstract
    )
    return Sampler(CONFIG, params, settings, LENGTH, TEXT_SIZE, mesh)


@pytest.fixture(scope="module")
def drawn():
    """int32 [5, 6, LENGTH]: samples of PASSAGES, a batch of four and a padded one."""
    (found,) = sampler().sequences([(0, PASSAGES)])
    return found


def check_tokens(drawn, top_k):
    """Every token is among the top_k after those before it, by the whole model without a cache.

    drawn: int32 [P, S, T]. Returns how many of the samples have ended.
    """
    params = jax.tree.map(jnp.asarray, students.parameters(CONFIG))
    inputs = np.pad(drawn[..., :-1], ((0, 0), (0, 0), (1, 0)))
    logits = np.asarray(
        jax.jit(Transformer(CONFIG).apply)({"params": params}, PASSAGES[: len(drawn)], inputs)
    )
    ended = [(p, s) for p, s in np.ndindex(drawn.shape[:2]) if drawn[p, s].any()]
    for p, s in ended:
        row = drawn[p, s].tolist()
        length = row.index(1) + 1
        assert not any(row[length:])
        for t in range(length):
            assert row[t] in legal_tokens(logits[p, s, t], WRITTEN, top_k)
    return len(ended)


def test_every_token_is_one_of_the_most_likely(drawn):
    assert drawn.shape == (5, 6, LENGTH) and drawn.dtype == np.int32
    assert 5 < check_tokens(drawn, SETTINGS.top_k) < 30
    assert len({tuple(row) for row in drawn.reshape(-1, LENGTH).tolist()}) > 5


@pytest.mark.slow
def test_of_one_likely_token_there_is_one_sample():
    settings = Sampling(number=2, top_k=1, batch_size=5)
    (found,) = sampler(settings).sequences([(0, PASSAGES)])
    assert check_tokens(found, 1) > 0
    assert (found[:, 0] == found[:, 1]).all()


def test_a_block_is_the_same_whatever_came_before(drawn):
    later = list(sampler().sequences([(64, PASSAGES[:3]), (0, PASSAGES), (8, PASSAGES[:1])]))
    assert [len(block) for block in later] == [3, 5, 1]
    assert (later[1] == drawn).all()
    (alone,) = sampler().sequences([(64, PASSAGES[:3])])
    assert (alone == later[0]).all()
    assert (alone != drawn[:3]).any()  # another number, other draws


def test_another_seed_draws_anew(drawn):
    other = sampler(dataclasses.replace(SETTINGS, seed=1))
    (found,) = other.sequences([(0, PASSAGES)])
    assert (found != drawn).any()


@pytest.mark.slow
def test_the_parts_of_a_mesh_draw_for_themselves():
    settings = dataclasses.replace(SETTINGS, number=12)
    (found,) = sampler(settings, devices=2).sequences([(0, np.repeat(PASSAGES[:1], 4, axis=0))])
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 0}, "Sampling.number: got 0, expected at least 1"),
        ({"top_k": 0}, "Sampling.top_k: got 0, expected at least 1"),
        ({"batch_size": 0}, "Sampling.batch_size: got 0, expected at least 1"),
        ({"temperature": 0.0}, "Sampling.temperature: got 0.0, expected above 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError) as caught:
        Sampling(**settings)
    assert str(caught.value) == message
