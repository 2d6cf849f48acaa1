"""Parameters of layers one by one, and stacked as a scan over layers needs them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = "layers"  # name of a scanned stack, and logical axis of the layers in its parameters
LAYERS_AXIS = 1  # the place of that axis in every parameter of the stack, as in t5x


def stack_layers(params: Any) -> Any:
    """The parameters of a Transformer -> those of the same Transformer with scan_layers.

    encoder/layers_0/mlp/wo/kernel [F, D], encoder/layers_1/... -> encoder/layers/mlp/wo/kernel
    [F, layers, D]; norm scales [D] -> [D, layers]. Works on NumPy and JAX arrays, without boxes.

    Raises ValueError where the layers of a stack are not numbered from 0.
    """
    return {name: _stacked(name, part) for name, part in params.items()}


def _stacked(stack: str, part: Any) -> Any:
    numbered = {name: part[name] for name in part if name.startswith(f"{LAYERS}_")}
    if not numbered:
        return part
    expected = [f"{LAYERS}_{i}" for i in range(len(numbered))]
    if set(numbered) != set(expected):
        raise ValueError(f"params[{stack!r}]: got {sorted(numbered)}, expected {expected}")
    in_order = (numbered[name] for name in expected)
    join = lambda *leaves: _array_module(leaves[0]).stack(leaves, axis=LAYERS_AXIS)
    rest = {name: leaf for name, leaf in part.items() if name not in numbered}
    return rest | {LAYERS: jax.tree.map(join, *in_order)}


def unstack_layers(params: Any) -> Any:
    """The inverse of `stack_layers`: parameters with scan_layers -> those without."""
    return {name: _unstacked(part) for name, part in params.items()}


def _unstacked(part: Any) -> Any:
    if LAYERS not in part:
        return part
    count = jax.tree.leaves(part[LAYERS])[0].shape[LAYERS_AXIS]
    take = lambda i: jax.tree.map(lambda leaf: leaf.take(i, axis=LAYERS_AXIS), part[LAYERS])
    rest = {name: leaf for name, leaf in part.items() if name != LAYERS}
    return rest | {f"{LAYERS}_{i}": take(i) for i in range(count)}


def _array_module(leaf: Any) -> Any:
    return np if isinstance(leaf, np.ndarray) else jnp
