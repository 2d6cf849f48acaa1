"""How arrays are divided over devices: the mesh, the table of logical axes, a tree's shardings."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax import ranges, traced

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")
_LEAST_CUT = 256  # arrays of an index with fewer rows are not divided

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Logical axis (t5x's names) -> mesh axes. Of several rules for one axis, the first one counts whose
# mesh axes the array does not use yet. A rule for a mesh axis of size 1 changes nothing, so one
# table serves data, model and fully sharded data parallelism.
_COMMON: Rules = (
    ("batch", BATCH_AXES),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
)
_WHOLE: Rules = (
    ("kv", None),
    ("relpos_buckets", None),
    ("layers", None),
    ("length", None),
    ("targets", None),
)

# t5x's four choices, by the number of dimensions in which (parameters, activations) are divided.
# They differ in the rules for the width 'embed', which both have. The first dimension of
# activations is the batch.
LAYOUTS: dict[tuple[int, int], Rules] = {
    (1, 1): (*_COMMON, ("embed", "fsdp"), *_WHOLE),
    (1, 2): (*_COMMON, ("embed", "model"), ("embed", "fsdp"), *_WHOLE),
    (2, 1): (*_COMMON, ("embed", BATCH_AXES), *_WHOLE),
    (2, 2): (*_COMMON, ("embed", "model"), ("embed", BATCH_AXES), *_WHOLE),
}
RULES = LAYOUTS[1, 1]


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1, for all devices that the others leave.

    data: number of copies of the model, each with its share of the batch.
    model: number of devices that share each matrix product (vocabulary, heads and MLP are divided).
    fsdp: number of devices that share the parameters' width and, as with `data`, the batch.
    parameter_dims: 1; or 2, which divides parameters also over `data`, in their other dimension,
      and gathers them layer by layer (ZeRO-3).
    activation_dims: 1; or 2, which divides the width of activations between layers over `model`.
    """

    data: int = -1
    model: int = 1
    fsdp: int = 1
    parameter_dims: int = 1
    activation_dims: int = 1

    def __post_init__(self) -> None:
        size = ranges.Range(
            "a positive number or -1", lambda n: n == -1 or ranges.at_least(1).holds(n)
        )
        dims = ranges.Range("1 or 2", lambda n: n in (1, 2))
        ranges.check(
            self, data=size, model=size, fsdp=size, parameter_dims=dims, activation_dims=dims
        )
        free = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(free) > 1:
            raise ValueError(f"Mesh: got -1 for {' and '.join(free)}, expected at most one -1")

    @property
    def rules(self) -> Rules:
        """The table of logical axes."""
        return LAYOUTS[self.parameter_dims, self.activation_dims]


def mesh_sizes(settings: Mesh, num_devices: int) -> dict[str, int]:
    """Sizes of the axes `data`, `fsdp`, `model` on a number of devices.

    Raises ValueError when the axes' product is not the number of devices.
    """
    sizes = {axis: getattr(settings, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(1, num_devices // taken)
    if math.prod(sizes.values()) != num_devices:
        given = ", ".join(f"Mesh.{axis}={getattr(settings, axis)}" for axis in AXES)
        raise ValueError(
            f"mesh: got {given}, expected a product of {num_devices}, the number of devices; "
            f"set Mesh.data, Mesh.model or Mesh.fsdp"
        )
    return sizes


def make_mesh(
    settings: Mesh = Mesh(), devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh with axes `data`, `fsdp`, `model` over `devices` (default: all).

    Raises ValueError when the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(settings, len(devices))
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """The number of parts into which the batch axis is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shared_rows(rows: int, mesh: jax.sharding.Mesh) -> int:
    """The number of rows, rounded up so that all data shards have equally many."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of every batch feature: axis 0 is divided, the others are whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@contextlib.contextmanager
def in_force(mesh: jax.sharding.Mesh, rules: Any) -> Iterator[None]:
    """A context in which a traced program divides its activations over `mesh` by `rules`, wherever
    the model calls `models.activations.cut`."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
        yield


def on_batch_shards(
    function: Any, mesh: jax.sharding.Mesh, *, whole: int, rules: Any = RULES
) -> Any:
    """function(*whole arguments, batch) -> tree of [B, ...], run by each data shard on its rows.

    No row waits for those of another shard, so that a loop in the function may end earlier on one
    shard than on another. Arrays that are divided over `model` stay so, and XLA divides the work on
    them; those divided over `fsdp` are gathered once, before the function runs.

    Args:
      whole: number of leading arguments that every data shard sees whole.
      rules: how the model's activations are divided over the devices of a data shard.
    """
    rows = PartitionSpec(BATCH_AXES)

    @functools.wraps(function)
    def of_shard(*arguments: Any) -> Any:
        with nn.logical_axis_rules(rules):  # the mesh in force is that of shard_map
            return function(*arguments)

    return jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(*[PartitionSpec()] * whole, rows),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )


def index_shardings(
    arrays: Mapping[str, Any], mesh: jax.sharding.Mesh, *, max_replicated_bytes: int
) -> dict[str, NamedSharding]:
    """Shardings of an index: whole on every device, unless that takes more bytes than the limit.

    Above it, arrays are divided along axis 0 over `model`, the largest first, until a device holds
    no more than the limit. Short arrays, and those whose rows are no multiple of the axis, stay
    whole.
    """
    parts = mesh.shape["model"]
    held = sum(array.nbytes for array in arrays.values())
    shardings = dict.fromkeys(arrays, replicated(mesh))
    for name in sorted(arrays, key=lambda name: -arrays[name].nbytes):
        rows = arrays[name].shape[0] if arrays[name].ndim else 1
        if held <= max_replicated_bytes or parts == 1:
            break
        if rows >= _LEAST_CUT and rows % parts == 0:
            shardings[name] = NamedSharding(mesh, PartitionSpec("model"))
            held -= arrays[name].nbytes * (parts - 1) // parts
    if held > max_replicated_bytes:
        logger.warning(
            "the index takes %d bytes on each device, more than Search.max_replicated_bytes=%d; "
            "Mesh.model=%d parts cut it no further",
            *(held, max_replicated_bytes, parts),
        )
    return shardings


def _spec(
    path: str,
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: jax.sharding.Mesh,
    rules: Any,
) -> PartitionSpec:
    """The mesh axes of one array; a dimension that is no multiple of its mesh axes stays whole."""
    known = {name for name, _ in rules}
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"{path}: got logical axis {name!r}, expected one of {sorted(known)}")
    spec = []
    for size, axes in zip(shape, nn.logical_to_mesh_axes(names, rules) or (), strict=True):
        flat = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in flat)
        if size % parts:
            logger.info("%s: axis of %d is not cut over %s=%d, kept whole", path, size, flat, parts)
            axes = None
        spec.append(axes if parts > 1 else None)
    return PartitionSpec(*spec)


def tree_shardings(abstract: Any, mesh: jax.sharding.Mesh, rules: Any = RULES) -> Any:
    """Shardings of a tree whose leaves are boxed by `nn.with_logical_partitioning`.

    Args:
      abstract: tree of arrays or `jax.ShapeDtypeStruct`, boxed or not (not boxed: replicated).
      mesh: from `make_mesh`.
      rules: pairs of a logical axis and its mesh axes.

    Returns the same tree without boxes, with a NamedSharding at each leaf.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        return NamedSharding(mesh, _spec(name, leaf.names, leaf.value.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(
        sharding, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def boxed_params(model: Any, key: jax.Array) -> Any:
    """A Linen model's new parameters, in boxes that name their logical axes."""
    tokens = jnp.ones((1, 2), jnp.int32)
    return model.init(key, tokens, tokens)["params"]


@functools.lru_cache(maxsize=16)
def _boxed_shapes(model: Any) -> Any:
    shapes = lambda: jax.eval_shape(lambda: boxed_params(model, jax.random.PRNGKey(0)))
    return traced.kept_shapes(f"parameters {model!r}", shapes)


def abstract_params(model: Any, mesh: jax.sharding.Mesh, rules: Any = RULES) -> Any:
    """Shape, dtype and sharding of every parameter, into which a checkpoint is restored."""
    boxed = _boxed_shapes(model)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        tree_shardings(boxed, mesh, rules),
    )


def batch_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(i, n): this process's devices hold the i-th of n equal parts of every batch.

    Processes that share a data shard have the same part. The result is (0, 1), the whole batch,
    where the shards of this process are not neighbours.
    """
    shards = batch_shards(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    rows = sorted({index[0].indices(shards)[0] for index in held.values() if index})
    first, size = rows[0], len(rows)
    together = rows == list(range(first, first + size))
    return (first // size, shards // size) if together and not first % size else (0, 1)


def shard_batch(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Any:
    """This process's rows of a batch -> global arrays, divided along axis 0.

    Args:
      batch: tree of NumPy arrays [local rows, ...], the part of the batch that `batch_share` gives.

    Raises ValueError when the global batch is no multiple of the data shards.
    """
    shards, (index, parts) = batch_shards(mesh), batch_share(mesh)

    def shard(path: Any, rows: Any) -> jax.Array:
        size = rows.shape[0] * parts
        if size % shards:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)}: got {size} rows, expected a multiple of "
                f"{shards}, the data shards of the mesh; set batch_size or Mesh.data"
            )
        return _place_rows(rows, size, index * rows.shape[0], batch_sharding(mesh))

    return jax.tree_util.tree_map_with_path(shard, batch)


def _place_rows(rows: np.ndarray, size: int, first: int, sharding: NamedSharding) -> jax.Array:
    """The rows from `first` on of a global array with `size` rows -> that array."""

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        return rows[start - first : stop - first]

    return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, part)


def place_padded(tokens: np.ndarray, shape: tuple[int, int], mesh: jax.sharding.Mesh) -> jax.Array:
    """Tokens int [n, Q], which every process holds whole, as a global int32 batch of a given shape.

    The batch is divided along axis 0. Missing rows and tokens are padding; tokens beyond its length
    are left out.
    """
    padded = np.zeros(shape, np.int32)
    tokens = tokens[:, : shape[1]]
    padded[: tokens.shape[0], : tokens.shape[1]] = tokens
    return place(padded, batch_sharding(mesh))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole -> global arrays; global ones get the new sharding.

    shardings: one sharding for the whole tree, or a tree of them.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        foreign = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if foreign or sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)
