"""Adafactor's moments as t5x's checkpoints hold them: by name, and as optax's state."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
import optax

from dgr_jax.models import t5x_checkpoints

_LEAST_FACTORED = 128  # the smallest side of a matrix whose second moment is factored


def fresh_moments(target: t5x_checkpoints.Arrays) -> dict[str, np.ndarray]:
    """Adafactor's moments at its first step, as t5x shapes them, for parameters by name.

    The second moment of a matrix whose sides are both 128 or more is factored along its two axes;
    that of a scanned kernel is factored in every layer, whatever its size, with rows along the
    model's width.
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
    """The (row, column) axes of a factored second moment; None where it is not factored."""
    if len(shape) == 3 and name.endswith("kernel"):
        return (2, 0) if name.endswith(("out/kernel", "wo/kernel")) else (0, 2)
    if len(shape) != 2 or t5x_checkpoints.STACKED.fullmatch(name) or min(shape) < _LEAST_FACTORED:
        return None
    smaller, larger = np.argsort(shape, stable=True)
    return int(smaller), int(larger)


def moments_of(opt_state: Any) -> dict[str, np.ndarray]:
    """Adafactor's moments in an optax state, by the names of parameters that are not scanned."""
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
    """Adafactor's state in a checkpoint whose layers are not scanned, as optax represents it.

    Raises ValueError where there is no such state, where it has momentum, and where layers are
    scanned.
    """
    flat, folder = (
        t5x_checkpoints.read(source, step=step, part="state"),
        t5x_checkpoints.find(source, step),
    )
    if "step" not in flat or not any(name.endswith("/v_row") for name in flat):
        raise ValueError(f"{folder}: found no state of Adafactor: state/param_states/.../v_row")
    prefix, kinds = "param_states/", {"v": {}, "v_row": {}, "v_col": {}, "m": {}}
    for name, leaf in flat.items():
        if name.startswith(prefix):
            name, _, kind = name.removeprefix(prefix).rpartition("/")
            kinds.setdefault(kind, {})[name] = leaf
    if any(np.size(leaf) > 1 for leaf in kinds["m"].values()):
        raise ValueError(f"{folder}: got a state with momentum, expected none (beta1 None)")
    if any(t5x_checkpoints.STACKED.fullmatch(name) for name in kinds["v"]):
        raise ValueError(f"{folder}: got moments of scanned layers, expected layers one by one")
    nested = functools.partial(flax.traverse_util.unflatten_dict, sep="/")
    v_row, v_col, v = (nested(kinds[kind]) for kind in ("v_row", "v_col", "v"))
    return optax.FactoredState(np.int32(flat["step"]), v_row, v_col, v)
