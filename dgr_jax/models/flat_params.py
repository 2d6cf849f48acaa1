"""The parameters of a T5 as a flat dict of arrays by name, and as the tree of the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn

from dgr_jax.models import t5x_checkpoints
from dgr_jax.models.t5 import T5Config, Transformer

HEAD = "lm_head.weight"
OUR_HEAD = "decoder/logits_dense/kernel"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@functools.lru_cache(maxsize=8)
def _shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model."""
    token = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token)
    flat = flax.traverse_util.flatten_dict(nn.unbox(variables["params"]), sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def tree(flat: Mapping[str, np.ndarray], config: T5Config, where: str) -> dict[str, Any]:
    """Flat arrays of any float dtype as the nested float32 parameters of the model.

    Raises ValueError for names that are missing, left over, of another shape or of whole numbers,
    all of which it lists, and for values that are not finite.
    """
    expected = _shapes(config)
    notes = {OUR_HEAD: f" ({HEAD} of Hugging Face; no other array is taken for it)"}
    absent = sorted(expected.keys() - flat.keys())
    faults = [f"{name} is missing{notes.get(name, '')}" for name in absent]
    faults += [f"{name} is left over" for name in sorted(flat.keys() - expected.keys())]
    faults += [
        f"{name}: got shape {flat[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in flat and flat[name].shape != shape
    ]
    faults += [
        f"{name}: got {flat[name].dtype}, expected floats: quantised weights are not read"
        for name in expected
        if name in flat and flat[name].dtype.kind in "iub"
    ]
    if faults:
        raise ValueError(f"{where} does not fit {config}: " + "; ".join(faults))
    with np.errstate(
        over="ignore"
    ):  # a float64 too large for float32: `_require_finite` reports it
        copied = {name: np.array(flat[name], np.float32, order="C") for name in expected}
    _require_finite(copied, where)
    return flax.traverse_util.unflatten_dict(copied, sep="/")


def _require_finite(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raises ValueError naming an array that holds inf or NaN, and how many more do."""
    faulty = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if faulty:
        name, more = faulty[0], f" and {len(faulty) - 1} other arrays" if len(faulty) > 1 else ""
        bad = np.count_nonzero(~np.isfinite(arrays[name]))
        raise ValueError(
            f"{where}: {name} holds {bad:,} of {arrays[name].size:,} values that are not finite"
            f"{more}; expected real numbers: the file is damaged, was saved by a run that had "
            "diverged, or in float16, which ends at 65,504"
        )


def layer_by_layer(config: T5Config, params: Any) -> tuple[T5Config, dict[str, np.ndarray]]:
    """The config without scan_layers, and its parameters by name, on the host.

    Raises ValueError as `tree`, and for parameters that the formats of others have no place for.
    """
    if config.prefix_adaptive_layers:
        raise ValueError(
            f"T5Config.prefix_adaptive_layers: got {config.prefix_adaptive_layers}, expected 0: "
            "neither t5x nor transformers has a place for the parameters of a prefix-adaptive "
            "decoder; keep this student's own checkpoints"
        )
    flat = flax.traverse_util.flatten_dict(nn.unbox(params), sep="/")
    flat = {name: np.asarray(leaf) for name, leaf in flat.items()}
    if config.scan_layers:
        flat, config = t5x_checkpoints.unscanned(flat), _without_scan(config)
    return config, flax.traverse_util.flatten_dict(tree(flat, config, "params"), sep="/")


def _without_scan(config: T5Config) -> T5Config:
    return dataclasses.replace(config, scan_layers=False)
