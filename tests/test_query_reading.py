"""A decoder that reads the query before it writes: against one row of tokens, read and written."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dgr_jax.models.stacking import stack_layers
from dgr_jax.models.t5 import T5Config, Transformer
from tests import students
from tests.reference import query_tables

PLAIN = dataclasses.replace(students.CONFIG, num_decoder_layers=2, vocab_size=50)
READS = dataclasses.replace(PLAIN, decoder_query_tokens=5)
QUERIES = students.texts(4, 7, seed=5) % 50  # of 8 places, some of them shorter than 5 tokens
TARGETS = np.random.default_rng(0).integers(1, 50, (4, 3, 4)).astype(np.int32)


@functools.cache
def applied(config=READS):
    params = students.parameters(PLAIN)
    params = stack_layers(params) if config.scan_layers else params
    apply = jax.jit(Transformer(config).apply, static_argnames=("method", "num_beams", "length"))
    return functools.partial(apply, {"params": params})


def written_out(queries, targets):
    """Logits [B, R, T, V] of a decoder that is given the query's tokens before every target."""
    count, number, length = targets.shape
    rows, read = np.zeros((count, number, 5 + length), np.int32), (queries[:, :5] > 0).sum(1)
    for b, n in enumerate(read):  # what stands after a target changes nothing before it
        rows[b, :, : n + length] = np.concatenate(
            [np.tile(queries[b, :n], (number, 1)), targets[b]], 1
        )
    logits = applied(PLAIN)(queries, rows)
    return np.stack([logits[b, :, n : n + length] for b, n in enumerate(read)])


def test_targets_go_on_from_the_query():
    assert {min(5, n) for n in (QUERIES > 0).sum(1).tolist()} == {2, 4, 5}
    logits = applied()(QUERIES, TARGETS)
    np.testing.assert_allclose(logits, written_out(QUERIES, TARGETS), atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_step_by_step_equals_one_pass(scan):
    apply = applied(dataclasses.replace(READS, scan_layers=scan))
    whole = apply(QUERIES, TARGETS)
    np.testing.assert_allclose(whole, written_out(QUERIES, TARGETS), atol=2e-5)
    encoded = apply(QUERIES, method="encode")
    cross = apply(encoded, QUERIES, method="cross")
    cache = apply(encoded, num_beams=3, length=4, method="init_cache")
    steps = []
    for t in range(4):
        if t == 1:
            ahead = apply(TARGETS[:, :, 1:], cache, t, cross, QUERIES, method="ahead")
        logits, cache = apply(TARGETS[:, :, t], cache, t, cross, QUERIES, method="step")
        steps.append(logits)
    np.testing.assert_allclose(np.stack(steps, 2), whole, atol=4e-5)
    np.testing.assert_allclose(apply(ahead, method="logits"), whole[:, :, 1:], atol=4e-5)


def test_padding_of_a_query_changes_nothing():
    longer = np.pad(QUERIES, [(0, 0), (0, 6)])
    expected = applied()(QUERIES, TARGETS)
    np.testing.assert_allclose(applied()(longer, TARGETS), expected, atol=2e-5)
    short = np.where(np.arange(8) < 4, QUERIES, 0)
    np.testing.assert_allclose(
        applied()(short[:, :4], TARGETS), applied()(short, TARGETS), atol=2e-5
    )


def test_parameters_are_those_of_a_plain_student():
    names = lambda config: jax.tree.map(np.shape, students.parameters(config))
    assert names(READS) == names(PLAIN)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_tokens_against_the_twin(tied):
    config = dataclasses.replace(READS, logits_via_embedding=tied)
    apply = applied(config)
    encoded = apply(QUERIES, method="encode")
    reading = apply(encoded, QUERIES, method="read")
    weights = np.asarray(apply(reading, method="token_weights"))
    embeddings = students.parameters(PLAIN)["token_embedder"]["embedding"]
    for b in range(len(QUERIES)):
        hidden = np.asarray(reading.hidden)[b, np.asarray(reading.there)[b]]
        assert len(hidden) == min(5, (QUERIES[b] > 0).sum())
        expected = query_tables.token_weights(embeddings, list(hidden))
        np.testing.assert_allclose(weights[b], expected, atol=1e-5)
    assert (weights[:, 0] == 0).all()


def test_what_cannot_read_is_refused():
    with pytest.raises(ValueError, match="decoder_query_tokens: got 4 with T5Config.prefix_adapt"):
        T5Config(vocab_size=50, prefix_adaptive_layers=1, decoder_query_tokens=4)
    with pytest.raises(ValueError, match="decoder_query_tokens: got targets that see different"):
        applied()(np.zeros((4, 8, 16), np.float32), np.stack([QUERIES] * 2, 1), method="read")
