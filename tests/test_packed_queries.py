"""Queries side by side in the encoder's rows: a step is the same as with each query alone."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax import partitioning
from dgr_jax.losses import ranking
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.packed_queries import PackedQueries
from dgr_jax.training.refreshing import LEVELS, OLD, LevelGeneration
from dgr_jax.training.source import ArraySource
from dgr_jax.training.step import init_state, make_train_step
from tests import toy

Q = 8
SIZES = dict(emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8, dropout_rate=0.0)
LAYERS = dict(num_encoder_layers=1, num_decoder_layers=1)
MODEL = Transformer(T5Config(vocab_size=toy.VOCABULARY, **SIZES, **LAYERS))


class Steps:
    """Given batches, one a step."""

    def __init__(self, *batches):
        self.batches = batches

    def batch(self, step, process_index=0, process_count=1):
        batch = self.batches[step % len(self.batches)]
        share = len(jax.tree.leaves(batch)[0]) // process_count
        return jax.tree.map(lambda x: x[process_index * share : (process_index + 1) * share], batch)


def queries(*shape, seed=0, shortest=1, longest=Q):
    """int32 [*shape, Q]: most are short."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(*rng.integers(shortest, longest + 1, (2, *shape)))
    tokens = rng.integers(2, toy.VOCABULARY, (*shape, Q)).astype(np.int32)
    return np.where(np.arange(Q) < lengths[..., None], tokens, 0)


def side_by_side(batch, shards=1, microbatches=1):
    return PackedQueries(Steps(batch), shards=shards, microbatches=microbatches).batch(0)


def stepped(objective, batch, *, shards=1, microbatches=1):
    """The parameters after a step, and its loss."""
    mesh = make_mesh(Mesh(shards), toy.devices(shards))
    state = init_state(MODEL, optax.sgd(0.1), mesh, seed=1)
    step = make_train_step(objective, MODEL, optax.sgd(0.1), mesh, state, microbatches=microbatches)
    state, metrics = step(state, partitioning.shard_batch(batch, mesh))
    return jax.device_get(state.params), float(metrics["loss"][0] / metrics["loss"][1])


def assert_same(got, expected):
    assert got[1] == pytest.approx(expected[1], rel=1e-5)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, got[0], expected[0])


def test_a_step_is_that_of_padded_queries_on_any_mesh():
    batch = toy.generation_examples(32) | {"encoder_input_tokens": queries(32, longest=4)}
    made = side_by_side(batch, 2, 2)
    assert made["packed_query_tokens"].shape[0] == 4
    assert made["packed_query_tokens"].shape[1] < 4
    got = stepped(Generation(), made, shards=2, microbatches=2)
    assert_same(got, stepped(Generation(), batch))


def test_a_refresh_reads_packed_queries():
    codes = np.arange(2, toy.VOCABULARY, dtype=np.int32)
    batch = toy.generation_examples(16) | {"encoder_input_tokens": queries(16, longest=4)}
    old = np.full((16, 3, len(codes)), -np.log(len(codes)), np.float32)
    batch |= {LEVELS: np.broadcast_to(codes, old.shape), OLD: old}
    packed = side_by_side(batch)
    assert "packed_query_tokens" in packed
    seen = []
    logits = np.zeros((16, 3, toy.VOCABULARY), np.float32)
    model = SimpleNamespace(apply=lambda *_, **given: seen.append(given.get("rows")) or logits)
    loss = LevelGeneration().loss_fn(model)
    losses = [loss({}, given, jax.random.key(0))[0] for given in (packed, batch)]
    assert losses[0] == losses[1]
    assert seen[0].tokens is packed["packed_query_tokens"] and seen[1] is None


def test_a_step_of_distillation_is_that_of_padded_queries():
    objective = Distillation(ranking.ranknet)
    lists = toy.rank_lists(8) | {"encoder_input_tokens": queries(8, seed=1)}
    lists |= {k: v for k, v in toy.generation_examples(8).items() if k.startswith("decoder")}
    packed = side_by_side({"rank_list": lists})
    assert "packed_query_tokens" in packed["rank_list"]
    assert_same(stepped(objective, packed), stepped(objective, {"rank_list": lists}))


@given(st.integers(0, 99), st.sampled_from([(), (3,)]), st.sampled_from([(1, 1), (2, 1), (2, 3)]))
@settings(max_examples=25, deadline=None)
def test_every_query_lies_in_a_row_once(seed, views, cut):
    shards, microbatches = cut
    tokens = queries(12, *views, seed=seed, shortest=0)
    made = side_by_side({"encoder_input_tokens": tokens}, shards, microbatches)
    if "packed_query_tokens" not in made:
        return
    laid, segments = made["packed_query_tokens"], made["packed_query_segments"]
    assert np.count_nonzero(laid) == np.count_nonzero(tokens)
    np.testing.assert_array_equal(laid > 0, segments > 0)
    for query in np.ndindex(tokens.shape[:-1]):
        row = tokens[query][tokens[query] > 0]
        shard, place = divmod(query[0], 12 // shards)
        group = shard * microbatches + place % microbatches
        start = made["packed_query_starts"][query]
        here = slice(start, start + len(row))
        np.testing.assert_array_equal(laid[group].ravel()[here], row)
        if not len(row):
            continue
        own = segments[group].ravel()[here]
        assert (own == own[0]).all() and np.count_nonzero(segments[group] == own[0]) == len(row)
        assert here.start // (2 * Q) == (here.stop - 1) // (2 * Q)


def test_a_batch_that_needs_more_rows_has_the_size_of_padded_queries():
    short = {"encoder_input_tokens": queries(16, longest=3)}
    long = {"encoder_input_tokens": np.full((16, Q), 5, np.int32)}
    source = PackedQueries(Steps(*[short] * 40, long), shards=2, microbatches=1)
    assert source.batch(0)["packed_query_tokens"].shape[1] < 4
    assert source.batch(40)["packed_query_tokens"].shape == (2, 4, 2 * Q)
    # One process has short queries, the other long ones: both have as many rows.
    mixed = {"encoder_input_tokens": np.concatenate([queries(8, longest=2), np.full((8, Q), 5)])}
    source = PackedQueries(Steps(*[short] * 40, mixed), shards=2, microbatches=1)
    shapes = {source.batch(40, process, 2)["packed_query_tokens"].shape for process in (0, 1)}
    assert shapes == {(1, 4, 2 * Q)}


def test_queries_without_padding_stay_as_they_are(caplog):
    caplog.set_level(logging.INFO)
    full = ArraySource({"encoder_input_tokens": np.full((9, Q), 5, np.int32)}, 8, seed=0)
    batch = PackedQueries(full, shards=1, microbatches=1).batch(3)
    assert list(batch) == ["encoder_input_tokens"] and not caplog.messages
    short = Steps({"encoder_input_tokens": queries(16, longest=3)})
    PackedQueries(short, shards=1, microbatches=1)
    assert caplog.messages[0].startswith("queries: 16 in ")
