"""The parameters of a model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.traverse_util
import jax

from dgr_jax import array_trees, partitioning, saved_params
from dgr_jax.model_dir import kept
from dgr_jax.models import tensor_files

TENSORS = "model*.safetensors"


def params(folder: Path, model: Any, mesh: jax.sharding.Mesh, rules: partitioning.Rules) -> Any:
    """The parameters that a training run has left in its folder, placed on the mesh: those of its
    checkpoints (see `saved_params.restore_params`) or, of a published folder, of its safetensors.

    Raises ValueError where their names or shapes are not those of the model.
    """
    abstract = partitioning.abstract_params(model, mesh, rules)
    if any(folder.glob(TENSORS)):
        return _placed(folder, abstract)
    return saved_params.restore_params(folder / "checkpoints", abstract)


def _placed(folder: Path, abstract: Any) -> Any:
    """The parameters in safetensors files, as the abstract ones say."""
    for path in folder.glob(TENSORS):
        kept.opened(path)
    flat = tensor_files.read_folder(folder)
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    array_trees.check_shapes(params, abstract, str(folder))

    def place(array: Any, to: jax.ShapeDtypeStruct) -> jax.Array:
        piece = lambda index: array[index].astype(to.dtype)
        return jax.make_array_from_callback(to.shape, to.sharding, piece)

    placed = jax.tree.map(place, params, abstract)
    array_trees.check_finite(placed, str(folder))
    return placed
