"""Checkpoints of t5x (Roberts et al. 2022): its own layout and orbax's, local or in a bucket.

A run's folder holds a folder `checkpoint_<step>` for each save. In t5x's own layout that holds a
msgpack file `checkpoint`, of the tree

    {"version": 3, "optimizer": {"target": parameters,
                                 "state": {"step": n, "param_states": Adafactor's moments}}}

in which a large array is replaced by a spec of tensorstore (driver zarr, gzip) whose path is
relative to the folder. In orbax's layout the inner tree is its item `state`. Both are read and
written here as flat dicts of arrays by name ("target/encoder/layers_0/mlp/wo/kernel").

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
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

Arrays = Mapping[str, np.ndarray]

VERSION = 3
LAYOUTS = ("t5x", "orbax")
_STEP = re.compile(r"(?:checkpoint_)?(\d+)")  # t5x's name of a step, and ours
_ITEMS = ("", "state", "default", "params")  # the folders of a step that may hold the tree
_PLACEHOLDER = "PLACEHOLDER://"  # orbax before 2023 put this before the name of an array's folder
_DRIVERS = {"gs": "gcs", "s3": "s3"}
_CHUNK_BYTES = 64 * 2**20
STACKED = re.compile(r"(encoder|decoder)/(?:\1|layers)/(.+)")
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_BIAS = "relpos_bias/rel_embedding"


def find(source: str | Path, step: int | None = None) -> epath.Path:
    """The folder of one checkpoint.

    source: the folder of a run (its newest step, or `step`), of a step, or the file `checkpoint`.

    Raises FileNotFoundError where there is none; the message lists the existing steps.
    """
    folder = epath.Path(source)
    if folder.name == "checkpoint" and _item(folder.parent):
        folder = folder.parent
    if step is None and _item(folder):
        return folder
    steps = _steps(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"step {step}"
        existing = f"found steps {sorted(steps)}" if steps else "found none"
        raise FileNotFoundError(f"{folder}: expected {wanted} of t5x or orbax; {existing}")
    return steps[max(steps) if step is None else step]


def is_checkpoint(source: str | Path) -> bool:
    """Whether `find` finds a checkpoint."""
    folder = epath.Path(source)
    return bool(_item(folder) or _item(folder.parent) or _steps(folder))


def _steps(folder: epath.Path) -> dict[int, epath.Path]:
    if not folder.is_dir():
        return {}
    named = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match and _item(path)}


def _item(folder: epath.Path) -> tuple[str, epath.Path] | None:
    """(layout, folder that holds the tree) of a step's folder; None where it is no checkpoint."""
    for name in _ITEMS:
        inside = folder / name if name else folder
        if (inside / "_METADATA").exists():
            return "orbax", inside
        if (inside / "checkpoint").exists() and not (inside / "checkpoint").is_dir():
            return "t5x", inside
    return None


def read(source: str | Path, *, step: int | None = None, part: str = "target") -> dict[str, Any]:
    """The arrays below `part` of the tree, by name without it: "encoder/encoder_norm/scale" ...

    source: as that of `find`; local, or in a bucket (gs://, s3://). A tree without `target` is one
      of parameters alone, and is taken whole.
    part: "target", or "state".

    Raises FileNotFoundError as `find`, and ValueError for a file of another format and for arrays
    that cannot be read, all of which it names.
    """
    folder = find(source, step)
    layout, inside = _item(folder)
    if layout == "orbax":
        return _read_orbax(inside, part)
    tree = _unpacked(inside)
    tree = tree if part == "target" and part not in tree else tree.get(part, {})
    leaves = flax.traverse_util.flatten_dict(tree, is_leaf=_is_spec)
    named = {"/".join(path): leaf for path, leaf in leaves.items() if leaf is not None}
    return _read_arrays(inside, named)


def _unpacked(folder: epath.Path) -> dict[str, Any]:
    """The tree in the file `checkpoint`, in which specs stand for arrays outside the file."""
    path = folder / "checkpoint"
    content = path.read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise ValueError(
            f"{path} is of TensorFlow, expected one of t5x; t5x's convert_tf_checkpoint makes one"
        )
    try:
        tree = flax.serialization.msgpack_restore(content)
    except Exception as error:  # msgpack has no common class for its errors
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
    """The leaves of the file `checkpoint` as arrays; those outside the file are read at once."""
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
    """The folder, relative to the checkpoint's, of an array outside the file `checkpoint`; None for
    a leaf inside the file."""
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return leaf.removeprefix(_PLACEHOLDER)
    if isinstance(leaf, dict):  # files of 2021 have the path beside the store, not in it
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
        spec["fill_missing_data_reads"] = False  # a missing file must not be read as zeros
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
    """Writes folder/checkpoint_<step>, which t5x can restore, and returns its path.

    target: the parameters by name. states: Adafactor's moments by name, those of
      `t5x_adafactor.fresh_moments` where training has not begun. layout: one of LAYOUTS.

    Raises ValueError for another layout, FileExistsError where the step exists already.
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
    # This file is written last: without it the folder is no checkpoint.
    (place / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    return final if bucket else place.rename(final)


def _write_arrays(folder: epath.Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves for the file `checkpoint`. Parameters and moments that are not factored are
    written beside it, and specs take their place."""
    specs, written = {}, []
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
        # A reader puts in the name of its bucket, so that the folder can be moved.
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
    """The shape of an array's chunks: the whole array, or as many rows as fit into a chunk."""
    if not array.ndim:
        return []
    row = max(1, array.nbytes // max(1, array.shape[0]))
    return [max(1, min(array.shape[0], _CHUNK_BYTES // row)), *array.shape[1:]]


def scanned(params: Arrays) -> dict[str, np.ndarray]:
    """Stacks layers as t5x scans them, along axis 1: encoder/layers_<i>/x -> encoder/encoder/x.

    A kernel [I, F] becomes [I, layers, F], a norm's scale [D] becomes [D, layers]. The relative
    positions of a stack, [H, buckets], are repeated for every layer: [H, layers, buckets].

    Raises ValueError where a parameter is missing in some layers, which it names.
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
    """The inverse of `scanned`; layers that are not scanned stay as they are.

    Layers may also be stacked as encoder/layers/x, without relative positions of their own.

    Raises ValueError where the relative positions differ between layers, as uMT5's do.
    """
    single = {}
    for name, array in params.items():
        if match := STACKED.fullmatch(name):
            stack, rest = match.groups()
            layers = np.moveaxis(np.asarray(array), 1, 0)
            single |= {f"{stack}/layers_{i}/{rest}": layer for i, layer in enumerate(layers)}
        else:
            single[name] = array
    return _one_bias(single)


def _one_bias(params: Arrays) -> dict[str, np.ndarray]:
    """Where every layer has a table of relative positions, makes of them one table of the stack."""
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
