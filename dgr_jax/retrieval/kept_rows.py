"""Rows of a student's output embedding that belong to a version of the index: those of tokens which
passages got after training. The student's checkpoint never has them.

Axis letters: n tokens, P passages, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dgr_jax.decoding.trie_build import size_class
from dgr_jax.model_dir import kept
from dgr_jax.model_dir.records import SWAP
from dgr_jax.retrieval.kept_vectors import encoder

_FOLDER, _ABOUT = "rows", "rows.json"


class KeptRows(NamedTuple):
    """tokens int32 [n] and their rows f32 [n, D]; states f32 [P, D]: of one query of each passage
    of the version, in their order, for passages that come still later."""

    tokens: np.ndarray
    rows: np.ndarray
    states: np.ndarray

    def save(self, index: Path, stage: Path) -> None:
        """Writes them to a version, as those of the student of a stage."""
        folder = place(index, stage)
        folder.mkdir(parents=True)
        for name, array in self._asdict().items():
            np.save(folder / f"{name}.npy", array)
        about = {"student": encoder(stage)}
        (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def place(index: Path, stage: Path) -> Path:
    """The folder of the rows of a student in a version of the index."""
    return index / _FOLDER / stage.name.removesuffix(SWAP)


def load(index: Path, stage: Path) -> KeptRows | None:
    """The rows of a student; None where the index has no passage that came after training.

    Raises ValueError where it has those of other students alone.
    """
    if not (index / _FOLDER).is_dir():
        return None
    folder = place(index, stage)
    if (folder / _ABOUT).is_file():
        with kept.reading(folder / _ABOUT) as path:
            same = kept.read_json(path)["student"] == encoder(stage)
        if same:
            return KeptRows(*(_array(folder / f"{name}.npy") for name in KeptRows._fields))
    raise ValueError(
        f"{index}: has no rows of {stage}, which was trained after this version was made; "
        f"python -m dgr_jax.update --model_dir={stage.parent} --compact makes them"
    )


def opened(params: Any, index: Path, stage: Path) -> Any:
    """The parameters of a student with the rows of an index; all others stay."""
    held = load(index, stage)
    return params if held is None else put(params, held.tokens, held.rows)


def of(params: Any) -> np.ndarray:
    """f32 [V, D]: the output embedding."""
    if "logits_dense" in params["decoder"]:
        return np.asarray(params["decoder"]["logits_dense"]["kernel"], np.float32).T
    return np.asarray(params["token_embedder"]["embedding"], np.float32)


def put(params: Any, tokens: np.ndarray, rows: np.ndarray) -> Any:
    """The parameters with these rows of the output embedding, which lies where it lay. Nothing is
    compiled again within a size class of the number of rows."""
    more = size_class(len(tokens)) - len(tokens)
    tokens, rows = np.pad(tokens, (0, more), "edge"), np.pad(rows, ((0, more), (0, 0)), "edge")
    if "logits_dense" not in params["decoder"]:
        tied = params["token_embedder"]["embedding"]
        return {**params, "token_embedder": {"embedding": _changed(tied, tokens, rows)}}
    kernel = _changed(params["decoder"]["logits_dense"]["kernel"], tokens, rows, columns=True)
    return {**params, "decoder": {**params["decoder"], "logits_dense": {"kernel": kernel}}}


def _changed(
    table: jax.Array, tokens: np.ndarray, rows: np.ndarray, columns: bool = False
) -> jax.Array:
    return jax.device_put(_set(table, tokens, rows, columns=columns), table.sharding)


@functools.partial(jax.jit, static_argnames="columns")
def _set(table: jax.Array, tokens: jax.Array, rows: jax.Array, columns: bool) -> jax.Array:
    rows = rows.astype(table.dtype)
    return table.at[:, tokens].set(rows.T) if columns else table.at[tokens].set(rows)


def _array(path: Path) -> np.ndarray:
    with kept.reading(path) as opened:
        return np.load(opened, mmap_mode="r", allow_pickle=False)
