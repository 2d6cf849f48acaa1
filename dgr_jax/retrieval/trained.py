"""The parameters of a model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from dgr_jax import checkpoints, partitioning


def params(folder: Path, model: Any, mesh: jax.sharding.Mesh, rules: partitioning.Rules) -> Any:
    """The parameters that a training run has left in its folder, placed on the mesh; see
    `checkpoints.restore_params`."""
    abstract = partitioning.abstract_params(model, mesh, rules)
    return checkpoints.restore_params(folder / "checkpoints", abstract)
