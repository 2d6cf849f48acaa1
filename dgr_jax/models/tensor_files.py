"""Files of named arrays in the safetensors format, read and written with numpy alone.

A file holds the header's length (uint64, little-endian); then the header, JSON that maps each name
to its dtype, its shape and the range [begin, end) of its bytes after the header; then these bytes.
bfloat16 is that of ml_dtypes, which comes with jax.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"


def read_file(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of one file, memory-mapped and read-only.

    Raises ValueError, naming the file, where it is cut short, is of another format, or holds a
    dtype that numpy cannot read.
    """
    path = Path(path)
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    header, start = _header(path, data)
    return {
        name: _array(path, name, entry, data[start:])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _header(path: Path, data: np.ndarray) -> tuple[dict[str, Any], int]:
    """(the header, where the bytes begin)."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or 8 + length > len(data):
        raise ValueError(f"{path}: {len(data)} bytes, expected a whole safetensors file")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: no JSON header, expected a safetensors file")
    return header, 8 + length


def _array(path: Path, name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: {name}: got {entry!r:.100}, expected its dtype, shape and data_offsets: the "
            "file is damaged"
        ) from None
    if kind not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise ValueError(f"{path}: {name}: got dtype {kind}, expected one of {known}")
    dtype = _DTYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= begin <= end <= len(data) or end - begin != size:
        raise ValueError(
            f"{path}: {name}: got bytes [{begin}, {end}) of {len(data)}, expected {size} of them: "
            "the file is cut short or damaged"
        )
    return data[begin:end].view(dtype).reshape(shape)


def write_file(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one file, its arrays sorted by name; the file gets its name when it is whole."""
    path, header, begin = Path(path), {"__metadata__": {"format": "pt"}}, 0
    for name, array in sorted(arrays.items()):
        end = begin + array.nbytes
        dtype = _NAMES[array.dtype]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the bytes begin at a multiple of 8
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, array in sorted(arrays.items()):
            file.write(np.ascontiguousarray(array).view(np.uint8))
    os.replace(unfinished, path)


def read_folder(folder: str | Path) -> dict[str, np.ndarray]:
    """All arrays of model.safetensors, or of the shards that the folder's index names.

    Raises FileNotFoundError where there is neither file nor index and where a shard is missing,
    ValueError where index and shards disagree.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return read_file(folder / "model.safetensors")
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(f"{folder}: no model.safetensors and no {_INDEX}; {_other(folder)}")
    places = _places(folder / _INDEX)
    shards = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} is missing: {_INDEX} names it")
        shards[shard] = read_file(folder / shard)
    absent = sorted(name for name, shard in places.items() if name not in shards[shard])
    if absent:
        raise ValueError(f"{folder}: {_INDEX} names arrays that its files lack: {absent}")
    return {name: shards[shard][name] for name, shard in places.items()}


def _places(index: Path) -> dict[str, str]:
    """Name of each array -> the shard that holds it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError("a shard without a name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index}: no index of shards ({type(error).__name__}: {error}); expected a weight_map "
            "of names and files"
        ) from None
    return places


def _other(folder: Path) -> str:
    """A sentence that says what a folder without a safetensors file holds, or how to convert it."""
    if not (folder / "pytorch_model.bin").is_file():
        return f"it holds {sorted(path.name for path in folder.iterdir())[:10]}"
    return (
        "it holds pytorch_model.bin: convert it once, with torch and transformers installed, by "
        f'T5ForConditionalGeneration.from_pretrained("{folder}").save_pretrained("{folder}")'
    )


def write_folder(
    folder: str | Path, arrays: Mapping[str, np.ndarray], *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes model.safetensors, or several shards and their index.

    A shard has at most max_shard_bytes, or holds a single array that is larger.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(arrays, max_shard_bytes)
    if len(shards) == 1:
        (folder / _INDEX).unlink(missing_ok=True)
        write_file(folder / "model.safetensors", shards[0])
        return
    places = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        places |= dict.fromkeys(shard, name)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(arrays: Mapping[str, np.ndarray], most: int) -> list[dict[str, np.ndarray]]:
    shards, size = [{}], 0
    for name, array in sorted(arrays.items()):
        if shards[-1] and size + array.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards
