"""The step: the same numbers from any mesh and any number of microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
SGD = optax.sgd(0.1)  # quick to compile


def _mesh(data, model=1, fsdp=1):
    return make_mesh(Mesh(data, model, fsdp), toy.devices(data * model * fsdp))


def _state(mesh, *, model=None, optimizer=SGD, params=None):
    params = toy.params() if params is None else params
    return init_state(model or toy.Toy(), optimizer, mesh, seed=3, params=params)


def _run(objective, batches, mesh, *, model=None, params=None, optimizer=SGD, microbatches=1):
    """Parameters, and each step's means, after a step a batch."""
    model = model or toy.Toy()
    state = _state(mesh, model=model, params=params, optimizer=optimizer)
    step = make_train_step(objective, model, optimizer, mesh, state, microbatches=microbatches)
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
    run = functools.partial(_run, Generation(), batches, optimizer=ADAMW)
    expected = run(_mesh(1))
    _assert_same(run(_mesh(1), microbatches=4), expected, 2e-5)
    _assert_same(run(_mesh(4, 2)), expected, 2e-5)


@pytest.mark.slow
def test_distillation_agrees_on_a_mesh_in_microbatches():
    objective = Distillation(functools.partial(ranking.distilled_ranknet, margin=2.0), 0.5)
    batches = [
        {"rank_list": toy.rank_lists(8, seed=i), "generation": toy.generation_examples(16, i)}
        for i in range(2)
    ]
    batches[0]["rank_list"]["passage_mask"][:3] = False
    expected = _run(objective, batches, _mesh(1))
    _assert_same(_run(objective, batches, _mesh(2, 2, 2), microbatches=2), expected, 2e-5)


@pytest.mark.slow
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
    _assert_same(run(_mesh(2, 4)), run(_mesh(1)), 1e-4)


def _random_like(abstract):
    random = np.random.default_rng(0)
    draw = lambda leaf: random.normal(scale=0.3, size=leaf.shape).astype(np.float32)
    return jax.tree.map(draw, abstract)


def test_a_step_follows_the_gradient_of_the_mean():
    """The mean over all tokens: microbatches weigh by theirs, and there is one division."""
    batch, start = toy.generation_examples(8), toy.params()
    batch["decoder_loss_weights"][::2, 1:] = 0.0  # the first of two microbatches has few tokens
    loss = Generation().loss_fn(toy.Toy())

    def mean(params):
        loss_sum, weight_sum, _ = loss(params, batch, jax.random.PRNGKey(0))
        return loss_sum / weight_sum

    value, grads = jax.jit(jax.value_and_grad(mean))(start)
    got, history = _run(Generation(), [batch], _mesh(1), microbatches=2)
    assert history[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)
    for name, param in start.items():
        np.testing.assert_allclose(got[name], param - 0.1 * grads[name], rtol=1e-5, atol=1e-6)


def test_a_batch_without_targets_is_harmless():
    batch = toy.generation_examples(8)
    batch["decoder_loss_weights"][:] = 0.0
    params, history = _run(Generation(), [batch], _mesh(1))
    assert history[0]["grad_norm"] == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_state_is_born_sharded_and_the_same_on_any_mesh():
    mesh = _mesh(2, 2, 2)
    state = init_state(toy.Toy(), ADAMW, mesh, seed=0)  # random: as a run starts
    abstract = abstract_state(toy.Toy(), ADAMW, mesh)
    jax.tree.map(lambda leaf, expected: _same_place(leaf, expected.sharding), state, abstract)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (16, 32)]
    assert len(moments) == 2  # AdamW's two, of the kernel
    for leaf in (state.params["kernel"], *moments):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(8, 16)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    same, other = (init_state(toy.Toy(), ADAMW, _mesh(1), seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(same.params["kernel"], state.params["kernel"], rtol=1e-6)
    assert np.abs(same.params["kernel"] - other.params["kernel"]).max() > 0.1


def _same_place(leaf, sharding):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_factored_moments_are_whole_on_every_device():
    model = toy.Toy(width=128)
    optimizer = Adafactor().transformation(10)
    state = abstract_state(model, optimizer, _mesh(2, 2, 2))
    rows = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (256,)]
    assert rows and all(leaf.sharding.is_fully_replicated for leaf in rows)


def test_given_parameters_are_copied():
    mesh = _mesh(1)
    shardings = jax.tree.map(lambda p: p.sharding, partitioning.abstract_params(toy.Toy(), mesh))
    given = jax.device_put(toy.params(), shardings)  # as a checkpoint gives them
    state = _state(mesh, params=given)
    before = jax.device_get(given)
    step = make_train_step(Generation(), toy.Toy(), SGD, mesh, state)
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
    frozen = optax.sgd(0.0)
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
    make = functools.partial(make_train_step, Generation(), toy.Toy(), SGD, mesh, state)
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
