"""Meshes, logical axes and the sharding of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from dgr_jax import partitioning
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.partitioning import Mesh, make_mesh
from tests import toy


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
        (Mesh(model=-1), "Mesh: got -1 for data and model, expected at most one -1"),
        (Mesh(model=0), "Mesh.model: got 0, expected a positive number or -1"),
    ],
)
def test_make_mesh_errors(settings, message):
    with pytest.raises(ValueError) as error:
        make_mesh(settings, toy.devices(8))
    assert str(error.value) == message


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
