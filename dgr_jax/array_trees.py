"""Trees of arrays, such as parameters: whether their shapes and values are as they must be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path; the paths of a list and a tuple, or of a dict and a dataclass, are alike."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(name(key) for key in path): leaf for path, leaf in leaves}


def check_shapes(got: Any, expected: Any, where: str) -> None:
    """Raises ValueError at the first leaf whose name or shape differs between the trees."""
    got, expected = _named_leaves(got), _named_leaves(expected)
    advice = "set the model and optimizer back, or give another folder (MODEL_DIR)"
    for name in expected:
        if name not in got:
            raise ValueError(f"{where}: {name} is missing; {advice}")
        if tuple(got[name].shape) != tuple(expected[name].shape):
            raise ValueError(
                f"{where}: {name}: got shape {tuple(got[name].shape)}, expected "
                f"{tuple(expected[name].shape)}, that of the configured model; {advice}"
            )
    extra = [name for name in got if name not in expected]
    if extra:
        raise ValueError(f"{where}: {extra[0]} is not part of the configured model; {advice}")


class NotFinite(ValueError):
    """A parameter holds a value that is no finite number."""


def check_finite(tree: Any, where: str) -> None:
    """Raises NotFinite naming the first leaf that holds a value that is no finite number."""
    leaves = {
        name: leaf
        for name, leaf in _named_leaves(tree).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if not leaves:
        return
    arrays = [leaf for leaf in leaves.values() if isinstance(leaf, jax.Array)]
    on_host = all(_is_on_host(array) for array in arrays)
    finite = _all_finite_on_host(leaves) if on_host else jax.device_get(_all_finite(leaves))
    if wrong := [name for name in leaves if not finite[name]]:
        raise NotFinite(
            f"{where}: {wrong[0]}, one of {len(wrong)} such parameters, holds NaN or infinity, "
            "expected finite numbers: its training diverged; lower the learning rate (its `peak`), "
            "and take the folder away to train again"
        )


def _is_on_host(array: jax.Array) -> bool:
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())


def _all_finite_on_host(leaves: dict[str, Any]) -> dict[str, bool]:
    """The same by NumPy, which reads the arrays where they lie and need not be compiled."""
    return {name: bool(np.isfinite(np.asarray(leaf)).all()) for name, leaf in leaves.items()}


@jax.jit
def _all_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}
