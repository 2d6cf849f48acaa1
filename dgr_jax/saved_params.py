"""The parameters of a checkpoint alone, without what only training needs.

Where one device takes them whole, they are read without orbax: a question is answered sooner.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tensorstore

from dgr_jax.array_trees import NotFinite, check_finite, check_shapes
from dgr_jax.model_dir import kept

BEST = "best_checkpoint"  # the key, in a position, of the step whose parameters are used

_DAMAGE = (OSError, *kept.UNREADABLE)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raises kept.Damaged in place of the errors of reading a truncated, changed or missing file.

    MemoryError and errors of the device stay as they are.
    """
    try:
        yield
    except kept.Damaged:
        raise
    except Exception as error:
        root = error
        while type(root) is Exception and root.__cause__ is not None:  # tensorstore's, from orbax
            root = root.__cause__
        if isinstance(root, jax.errors.JaxRuntimeError) or not isinstance(root, _DAMAGE):
            raise
        said = first_line(root)[:200]
        damage = kept.Damaged(folder, f"cannot be read ({said}); truncated or damaged")
        _forget_reads(error)
    else:
        return
    raise damage


def read_unlisted(item: Path) -> None:
    """Reads the arrays of an item one by one where no list vouches for the files of its checkpoint.

    Orbax reads them side by side. Where one cannot be read, the reads under way find their event
    loop closed, which can end the process.
    """
    if not (item.parent / kept.MANIFEST).is_file():
        for array in _opened(item).values():
            array.read().result()


def _opened(item: Path) -> dict[str, tensorstore.TensorStore]:
    """The arrays of an item by their names, such as encoder.layers_0.mlp.wo.kernel; {} where orbax
    has written them in another form."""
    if not (item / "manifest.ocdbt").is_file():
        return {}
    store = {"driver": "ocdbt", "base": f"file://{item}/"}
    keys = (key.decode() for key in tensorstore.KvStore.open(store).result().list().result())
    folders = [
        folder for folder, _, file in (key.rpartition("/") for key in keys) if file == ".zarray"
    ]
    array = lambda folder: {"driver": "zarr", "kvstore": store | {"path": f"{folder}/"}}
    opened = {folder: tensorstore.open(array(folder), read=True) for folder in folders}
    return {folder: future.result() for folder, future in opened.items()}


def _forget_reads(error: BaseException) -> None:
    """Frees the other reads that failed or wait beside that of the error.

    Otherwise asyncio would log each of them at length, and Python would report those that raise
    when they are destroyed, until the end of the process.
    """
    asyncio_logger = logging.getLogger("asyncio")
    if _is_logged not in asyncio_logger.filters:
        asyncio_logger.addFilter(_is_logged)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _is_logged(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _chosen(folder: Path, newest: int) -> int:
    """The step whose parameters are used: the one that the newest checkpoint names as the best, or
    else the newest."""
    file = folder / str(newest) / "position" / "metadata"
    return kept.read_json(file).get(BEST, newest) if file.is_file() else newest


def first_line(error: Exception) -> str:
    if isinstance(error, kept.Damaged):
        return error.what
    if isinstance(error, NotFinite):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def restore_params(folder: str | Path, abstract: Any, *, step: int | None = None) -> Any:
    """The parameters of a checkpoint alone, for search or as the start of another stage.

    Args:
      folder: a folder of checkpoints; nothing in it is changed.
      abstract: parameters as `jax.ShapeDtypeStruct` with shardings.
      step: the step to read; by default the best, where the run kept it, and else the newest.

    Raises FileNotFoundError when there is no checkpoint, ValueError when the model's shapes differ,
    kept.Damaged when a file of the checkpoint was changed since it was written or cannot be read.
    """
    folder = Path(folder).absolute()
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # A finished stage lists its checkpoints. If the newest of them is lost, none older replaces it.
    listed = {name.partition("/")[0] for name in kept.listed_in(folder)}
    steps = sorted(int(name) for name in listed if name.isdecimal())
    steps = steps or sorted(int(name) for name in there if name.isdecimal())
    if step is None and steps:
        step = _chosen(folder, steps[-1])
    if step not in steps:
        wanted = "a checkpoint" if step is None else f"step {step}, found {steps}"
        raise FileNotFoundError(f"{folder}: expected {wanted}; has the stage been trained?")
    path = folder / str(step) / "params"
    manifest = kept.opened(path.parent / kept.MANIFEST)
    kept.whole(path)
    where, restored = f"checkpoint {path.parent}", _restored
    with reading(path):
        direct = manifest.is_file() and _on_one_device(abstract)
        arrays = _nested(_opened(path)) if direct else {}
        if arrays:
            restored = _read
        else:
            import orbax.checkpoint as ocp

            read_unlisted(path)
            # The handler reads the item's own metadata; a checkpointer would look for a step's.
            arrays = ocp.StandardCheckpointHandler().metadata(path).tree
    check_shapes(arrays, abstract, where)
    try:
        params = restored(path, abstract)
    except kept.Damaged:
        # Its hashes are right, so that a read may have been cut short.
        params = restored(path, abstract)
    check_finite(params, where)
    return params


def _on_one_device(abstract: Any) -> bool:
    """Whether all parameters go to one device of this process, which is the only one."""
    devices = {d for leaf in jax.tree.leaves(abstract) for d in leaf.sharding.device_set}
    return jax.process_count() == 1 and len(devices) == 1


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays by their names as a tree of parameters."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


def _read(path: Path, abstract: Any) -> Any:
    """The parameters of an item, for one device; without orbax, which takes longer to import than
    they take to read. Raises kept.Damaged where they cannot be read."""
    with reading(path):
        reads = {name: array.read() for name, array in _opened(path).items()}
        arrays = _nested({name: read.result() for name, read in reads.items()})
        place = lambda to, array: jax.device_put(array.astype(to.dtype), to.sharding)
        return jax.tree.map(place, abstract, arrays)


def _restored(path: Path, abstract: Any) -> Any:
    """The parameters of an item. Raises kept.Damaged where they cannot be read."""
    import orbax.checkpoint as ocp

    with reading(path), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)
