"""Meshes, logical axes and the sharding of batches."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from dgr_jax import partitioning
from dgr_jax.capacity import hlo
from dgr_jax.losses import ranking
from dgr_jax.models.stacking import stack_layers
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.step import abstract_state, init_state, make_train_step
from tests import students, toy


def _box(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("settings", "number", "expected"),
    [
        (Mesh(), 8, (8, 1, 1)),
        (Mesh(model=2), 8, (4, 1, 2)),
        (Mesh(data=2, model=-1), 8, (2, 1, 4)),
        (Mesh(data=1, fsdp=-1), 8, (1, 8, 1)),
        (Mesh(), 1, (1, 1, 1)),
    ],
)
def test_make_mesh(settings, number, expected):
    mesh = make_mesh(settings, toy.devices(number))
    assert mesh.axis_names == ("data", "fsdp", "model")
    assert tuple(mesh.shape.values()) == expected
    assert partitioning.batch_shards(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            Mesh(data=3),
            "mesh: got Mesh.data=3, Mesh.fsdp=1, Mesh.model=1, expected a product of 8, the "
            "number of devices; set Mesh.data, Mesh.model or Mesh.fsdp",
        ),
        (
            Mesh(model=3),
            "mesh: got Mesh.data=-1, Mesh.fsdp=1, Mesh.model=3, expected a product of 8, the "
            "number of devices; set Mesh.data, Mesh.model or Mesh.fsdp",
        ),
    ],
)
def test_make_mesh_errors(settings, message):
    with pytest.raises(ValueError) as error:
        make_mesh(settings, toy.devices(8))
    assert str(error.value) == message


def test_mesh_errors_that_no_device_is_needed_for():
    with pytest.raises(ValueError, match="^Mesh: got -1 for data and model, expected at most one"):
        Mesh(model=-1)
    with pytest.raises(ValueError, match="^Mesh.model: got 0, expected a positive number or -1$"):
        Mesh(model=0)


def test_tree_shardings():
    tree = {
        "embedding": _box((16, 8), "vocab", "embed"),
        "kernel": _box((8, 12), "embed", "mlp"),
        "odd": _box((8, 6), "embed", "mlp"),
        "bare": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    mesh = make_mesh(Mesh(data=2, model=4), toy.devices(8))
    specs = jax.tree.map(lambda s: s.spec, partitioning.tree_shardings(tree, mesh))
    assert specs == {
        "embedding": PartitionSpec("model", None),
        "kernel": PartitionSpec(None, "model"),
        "odd": PartitionSpec(None, None),  # 6 does not divide by 4
        "bare": PartitionSpec(),
    }
    mesh = make_mesh(Mesh(fsdp=2, model=2), toy.devices(8))
    specs = jax.tree.map(lambda s: s.spec, partitioning.tree_shardings(tree, mesh))
    assert specs["embedding"] == PartitionSpec("model", "fsdp")
    assert specs["odd"] == PartitionSpec("fsdp", "model")


def test_tree_shardings_unknown_axis():
    mesh = make_mesh(Mesh(), toy.devices(8))
    with pytest.raises(ValueError, match=r"^a/b: got logical axis 'wide', expected one of \['b"):
        partitioning.tree_shardings({"a": {"b": _box((8,), "wide")}}, mesh)


def test_the_students_parameters_are_cut():
    config = T5Config(
        vocab_size=32,
        emb_dim=16,
        num_heads=4,
        head_dim=4,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    mesh = make_mesh(Mesh(data=1, fsdp=2, model=4), toy.devices(8))
    params = partitioning.abstract_params(Transformer(config), mesh)
    held = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]
    matrices = [
        (np.prod(leaf.shape), np.prod(shard))
        for leaf, shard in zip(jax.tree.leaves(params), held, strict=True)
        if leaf.ndim == 2 and 32 not in leaf.shape[1:]  # not the relative positions
    ]
    assert len(matrices) > 10
    assert all(whole == 8 * part for whole, part in matrices)


@pytest.mark.parametrize("settings", [Mesh(), Mesh(model=2), Mesh(fsdp=2, model=2)])
def test_shard_batch(settings):
    mesh = make_mesh(settings, toy.devices(8))
    batch = {"a": np.arange(16).reshape(8, 2), "b": {"c": np.ones(8, np.float32)}}
    sharded = partitioning.shard_batch(batch, mesh)
    np.testing.assert_array_equal(sharded["a"], batch["a"])
    rows = 8 // partitioning.batch_shards(mesh)
    assert {shard.data.shape for shard in sharded["a"].addressable_shards} == {(rows, 2)}
    assert sharded["b"]["c"].sharding.is_equivalent_to(partitioning.batch_sharding(mesh), 1)


def test_shard_batch_error():
    mesh = make_mesh(Mesh(data=4, model=2), toy.devices(8))
    with pytest.raises(ValueError) as error:
        partitioning.shard_batch({"tokens": np.zeros((6, 2), np.int32)}, mesh)
    assert str(error.value) == (
        "batch['tokens']: got 6 rows, expected a multiple of 4, the data shards of the mesh; "
        "set batch_size or Mesh.data"
    )


def _spec(names, mesh, rules):
    shape = (64,) * len(names)
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
    return tuple(partitioning.tree_shardings(box, mesh, rules).spec)


@pytest.mark.parametrize(
    ("parameters", "activations", "kernel", "back", "scale", "between"),
    [
        (1, 1, ("fsdp", "model"), ("model", "fsdp"), ("fsdp",), (("data", "fsdp"), None, None)),
        (1, 2, ("fsdp", "model"), ("model", "fsdp"), ("model",), (("data", "fsdp"), None, "model")),
        (
            2, 1, (("data", "fsdp"), "model"), ("model", ("data", "fsdp")), (("data", "fsdp"),),
            (("data", "fsdp"), None, None),
        ),
        (
            2, 2, (("data", "fsdp"), "model"), ("model", ("data", "fsdp")), ("model",),
            (("data", "fsdp"), None, "model"),
        ),
    ],
)  # fmt: skip
def test_the_four_choices_of_t5x(parameters, activations, kernel, back, scale, between):
    rules = Mesh(parameter_dims=parameters, activation_dims=activations).rules
    mesh = make_mesh(Mesh(data=2, fsdp=2, model=2), toy.devices(8))
    assert _spec(("embed", "mlp"), mesh, rules) == kernel
    assert _spec(("joined_kv", "embed"), mesh, rules) == back
    assert _spec(("embed",), mesh, rules) == scale
    assert _spec(("batch", "length", "embed"), mesh, rules) == between
    assert _spec(("embed", "layers", "mlp"), mesh, rules) == (kernel[0], None, kernel[1])


def test_choices_are_1_or_2():
    with pytest.raises(ValueError) as error:
        Mesh(activation_dims=3)
    assert str(error.value) == "Mesh.activation_dims: got 3, expected 1 or 2"


# the student's steps on meshes

slow = pytest.mark.slow
STUDENT = T5Config(
    vocab_size=32, emb_dim=16, num_heads=8, head_dim=4, mlp_dim=24, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.0, relpos_buckets=4,
)  # fmt: skip
SCANNED = T5Config(
    vocab_size=32, emb_dim=16, num_heads=8, head_dim=4, mlp_dim=24, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.0, relpos_buckets=4, scan_layers=True,
)  # fmt: skip
ADAPTIVE = dataclasses.replace(STUDENT, prefix_adaptive_layers=1)
OBJECTIVES = {
    "generation": (Generation(), toy.generation_examples(8)),
    "distillation": (
        Distillation(functools.partial(ranking.distilled_ranknet, margin=2.0), 0.5),
        {"rank_list": toy.rank_lists(8), "generation": toy.generation_examples(8)},
    ),
}


@functools.cache
def _program(kind, settings, config=STUDENT):
    """The compiled step on 8 devices, or on 1, and where its state and batch lie."""
    number = math.prod((settings.data, settings.model, settings.fsdp))
    mesh = make_mesh(settings, toy.devices(number))
    objective, batch = OBJECTIVES[kind]
    model, optimizer = Transformer(config), optax.sgd(0.1)
    state = abstract_state(model, optimizer, mesh, settings.rules)
    step = make_train_step(objective, model, optimizer, mesh, state, rules=settings.rules)
    where = partitioning.batch_sharding(mesh)
    shapes = jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=where), batch
    )
    return mesh, state, step.lower(state, shapes).compile()


def _one_step(kind, settings, config=STUDENT):
    mesh, _, step = _program(kind, settings, config)
    params = students.parameters(dataclasses.replace(config, scan_layers=False))
    state = init_state(
        Transformer(config),
        optax.sgd(0.1),
        mesh,
        seed=0,
        params=stack_layers(params) if config.scan_layers else params,
        rules=settings.rules,
    )
    state, metrics = step(state, partitioning.shard_batch(OBJECTIVES[kind][1], mesh))
    return jax.device_get((state.params, metrics))


CASES = [
    *(("generation", Mesh(*sizes)) for sizes in [(8, 1), (4, 2), (2, 4), (1, 8)]),
    *(("distillation", Mesh(*sizes)) for sizes in [(8, 1), (4, 2), (2, 4), (1, 8)]),
    ("distillation", Mesh(2, 4, parameter_dims=2, activation_dims=2)),
    ("generation", Mesh(2, 2, 2)),
    ("generation", Mesh(2, 4, parameter_dims=2)),
]


@slow
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_a_step_of_the_student_is_the_same_on_every_mesh(kind, settings):
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(same, _one_step(kind, settings), _one_step(kind, Mesh(1, 1)))


@slow
def test_a_step_of_the_scanned_student_is_the_same_on_a_mesh():
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    got, metrics = _one_step("generation", Mesh(2, 4), SCANNED)
    expected, expected_metrics = _one_step("generation", Mesh(1, 1))
    jax.tree.map(same, (got, metrics), (stack_layers(expected), expected_metrics))


@slow
def test_a_step_of_the_prefix_adaptive_student_is_the_same_on_a_mesh():
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    got = _one_step("distillation", Mesh(2, 4), ADAPTIVE)
    jax.tree.map(same, got, _one_step("distillation", Mesh(1, 1), ADAPTIVE))


def _gathered(kind, settings, config=STUDENT):
    """All-gathered arrays of at least as many numbers as the smallest parameter that is cut."""
    _, state, step = _program(kind, settings, config)
    cut = [p.size for p in jax.tree.leaves(state.params) if not p.sharding.is_fully_replicated]
    assert len(cut) > 10
    found = hlo.cost(step.as_text()).collectives
    assert any(one.kind == "all-reduce" for one in found)
    gathered = [shape for one in found if one.kind == "all-gather" for shape in one.shapes]
    matrix = min(size for size in cut if size >= STUDENT.emb_dim * STUDENT.mlp_dim)
    return [shape for shape in gathered if math.prod(shape) >= matrix]


@pytest.mark.parametrize(
    ("kind", "settings", "config"),
    [
        pytest.param("generation", Mesh(2, 4), SCANNED, marks=slow),
        pytest.param("distillation", Mesh(2, 4), STUDENT, marks=slow),
        pytest.param("generation", Mesh(1, 8), STUDENT, marks=slow),
        pytest.param("distillation", Mesh(4, 2), STUDENT, marks=slow),
    ],
)
def test_neither_parameters_nor_logits_are_gathered(kind, settings, config):
    assert _gathered(kind, settings, config) == []
    logits = 8 // settings.data * 3, STUDENT.vocab_size // settings.model
    shapes = {
        (math.prod(array.shape[:-1]), array.shape[-1])
        for computation in hlo.computations(_program(kind, settings, config)[2].as_text())[
            0
        ].values()
        for instruction in computation.instructions.values()
        for array in instruction.arrays
        if array.shape
    }
    assert logits in shapes


@slow
def test_gathered_parameters_would_be_found():
    assert _gathered("generation", Mesh(2, 1, 4))


def test_batches_are_filled_up():
    mesh = make_mesh(Mesh(data=4, model=2), toy.devices(8))
    assert [partitioning.shared_rows(rows, mesh) for rows in (1, 4, 5)] == [4, 4, 8]
    tokens = np.arange(1, 7, dtype=np.int64).reshape(2, 3)
    for width in (2, 3, 5):
        placed = partitioning.place_padded(tokens, (4, width), mesh)
        assert placed.dtype == np.int32 and placed.sharding == partitioning.batch_sharding(mesh)
        expected = np.zeros((4, width), np.int32)
        expected[:2, : min(3, width)] = tokens[:, :width]
        np.testing.assert_array_equal(placed, expected)
