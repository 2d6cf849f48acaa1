"""The training state and the one compiled step that changes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax import array_trees, partitioning
from dgr_jax.training import hash_random
from dgr_jax.training.objectives import Batch, LossFn, Metrics, Objective
from dgr_jax.training.optimizers import Gradient


@struct.dataclass
class TrainState:
    """All that a step changes and a checkpoint keeps.

    step: int32 [], steps done. params, opt_state: float32 trees. rng: uint32 [2], the run's key;
    step n draws from fold_in(rng, n), by hash_random, so that a resumed run draws the same numbers.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any


def _new_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.fold_in(jax.random.PRNGKey(seed), 1),
    )


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: Any = partitioning.RULES,
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct` with shardings; nothing is computed.

    Optimizer arrays of a parameter's shape lie as the parameter does. The others (counters, and the
    rows and columns of factored moments, which are small) are on every device.
    """
    params = partitioning.abstract_params(model, mesh, rules)
    whole = partitioning.replicated(mesh)
    shapes = jax.eval_shape(lambda p: _new_state(p, optimizer, 0), params)

    def like_param(leaf: Any, param: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _with_sharding(leaf, param.sharding if leaf.shape == param.shape else whole)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        like_param,
        shapes.opt_state,
        params,
        transform_non_params=lambda leaf: _with_sharding(leaf, whole),
    )
    return TrainState(
        step=_with_sharding(shapes.step, whole),
        params=params,
        opt_state=opt_state,
        rng=_with_sharding(shapes.rng, whole),
    )


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    params: Any = None,
    rules: Any = partitioning.RULES,
) -> TrainState:
    """A state at step 0, born sharded: no device ever holds what it does not keep.

    Args:
      params: start from a copy of these (arrays named as the model's, no boxes), not at random.

    Raises ValueError when `params` differs from the model's in names or shapes.
    """
    abstract = abstract_state(model, optimizer, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if params is None:

        def create() -> TrainState:
            params = partitioning.boxed_params(model, hash_random.key(jax.random.PRNGKey(seed)))
            return _new_state(nn.unbox(params), optimizer, seed)

        return jax.jit(create, out_shardings=shardings)()
    array_trees.check_shapes(params, abstract.params, "initial parameters")
    params = partitioning.place(params, shardings.params)
    start = jax.jit(lambda p: _new_state(p, optimizer, seed), out_shardings=shardings)
    return start(params)


def _microbatches(batch: Batch, count: int, mesh: jax.sharding.Mesh) -> Any:
    """[B, ...] -> [count, B / count, ...].

    Microbatch i takes rows i, i + count, ...: every device cuts its own rows, none travel.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, partitioning.BATCH_AXES))
    shards = partitioning.batch_shards(mesh)

    def split(rows: jax.Array) -> jax.Array:
        size = rows.shape[0]
        if size % (count * shards):
            raise ValueError(
                f"microbatches: got a batch of {size}, expected a multiple of {count * shards} = "
                f"{count} microbatches x {shards} data shards; set batch_size, microbatches or "
                f"Mesh.data"
            )
        cut = rows.reshape(size // count, count, *rows.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(cut, sharding)

    return jax.tree.map(split, batch)


def _sums(loss: LossFn, params: Any, batch: Batch, rng: jax.Array) -> Any:
    """Gradient of the loss sum and ((loss sum, weight sum), metrics), all as sums."""

    def scalar(params: Any) -> tuple[jax.Array, Any]:
        loss_sum, weight_sum, metrics = loss(params, batch, rng)
        return loss_sum, ((loss_sum, weight_sum), metrics)

    (_, sums), grads = jax.value_and_grad(scalar, has_aux=True)(params)
    return grads, sums


def _sums_of_microbatches(
    loss: LossFn, params: Any, batches: Any, rng: jax.Array, count: int
) -> Any:
    """`_sums`, added over microbatches in a loop that keeps one at a time in memory."""

    def add(total: Any, indexed: Any) -> tuple[Any, None]:
        index, batch = indexed
        more = _sums(loss, params, batch, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, more), None

    first = jax.tree.map(lambda rows: rows[0], batches)
    shapes = jax.eval_shape(lambda: _sums(loss, params, first, rng))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), batches))
    return total


def _summed(
    loss: LossFn, params: Any, batch: Batch, rng: jax.Array, count: int, mesh: jax.sharding.Mesh
) -> Any:
    """`_sums` of a batch, in so many microbatches."""
    if count == 1:
        return _sums(loss, params, batch, rng)
    parts = _microbatches(batch, count, mesh)
    return _sums_of_microbatches(loss, params, parts, rng, count)


def _updated(
    state: TrainState, summed: Any, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """The state a step on, by what `_summed` has returned, and the metrics of the step."""
    sums, ((loss_sum, weight_sum), metrics) = summed
    weight = jnp.where(weight_sum > 0, weight_sum, 1.0)
    gradient = Gradient(sums, weight, optax.global_norm(sums) / weight)
    grads = jax.tree.map(lambda total: total / weight, sums)
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, gradient=gradient)
    metrics = dict(metrics)
    metrics["loss"] = (loss_sum, weight_sum)
    metrics["grad_norm"] = (gradient.norm, jnp.ones(()))
    changed = dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
    )
    return changed, metrics


def make_train_step(
    objective: Objective,
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    *,
    microbatches: int = 1,
    rules: Any = partitioning.RULES,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: (state, batch) -> (state, metrics as pairs (sum, weight)).

    The state is donated: the one handed in is gone afterwards. The sums of all microbatches are
    divided once by the sum of their weights, so without dropout the number of microbatches and the
    shape of the mesh change only the rounding.

    Args:
      state: a state, or `abstract_state`; only its shardings are read.
      microbatches: cut the batch into as many parts, one after the other.

    The metrics are the objective's, with `loss` and `grad_norm` (before clipping).
    """
    if microbatches < 1:
        raise ValueError(f"microbatches: got {microbatches}, expected 1 or more")
    loss = objective.loss_fn(model)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = hash_random.key(jax.random.fold_in(state.rng, state.step))
        with partitioning.in_force(mesh, rules):
            summed = _summed(loss, state.params, batch, rng, microbatches, mesh)
        return _updated(state, summed, optimizer)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    whole = partitioning.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, partitioning.batch_sharding(mesh)),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
