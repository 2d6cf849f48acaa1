"""Checkpoints of t5x (Roberts et al. 2022): its own layout and orbax's, here or in a bucket.

A run's folder holds a folder `checkpoint_<step>` for each save. In t5x's own layout that holds a
msgpack file `checkpoint`, of the tree

    {"version": 3, "optimizer": {"target": parameters,
                                 "state": {"step": n, "param_states": Adafactor's moments}}}

in which an array of any size is a spec of tensorstore (driver zarr, gzip) whose path is relative to
the folder. In orbax's layout the inner tree is its item `state`. Both are read and written here as
flat dicts of arrays by name ("target/encoder/layers_0/mlp/wo/kernel").

The layers are named one by one ("encoder/layers_0/..."), or are scanned: stacked along axis 1 under
one name ("encoder/encoder/..."), each with its own table of relative positions.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

Arrays = Mapping[str, np.ndarray]

VERSION = 3
LAYOUTS = ("t5x", "orbax")
_STEP = re.compile(r"(?:checkpoint_)?(\d+)")  # t5x's name of a step, and ours
_ITEMS = ("", "state", "default", "params")  # where the tree may lie in a step's folder
_PLACEHOLDER = "PLACEHOLDER://"  # of orbax before 2023: the rest is the array's folder
_DRIVERS = {"gs": "gcs", "s3": "s3"}
_CHUNK_BYTES = 64 * 2**20
_LEAST_FACTORED = 128
_STACKED = re.compile(r"(encoder|decoder)/(?:\1|layers)/(.+)")
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_BIAS = "relpos_bias/rel_embedding"


def find(source: str | Path, step: int | None = None) -> epath.Path:
    """The folder of one checkpoint.

    source: the folder of a run (its newest step, or `step`), of a step, or the file `checkpoint`.

    Raises FileNotFoundError where there is none, with the steps that there are.
    """
    folder = epath.Path(source)
    if folder.name == "checkpoint" and _item(folder.parent):
        folder = folder.parent
    if step is None and _item(folder):
        return folder
    steps = _steps(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"step {step}"
        found = f"found steps {sorted(steps)}" if steps else "found none"
        raise FileNotFoundError(f"{folder}: expected {wanted} of t5x or orbax; {found}")
    return steps[max(steps) if step is None else step]


def is_checkpoint(source: str | Path) -> bool:
    """Whether `find` would find one."""
    folder = epath.Path(source)
    return bool(_item(folder) or _item(folder.parent) or _steps(folder))


def _steps(folder: epath.Path) -> dict[int, epath.Path]:
    if not folder.is_dir():
        return {}
    named = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match and _item(path)}


def _item(folder: epath.Path) -> tuple[str, epath.Path] | None:
    """(layout, folder of the tree) of a step's folder; None where it holds no checkpoint."""
    for name in _ITEMS:
        inside = folder / name if name else folder
        if (inside / "_METADATA").exists():
            return "orbax", inside
        if (inside / "checkpoint").exists() and not (inside / "checkpoint").is_dir():
            return "t5x", inside
    return None


def read(source: str | Path, *, step: int | None = None, part: str = "target") -> dict[str, Any]:
    """The arrays below `part` of the tree, by name without it: "encoder/encoder_norm/scale" ...

    source: as `find`; local, or a bucket (gs://, s3://). A tree without `target` (one of
      parameters alone) is taken whole.
    part: "target", or "state".

    Raises FileNotFoundError as `find`, ValueError for a file of another format and with the names
    of all arrays that cannot be read.
    """
    folder = find(source, step)
    item = _item(folder)
    assert item is not None  # `find` finds no other folder
    layout, inside = item
    if layout == "orbax":
        return _read_orbax(inside, part)
    tree = _unpacked(inside)
    tree = tree if part == "target" and part not in tree else tree.get(part, {})
    leaves = flax.traverse_util.flatten_dict(tree, is_leaf=_is_spec)
    named = {"/".join(path): leaf for path, leaf in leaves.items() if leaf is not None}
    return _read_arrays(inside, named)


def _unpacked(folder: epath.Path) -> dict[str, Any]:
    """The tree of the file `checkpoint`; arrays outside it are specs."""
    path = folder / "checkpoint"
    content = path.read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise ValueError(
            f"{path} is of TensorFlow, expected one of t5x; t5x's convert_tf_checkpoint makes one"
        )
    try:
        tree = flax.serialization.msgpack_restore(content)
    except Exception as error:  # msgpack has no common class for what damage it finds
        raise ValueError(
            f"{path}: {len(content)} bytes that are no whole msgpack file "
            f"({type(error).__name__}): cut short, or of another format"
        ) from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: got {type(tree).__name__}, expected a tree of names")
    return tree.get("optimizer", tree)


def _is_spec(_: Any, node: Any) -> bool:
    return isinstance(node, dict) and {"driver", "kvstore", "metadata"} <= node.keys()


def _read_arrays(folder: epath.Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of the file `checkpoint`: those outside it are read, all at once."""
    places = {name: place for name, leaf in leaves.items() if (place := _place(leaf))}
    opened = {name: _open(folder / place) for name, place in places.items()}
    arrays, faults = {}, []
    for name, leaf in leaves.items():
        try:
            arrays[name] = opened[name].result().read() if name in opened else leaf
        except ValueError as error:
            faults.append(f"{name} ({_first_line(error)})")
    for name in opened.keys() & arrays.keys():
        try:
            arrays[name] = _checked(arrays[name].result(), leaves[name])
        except ValueError as error:
            faults.append(f"{name} ({_first_line(error)})")
    if faults:
        raise ValueError(f"{folder}: cannot read " + "; ".join(sorted(faults)))
    return {name: np.asarray(array) for name, array in arrays.items()}


def _place(leaf: Any) -> str | None:
    """The folder, relative to the checkpoint's, of an array outside the file; None inside it."""
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return leaf.removeprefix(_PLACEHOLDER)
    if isinstance(leaf, dict):  # the path stands beside the store in files of 2021
        return (leaf["kvstore"].get("path") or leaf["path"]).strip("/")
    return None


def _checked(array: np.ndarray, leaf: Any) -> np.ndarray:
    if isinstance(leaf, dict) and list(array.shape) != list(leaf["metadata"]["shape"]):
        raise ValueError(f"got shape {list(array.shape)}, expected {leaf['metadata']['shape']}")
    if array.dtype == np.uint16:
        raise ValueError("got uint16, bfloat16 as t5x wrote it before version 3; expected bfloat16")
    return array


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" [tensorstore_spec")[0]


def _open(path: epath.Path, **more: Any) -> ts.Future:
    spec = {"driver": "zarr", "kvstore": kvstore(path), **more}
    if not more:
        spec["fill_missing_data_reads"] = False  # a lost file is no array of zeros
    return ts.open(spec, create=bool(more), open=True)


def kvstore(path: str | os.PathLike[str]) -> dict[str, str]:
    """Tensorstore's description of a place: a local folder, gs://bucket/path, s3://bucket/path."""
    scheme, separator, rest = os.fspath(path).partition("://")
    if not separator:
        return {"driver": "file", "path": os.path.abspath(scheme) + "/"}
    if scheme not in _DRIVERS:
        known = ", ".join(f"{name}://" for name in _DRIVERS)
        raise ValueError(f"{os.fspath(path)}: got {scheme}://, expected a local folder or {known}")
    bucket, _, inside = rest.partition("/")
    return {"driver": _DRIVERS[scheme], "bucket": bucket, "path": inside.rstrip("/") + "/"}


def _read_orbax(folder: epath.Path, part: str) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            tree = checkpointer.metadata(folder).item_metadata.tree
            whole = part == "target" and part not in tree
            item = tree if whole else {part: tree.get(part, {})}
            to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item, restore_args=to_numpy, partial_restore=True)
            restored = checkpointer.restore(folder, args=args)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: cannot be read ({_first_line(error)})") from error
    flat = flax.traverse_util.flatten_dict(restored if whole else restored[part], sep="/")
    return {name: np.asarray(array) for name, array in flat.items()}


def write(
    folder: str | Path,
    step: int,
    target: Arrays,
    states: Mapping[str, Any],
    *,
    layout: str = "t5x",
) -> epath.Path:
    """Writes folder/checkpoint_<step>, that t5x restores; returns it.

    target: parameters; states: Adafactor's moments (`fresh_moments` for a start), both by name.
    layout: of LAYOUTS.

    Raises ValueError for another layout, FileExistsError where the step is there.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {list(LAYOUTS)}")
    final = epath.Path(folder) / f"checkpoint_{step}"
    if final.exists():
        raise FileExistsError(f"{final} exists; give another step or folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    nested = functools.partial(flax.traverse_util.unflatten_dict, sep="/")
    if layout == "orbax":
        state = {"step": np.int32(step), "param_states": nested(states)}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            tree = {"state": state, "target": nested(target)}
            checkpointer.save(final.absolute() / "state", args=ocp.args.PyTreeSave(tree))
        return final
    bucket = "://" in os.fspath(final)
    place = final if bucket else final.with_name(f"{final.name}.unfinished")
    place.mkdir(parents=True, exist_ok=True)
    leaves = {f"target/{name}": array for name, array in target.items()}
    leaves |= {f"state/param_states/{name}": array for name, array in states.items()}
    tree = nested(_write_arrays(place, leaves))
    tree.setdefault("state", {})["step"] = np.int32(step)
    content = {"optimizer": tree, "version": VERSION}
    # Last: without this file the folder is no checkpoint.
    (place / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    return final if bucket else place.rename(final)


def _write_arrays(folder: epath.Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of the file `checkpoint`: parameters and full moments become specs."""
    specs: dict[str, Any] = {}
    written = []
    for name, array in leaves.items():
        if not name.startswith("target/") and (not name.endswith("/v") or array.shape == (1,)):
            specs[name] = np.asarray(array)
            continue
        place = name.replace("/", ".")
        metadata = {
            "chunks": _chunks(array),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(array.shape),
        }
        opened = _open(folder / place, dtype=array.dtype.name, metadata=metadata)
        written.append(opened.result().write(array))
        # A bucket's name is put in by the reader, so that the folder can be moved.
        driver = kvstore(folder)["driver"]
        store = {"driver": driver, "path": place + "/"}
        store |= {} if driver == "file" else {"bucket": "t5x-dummy-bucket"}
        specs[name] = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": store,
            "metadata": metadata,
        }
    for future in written:
        future.result()
    return specs


def _chunks(array: np.ndarray) -> list[int]:
    """Whole arrays, or as many rows as fit into a chunk."""
    if not array.ndim:
        return []
    row = max(1, array.nbytes // max(1, array.shape[0]))
    return [max(1, min(array.shape[0], _CHUNK_BYTES // row)), *array.shape[1:]]


# The optimizer.


def fresh_moments(target: Arrays) -> dict[str, np.ndarray]:
    """Adafactor's moments at its first step, as t5x shapes them, for parameters by name.

    A matrix whose both sides are 128 or more is factored along its two axes; of scanned kernels
    every layer is, whatever its size, into rows along the model's width and columns.
    """
    flat = {}
    for name, array in target.items():
        moments = dict.fromkeys(("m", "v", "v_row", "v_col"), (1,))
        axes = _factored(name, array.shape)
        if axes:
            row, column = axes
            moments["v_row"] = tuple(np.delete(array.shape, column))
            moments["v_col"] = tuple(np.delete(array.shape, row))
        else:
            moments["v"] = array.shape
        flat |= {f"{name}/{k}": np.zeros(shape, np.float32) for k, shape in moments.items()}
    return flat


def _factored(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(row, column) axes of a factored second moment; None of a full one."""
    if len(shape) == 3 and name.endswith("kernel"):
        return (2, 0) if name.endswith(("out/kernel", "wo/kernel")) else (0, 2)
    if len(shape) != 2 or _STACKED.fullmatch(name) or min(shape) < _LEAST_FACTORED:
        return None
    smaller, larger = np.argsort(shape, stable=True)
    return int(smaller), int(larger)


def moments_of(opt_state: Any) -> dict[str, np.ndarray]:
    """Adafactor's moments of an optax state, by the names of parameters that are not scanned."""
    flat = {}
    for kind in ("v", "v_row", "v_col"):
        tree = optax.tree_utils.tree_get(opt_state, kind)
        if tree is None:
            raise ValueError("opt_state: got a state without Adafactor's moments, expected them")
        named = flax.traverse_util.flatten_dict(tree, sep="/")
        flat |= {f"{name}/{kind}": np.asarray(leaf, np.float32) for name, leaf in named.items()}
        flat |= {f"{name}/m": np.zeros(1, np.float32) for name in named}
    return flat


def read_adafactor(source: str | Path, *, step: int | None = None) -> optax.FactoredState:
    """Adafactor's state of a checkpoint whose layers are not scanned, as optax keeps it.

    Raises ValueError where there is none, where it has momentum, and where layers are scanned.
    """
    flat, folder = read(source, step=step, part="state"), find(source, step)
    if "step" not in flat or not any(name.endswith("/v_row") for name in flat):
        raise ValueError(f"{folder}: found no state of Adafactor: state/param_states/.../v_row")
    prefix, kinds = "param_states/", {"v": {}, "v_row": {}, "v_col": {}, "m": {}}
    for name, leaf in flat.items():
        if name.startswith(prefix):
            name, _, kind = name.removeprefix(prefix).rpartition("/")
            kinds.setdefault(kind, {})[name] = leaf
    if any(np.size(leaf) > 1 for leaf in kinds["m"].values()):
        raise ValueError(f"{folder}: got a state with momentum, expected none (beta1 None)")
    if any(_STACKED.fullmatch(name) for name in kinds["v"]):
        raise ValueError(f"{folder}: got moments of scanned layers, expected layers one by one")
    nested = functools.partial(flax.traverse_util.unflatten_dict, sep="/")
    v_row, v_col, v = (nested(kinds[kind]) for kind in ("v_row", "v_col", "v"))
    return optax.FactoredState(np.int32(flat["step"]), v_row, v_col, v)


# The layers.


def scanned(params: Arrays) -> dict[str, np.ndarray]:
    """Layers one by one -> as t5x scans them: encoder/layers_<i>/x -> encoder/encoder/x, axis 1.

    A kernel [I, F] becomes [I, layers, F], a norm's scale [D] becomes [D, layers]. The relative
    positions of a stack, [H, buckets], are repeated for every layer: [H, layers, buckets].

    Raises ValueError with the layers that a name lacks.
    """
    stacked, layers = {}, {}
    for name, array in params.items():
        if match := _LAYER.fullmatch(name):
            stack, layer, rest = match.groups()
            layers.setdefault((stack, rest), {})[int(layer)] = array
        else:
            stacked[name] = array
    depth = {stack: 1 + max(max(n) for (s, _), n in layers.items() if s == stack)
             for stack, _ in layers}  # fmt: skip
    for (stack, rest), numbered in layers.items():
        lacking = sorted(set(range(depth[stack])) - numbered.keys())
        if lacking:
            raise ValueError(f"{stack}/layers_<i>/{rest} is missing in layers {lacking}")
        in_order = [np.asarray(numbered[i]) for i in range(depth[stack])]
        stacked[f"{stack}/{stack}/{rest}"] = np.stack(in_order, axis=1)
    for stack, count in depth.items():
        if f"{stack}/{_BIAS}" in stacked:
            bias = np.asarray(stacked.pop(f"{stack}/{_BIAS}"))
            stacked[f"{stack}/{stack}/{_BIAS}"] = np.stack([bias] * count, axis=1)
    return stacked


def unscanned(params: Arrays) -> dict[str, np.ndarray]:
    """The inverse of `scanned`; what is not scanned stays.

    Layers stacked as encoder/layers/x, without relative positions of their own, are taken too.

    Raises ValueError where the relative positions differ between layers, as uMT5's do.
    """
    single = {}
    for name, array in params.items():
        if match := _STACKED.fullmatch(name):
            stack, rest = match.groups()
            layers = np.moveaxis(np.asarray(array), 1, 0)
            single |= {f"{stack}/layers_{i}/{rest}": layer for i, layer in enumerate(layers)}
        else:
            single[name] = array
    return _one_bias(single)


def _one_bias(params: Arrays) -> dict[str, np.ndarray]:
    """Tables of relative positions that every layer has become the stack's one."""
    shared = dict(params)
    for name, array in params.items():
        match = _LAYER.fullmatch(name)
        if match and match[3] == _BIAS:
            table = shared.setdefault(f"{match[1]}/{_BIAS}", array)
            if not np.array_equal(table, array):
                raise ValueError(
                    f"{name}: the layers' relative positions differ, as those of uMT5 do; expected "
                    f"one table for all layers of the {match[1]}"
                )
            del shared[name]
    return shared
