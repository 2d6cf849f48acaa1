"""How the activations between layers are divided over the devices that share a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec


def cut(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """x, constrained so that each dimension is divided as the rules say for its logical axis.

    The mesh is JAX's current one (that of `jax.sharding.use_abstract_mesh`, or of an enclosing
    `shard_map`), the rules those of `nn.logical_axis_rules`; without rules, x has no constraint.
    A dimension is not divided over mesh axes over which a `shard_map` has divided it already, nor
    where its size is no multiple of theirs, which holds for parameters too.

    axes: the logical axis of each dimension; None for one that is whole on every device.
    """
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules:
        return x
    if mesh.empty:  # t5x enters its mesh in the older way, which Flax may still see
        return nn.with_logical_constraint(x, tuple(axes))
    free = [
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    ]
    spec = []
    for size, names in zip(x.shape, nn.logical_to_mesh_axes(axes, rules), strict=True):
        names = (names,) if isinstance(names, str) else names or ()
        names = tuple(name for name in names if name in free)
        parts = math.prod(mesh.shape[name] for name in names)
        spec.append(names or None if size % parts == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
