"""The step: the same numbers from any mesh and any number of microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax import partitioning
from dgr_jax.losses import ranking
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.optimizers import Adafactor, AdamW, Constant
from dgr_jax.training.step import abstract_state, init_state, make_train_step
from tests import toy

ADAMW = AdamW(Constant(0.01)).transformation(10)


def _mesh(data, model=1, fsdp=1):
    return make_mesh(Mesh(data, model, fsdp), toy.devices(data * model * fsdp))


def _state(mesh, *, model=None, optimizer=ADAMW, params=None, seed=3):
    params = toy.params() if params is None else params
    return init_state(model or toy.Toy(), optimizer, mesh, seed=seed, params=params)


def _run(objective, batches, mesh, *, model=None, params=None, microbatches=1):
    """Parameters, and each step's means, after a step a batch."""
    model = model or toy.Toy()
    state = _state(mesh, model=model, params=params)
    step = make_train_step(objective, model, ADAMW, mesh, state, microbatches=microbatches)
    history = []
    for batch in batches:
        state, metrics = step(state, partitioning.shard_batch(batch, mesh))
        history.append({k: float(a) / max(float(b), 1e-9) for k, (a, b) in metrics.items()})
    assert step._cache_size() == 1
    return jax.device_get(state.params), history


def _assert_same(got, expected, tolerance):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        got[0],
        expected[0],
    )
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def test_microbatches_and_meshes_agree():
    batches = [toy.generation_examples(16, seed) for seed in range(3)]
    expected = _run(Generation(), batches, _mesh(1))
    _assert_same(_run(Generation(), batches, _mesh(1), microbatches=4), expected, 2e-5)
    _assert_same(_run(Generation(), batches, _mesh(4, 2)), expected, 2e-5)


def test_distillation_agrees_on_a_mesh_in_microbatches():
    objective = Distillation(functools.partial(ranking.distilled_ranknet, margin=2.0), 0.5)
    batches = [
        {"rank_list": toy.rank_lists(8, seed=i), "generation": toy.generation_examples(16, i)}
        for i in range(2)
    ]
    batches[0]["rank_list"]["passage_mask"][:3] = False
    expected = _run(objective, batches, _mesh(1))
    _assert_same(_run(objective, batches, _mesh(2, 2, 2), microbatches=2), expected, 2e-5)


def test_the_student_agrees_on_every_mesh():
    model = Transformer(
        T5Config(
            vocab_size=toy.VOCABULARY,
            emb_dim=16,
            num_heads=4,
            head_dim=4,
            mlp_dim=16,
            num_encoder_layers=1,
            num_decoder_layers=1,
            dropout_rate=0.0,
        )
    )
    params = _random_like(partitioning.abstract_params(model, _mesh(1)))
    batches = [toy.generation_examples(8, seed) for seed in range(2)]
    run = functools.partial(_run, Generation(), batches, model=model, params=params)
    _assert_same(run(_mesh(2, 4), microbatches=2), run(_mesh(1)), 1e-4)


def _random_like(abstract):
    random = np.random.default_rng(0)
    draw = lambda leaf: random.normal(scale=0.3, size=leaf.shape).astype(np.float32)
    return jax.tree.map(draw, abstract)


def test_weights_are_divided_once():
    """Microbatches with unequal numbers of tokens weigh by them, not equally."""
    batch = toy.generation_examples(8)
    batch["decoder_loss_weights"][::2] = 0.0  # the first of two microbatches has no tokens
    half = {name: values[1::2] for name, values in batch.items()}
    got = _run(Generation(), [batch], _mesh(1), microbatches=2)
    _assert_same(got, _run(Generation(), [half], _mesh(1)), 2e-5)


def test_a_batch_without_targets_is_harmless():
    batch = toy.generation_examples(8)
    batch["decoder_loss_weights"][:] = 0.0
    params, history = _run(Generation(), [batch], _mesh(1))
    assert history[0]["grad_norm"] == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_state_is_born_sharded():
    mesh = _mesh(2, 2, 2)
    state = init_state(toy.Toy(), ADAMW, mesh, seed=0)  # random: as a run starts
    abstract = abstract_state(toy.Toy(), ADAMW, mesh)
    jax.tree.map(lambda leaf, expected: _same_place(leaf, expected.sharding), state, abstract)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (16, 32)]
    assert len(moments) == 2  # AdamW's two, of the kernel
    for leaf in (state.params["kernel"], *moments):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(8, 16)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def _same_place(leaf, sharding):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_factored_moments_are_whole_on_every_device():
    model = toy.Toy(width=128)
    optimizer = Adafactor().transformation(10)
    state = abstract_state(model, optimizer, _mesh(2, 2, 2))
    rows = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (256,)]
    assert rows and all(leaf.sharding.is_fully_replicated for leaf in rows)


def test_seed_sets_the_start():
    mesh = _mesh(1)
    start = [init_state(toy.Toy(), ADAMW, mesh, seed=seed).params["kernel"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(start[0], start[1])
    assert np.abs(start[0] - start[2]).max() > 0.1


def test_given_parameters_are_copied():
    mesh = _mesh(1)
    given = jax.device_put(toy.params())
    state = _state(mesh, params=given)
    before = jax.device_get(given)
    step = make_train_step(Generation(), toy.Toy(), ADAMW, mesh, state)
    changed, _ = step(state, toy.generation_examples(8))
    assert state.params["kernel"].is_deleted()  # donated
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(given), before)
    assert int(changed.step) == 1
    assert np.abs(changed.params["kernel"] - before["kernel"]).max() > 1e-3


def test_given_parameters_of_another_size():
    with pytest.raises(ValueError) as error:
        _state(_mesh(1), params=toy.params(width=8))
    assert str(error.value) == (
        "initial parameters: embedding: got shape (16, 8), expected (16, 16), that of the "
        "configured model; set the model and optimizer back, or give another folder (MODEL_DIR)"
    )


def test_dropout_follows_the_step():
    """Each step draws anew, and the same numbers in a run that starts there."""
    model, mesh = toy.Toy(dropout_rate=0.5), _mesh(1)
    frozen = AdamW(Constant(1e-20), weight_decay=0.0).transformation(10)
    batch = toy.generation_examples(8)
    step = make_train_step(Generation(), model, frozen, mesh, abstract_state(model, frozen, mesh))
    losses = []
    state = _state(mesh, model=model, optimizer=frozen)
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0]))
    assert len(set(losses)) == 3
    state = _state(mesh, model=model, optimizer=frozen).replace(step=jnp.int32(2))
    assert float(step(state, batch)[1]["loss"][0]) == losses[2]


def test_errors():
    mesh = _mesh(4, 2)
    state = _state(mesh)
    make = functools.partial(make_train_step, Generation(), toy.Toy(), ADAMW, mesh, state)
    batch = partitioning.shard_batch(toy.generation_examples(8), mesh)
    with pytest.raises(ValueError) as error:
        make(microbatches=4)(state, batch)
    assert str(error.value) == (
        "microbatches: got a batch of 8, expected a multiple of 16 = 4 microbatches x 4 data "
        "shards; set batch_size, microbatches or Mesh.data"
    )
    with pytest.raises(ValueError) as error:
        make(microbatches=0)
    assert str(error.value) == "microbatches: got 0, expected 1 or more"
