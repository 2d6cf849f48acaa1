"""Published weights: T5, T5 1.1 and FLAN-T5 in and out of Hugging Face folders and t5x checkpoints.

    config, params = pretrained.read("google/flan-t5-base")   # a folder, a hub id or a bucket
    config, params = pretrained.extend_vocabulary(config, params, 32128 + 2048, key)
    pretrained.write_hf("my_student", config, params)
    pretrained.write_t5x("my_student_t5x", config, params)

Every format becomes a flat dict of our names, which are t5x's
("encoder/layers_0/attention/query/kernel"). `flat_params.tree` compares it with the names and
shapes of the model, and its error lists what is missing, left over or of another size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax.models import flat_params, t5x_adafactor, t5x_checkpoints
from dgr_jax.models.hugging_face import read_hf, warn_of_no_head, write_hf
from dgr_jax.models.t5 import T5Config

__all__ = ["extend_vocabulary", "read", "read_hf", "read_t5x", "write_hf", "write_t5x"]


def read(source: str | Path) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) of a model in either format: see `read_hf` and `read_t5x`.

    source: a folder of Hugging Face or t5x, a bucket with a t5x checkpoint, or the id of a model on
      the hub.

    Raises ValueError for a folder of neither format, and the errors of those two functions.
    """
    path = Path(source)
    if path.is_dir() and ((path / "config.json").is_file() or list(path.glob("*.safetensors"))):
        return read_hf(path)
    if "://" in str(source) or (path.exists() and t5x_checkpoints.is_checkpoint(path)):
        return read_t5x(source)
    if path.is_dir():
        raise ValueError(
            f"{path}: got {sorted(p.name for p in path.iterdir())[:10]}, expected config.json and "
            "model.safetensors (Hugging Face) or checkpoint_<step> (t5x, orbax)"
        )
    return read_hf(source)


def read_t5x(
    source: str | Path, *, step: int | None = None, activations: tuple[str, ...] | None = None
) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) of a t5x checkpoint, in its own layout or orbax's, scanned or not.

    source: the folder of a run (its newest step is read, or `step`) or of a step, also in a bucket.
    activations: those of the projections. A checkpoint tells only what shows in its shapes; by
      default two projections are T5 1.1's ("gelu", "linear"), and one is T5's ("relu",).
    params: as those of `read_hf`, with layers one by one; `stacking.stack_layers` stacks them for
      scan_layers.

    Raises FileNotFoundError where there is no checkpoint, and ValueError for one that cannot be
    read, for weights that are not finite, and for names that are missing, left over or of another
    shape, all of which it lists.
    """
    where = str(t5x_checkpoints.find(source, step))
    flat = t5x_checkpoints.unscanned(t5x_checkpoints.read(source, step=step))
    config = _config_of_shapes(flat, activations, where)
    warn_of_no_head(config, where)
    return config, flat_params.tree(flat, config, where)


def _config_of_shapes(
    flat: Mapping[str, np.ndarray], activations: tuple[str, ...] | None, where: str
) -> T5Config:
    gated = "encoder/layers_0/mlp/wi_0/kernel" in flat
    telling = {
        "embedding": "token_embedder/embedding",
        "bias": "encoder/relpos_bias/rel_embedding",
        "query": "encoder/layers_0/attention/query/kernel",
        "mlp": f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel",
    }
    absent = [name for name in telling.values() if name not in flat or flat[name].ndim != 2]
    if absent:
        raise ValueError(
            f"{where}: expected the parameters of a T5, with matrices {absent}; got "
            f"{len(flat)} arrays: {sorted(flat)[:5]} ..."
        )
    shapes = {key: flat[name].shape for key, name in telling.items()}
    heads, buckets = shapes["bias"]
    layers = {"encoder": 0, "decoder": 0}
    for name in flat:
        if match := re.match(r"(encoder|decoder)/layers_(\d+)/", name):
            layers[match[1]] = max(layers[match[1]], int(match[2]) + 1)
    if empty := [stack for stack, count in layers.items() if count == 0]:
        raise ValueError(f"{where}: the {empty[0]} has no layer; expected the whole of a T5")
    return T5Config(
        vocab_size=shapes["embedding"][0],
        emb_dim=shapes["embedding"][1],
        num_heads=heads,
        head_dim=shapes["query"][1] // heads,
        mlp_dim=shapes["mlp"][1],
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        mlp_activations=activations or (("gelu", "linear") if gated else ("relu",)),
        logits_via_embedding=flat_params.OUR_HEAD not in flat,
        relpos_buckets=buckets,
    )


def write_t5x(
    folder: str | Path,
    config: T5Config,
    params: Any,
    *,
    step: int = 0,
    layout: str = "t5x",
    scanned: bool = False,
    dtype: str = "float32",
    opt_state: Any = None,
) -> None:
    """Writes folder/checkpoint_<step>, from which t5x restores a model and its Adafactor.

    params: those of Transformer(config), boxed or not, on host or device.
    layout: 't5x' or 'orbax'. scanned: with the names and axes of t5x's scanned model.
    dtype: that of the parameters, 'float32' (read back bit for bit) or 'bfloat16'.
    opt_state: a state of optimizers.Adafactor on a model without scan_layers, whose moments are
      written (not with `scanned`); by default the moments are those of a first step.

    Raises ValueError for params that do not fit the config and for settings that do not go
    together, FileExistsError where the step exists already.
    """
    if dtype not in flat_params.DTYPES:
        raise ValueError(
            f"write_t5x.dtype: got {dtype!r}, expected one of {sorted(flat_params.DTYPES)}"
        )
    if opt_state is not None and (scanned or config.scan_layers):
        raise ValueError("write_t5x.opt_state: got one for scanned layers, expected None")
    config, flat = flat_params.layer_by_layer(config, params)
    flat = t5x_checkpoints.scanned(flat) if scanned else flat
    fresh = opt_state is None
    moments = t5x_adafactor.fresh_moments(flat) if fresh else t5x_adafactor.moments_of(opt_state)
    target = {name: np.asarray(array, flat_params.DTYPES[dtype]) for name, array in flat.items()}
    t5x_checkpoints.write(folder, step, target, moments, layout=layout)


def extend_vocabulary(
    config: T5Config, params: Any, vocab_size: int, key: jax.Array
) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) with a larger vocabulary, which docid codes need; old rows stay as they are.

    New rows of the embedding, and new columns of the output kernel where there is one, are drawn
    from a normal distribution with the mean and the standard deviation of the old ones in each
    dimension. So they have the scale of the old tokens, and none is likelier than the average one.

    params: unboxed; the result is on the host. Raises ValueError for a smaller vocabulary.
    """
    if vocab_size < config.vocab_size:
        raise ValueError(
            f"extend_vocabulary.vocab_size: got {vocab_size}, expected at least "
            f"{config.vocab_size}, that of the model"
        )
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    new, kernel = vocab_size - config.vocab_size, flat_params.OUR_HEAD
    first, second = jax.random.split(key)
    flat["token_embedder/embedding"] = _with_rows(flat["token_embedder/embedding"], new, first)
    if kernel in flat:
        columns = np.asarray(flat[kernel]).T
        flat[kernel] = np.ascontiguousarray(_with_rows(columns, new, second).T)
    config = dataclasses.replace(config, vocab_size=vocab_size)
    return config, flax.traverse_util.unflatten_dict(flat, sep="/")


def _with_rows(rows: Any, count: int, key: jax.Array) -> np.ndarray:
    rows = np.asarray(rows)
    drawn = np.asarray(jax.random.normal(key, (count, rows.shape[1]), jnp.float32))
    return np.concatenate([rows, drawn * rows.std(0) + rows.mean(0)]).astype(rows.dtype)
