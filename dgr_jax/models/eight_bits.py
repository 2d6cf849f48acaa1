"""Kernels of 8 bits, for searches: a quarter of the memory, and products of whole numbers.

A kernel W [I, F] is rounded once, with a scale for each of its F columns, and the rows x of a
product when they come, with a scale for each row (as in Dettmers et al. 2022, without a part of
higher precision):

    x W ~ (round(x / a) round(W / b)) a b,   a = max |x| / 127,  b [F] = max over I of |W| / 127

The sum in brackets is that of int32. Processors with instructions for it make four products of
8 bits in the time of one of float32; others gain nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dgr_jax import ranges

KERNELS = ranges.one_of("float", "int8")  # of the settings of searches

_LARGEST = 127.0
_SMALLEST = 1e-30  # a scale of zeros


def searched(params: Any, kernels: str) -> Any:
    """The parameters that a search multiplies, by its setting of that name."""
    return jax.jit(rounded)(params) if kernels == "int8" else params


def rounded(params: Any) -> Any:
    """Parameters whose kernels are rounded: where a module has a `kernel` [I, F], or in a scanned
    stack [I, layers, F], it has `values` int8 [F, I] or [F, layers, I], in the order in which
    products read them, and `scale` f32 [F] or [F, layers]. All other parameters stay."""
    if not isinstance(params, dict):
        return params
    rest = {name: rounded(part) for name, part in params.items() if name != "kernel"}
    if "kernel" not in params:
        return rest
    kernel = params["kernel"].astype(jnp.float32)
    scale = _scale(kernel, axis=0)
    values = jnp.round(kernel / scale).astype(jnp.int8)
    return rest | {"values": jnp.swapaxes(values, 0, -1), "scale": scale[0].T}


def product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., I], values int8 [F, I], scale f32 [F] -> f32 [..., F]"""
    x = x.astype(jnp.float32)
    of_row = _scale(x, axis=-1)
    x = jnp.round(x / of_row).astype(jnp.int8)
    last = ((x.ndim - 1,), (1,)), ((), ())
    sums = lax.dot_general(x, values, last, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * of_row * scale


def _scale(x: jax.Array, axis: int) -> jax.Array:
    return jnp.maximum(jnp.abs(x).max(axis, keepdims=True) / _LARGEST, _SMALLEST)
