"""Weights of others: T5, T5 1.1 and FLAN-T5 in and out of Hugging Face folders and t5x checkpoints.

    config, params = pretrained.read("google/flan-t5-base")   # a folder, a hub id or a bucket
    config, params = pretrained.extend_vocabulary(config, params, 32128 + 2048, key)
    pretrained.write_hf("my_student", config, params)
    pretrained.write_t5x("my_student_t5x", config, params)

Every format becomes a flat dict of our names ("encoder/layers_0/attention/query/kernel", those of
t5x); `_tree` then holds it against the names and shapes of the model, so that nothing is missing,
left over or of another size without an error that lists it.

Hugging Face keeps kernels as [out, in], we as [in, out]. The original T5 has tied embeddings
with logits scaled by D ** -0.5, and one relu projection; T5 1.1 and FLAN-T5 have an output kernel
of their own, unscaled, and a gated gelu.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn

from dgr_jax.models import t5x_checkpoints, tensor_files
from dgr_jax.models.t5 import T5Config, Transformer

logger = logging.getLogger(__name__)

# feed_forward_proj of config.json -> activations of the projections. Its gelu is the tanh form.
_PROJECTIONS = {
    "relu": ("relu",),
    "gated-relu": ("relu", "linear"),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_SAME_NAME = {  # ours -> the one of config.json
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "dropout_rate": "dropout_rate",
    "relpos_buckets": "relative_attention_num_buckets",
    "relpos_max_distance": "relative_attention_max_distance",
}
_DEFAULTS = {  # what the first configs leave out
    "dropout_rate": 0.1,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
# Of a block, in order: (our part, our norm, their part).
_SUBLAYERS = {
    "encoder": (
        ("attention", "pre_attention_layer_norm", "SelfAttention"),
        ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
    ),
    "decoder": (
        ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
    ),
}
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_HEAD = "lm_head.weight"
_OUR_HEAD = "decoder/logits_dense/kernel"
_EMBEDDING = "shared.weight"
_COPIES = (_EMBEDDING, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# In the first published checkpoints, read by no implementation.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read(source: str | Path) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) in whatever format `source` has: see `read_hf` and `read_t5x`.

    source: a folder of Hugging Face or t5x, a bucket with a t5x checkpoint, or the id of a model on
      the hub.

    Raises ValueError for a folder of neither, and what the two raise.
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


def read_hf(source: str | Path, *, revision: str | None = None) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) of a Hugging Face T5.

    source: a folder with config.json and model.safetensors (or its shards and their index), or
      else the id of a model on the hub, fetched by its client (extra `pretrained`).
    revision: of the model on the hub.
    params: nested dict of float32 numpy arrays, the tree of Transformer(config).init, unboxed.

    Raises ImportError without the client, OSError where the model cannot be had, ValueError for a
    model of another kind, for weights that are not finite, and with all names that are missing,
    left over or of another shape.
    """
    folder = _folder(source, revision)
    described = _read_config(folder / "config.json")
    arrays = tensor_files.read_folder(folder)
    arrays.pop(_UNUSED, None)
    arrays = _one_embedding(arrays)
    config = _config(described, arrays, folder)
    if not config.logits_via_embedding and _HEAD not in arrays:
        arrays |= _tied_head(described, arrays, folder)
    return config, _tree(_from_hf(config, arrays), config, str(folder))


def _read_config(path: Path) -> dict[str, Any]:
    """config.json. Raises FileNotFoundError, or ValueError for a damaged file, with its name."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: expected the config of a T5 there") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); expected the config of a T5") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path}: got {type(described).__name__}, expected the config of a T5")
    return described


def _tied_head(
    described: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: Path
) -> dict[str, np.ndarray]:
    """The embedding as the output kernel that the file lacks, where the config ties them; nothing
    of a T5 1.1, which has one of its own: it is missing then."""
    if described.get("tie_word_embeddings") is not True or _EMBEDDING not in arrays:
        return {}
    logger.warning(
        "%s: no output kernel (%s): the embedding is taken for it, as tie_word_embeddings in "
        "config.json says",
        *(where, _HEAD),
    )
    return {_HEAD: arrays[_EMBEDDING]}


def _folder(source: str | Path, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"{source}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{source!r} is no folder here; to fetch it from the hub, read_hf needs the extra "
            "'dgr_jax[pretrained]': pip install 'dgr_jax[pretrained]'"
        ) from None
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except Exception as error:  # of many kinds: no network, no such model, no access
        raise OSError(
            f"{source!r} is no folder here and could not be fetched from the hub "
            f"({type(error).__name__}: {error}); without a network, download the model elsewhere "
            "and give its folder"
        ) from error


def _one_embedding(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The embedding under one name. Files may hold it two or three times, or under another name;
    copies that differ stay, and are left over in the end."""
    copies = [name for name in _COPIES if name in arrays]
    if not copies:
        return arrays
    embedding = arrays[copies[0]]
    same = [name for name in copies if np.array_equal(arrays[name], embedding)]
    return {k: v for k, v in arrays.items() if k not in same} | {_EMBEDDING: embedding}


def _config(
    described: dict[str, Any], arrays: Mapping[str, np.ndarray], where: str | Path
) -> T5Config:
    kind = described.get("model_type")
    if kind not in ("t5", "mt5"):
        raise ValueError(f"{where}/config.json: model_type: got {kind!r}, expected 't5' or 'mt5'")
    if described.get("layer_norm_epsilon", 1e-6) != 1e-6:
        got = described["layer_norm_epsilon"]
        raise ValueError(f"{where}/config.json: layer_norm_epsilon: got {got}, expected 1e-06")
    projection = described.get("feed_forward_proj", "relu")
    if not isinstance(projection, str) or projection not in _PROJECTIONS:
        raise ValueError(
            f"{where}/config.json: feed_forward_proj: got {projection!r}, expected one of "
            f"{sorted(_PROJECTIONS)}"
        )
    given = {**_DEFAULTS, **described}
    if given.get("num_decoder_layers") is None:
        given["num_decoder_layers"] = given.get("num_layers")
    for name in _SAME_NAME.values():
        got, kind = given.get(name), (int, float) if name == "dropout_rate" else int
        if not isinstance(got, kind) or isinstance(got, bool) or got < (name != "dropout_rate"):
            raise ValueError(f"{where}/config.json: {name}: got {got!r}, expected a number above 0")
    config = T5Config(
        **{ours: given[theirs] for ours, theirs in _SAME_NAME.items()},
        mlp_activations=_PROJECTIONS[projection],
        logits_via_embedding=_scaled(described, arrays, where),
    )
    _warn_of_no_head(config, where)
    return config


def _warn_of_no_head(config: T5Config, where: str | Path) -> None:
    """The T5 of two projections, 1.1 and all after it, have an output kernel."""
    if config.logits_via_embedding and len(config.mlp_activations) > 1:
        logger.warning(
            "%s: no output kernel, and two projections as those of T5 1.1, which has one: logits "
            "are taken to be those of the first T5, by its embedding; look whether the weights are "
            "whole",
            where,
        )


def _scaled(
    described: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str | Path
) -> bool:
    """Whether logits are those of the original T5: scaled, by the embedding.

    Newer configs say so by themselves ("scale_decoder_outputs"); older ones where they say that
    the embeddings are tied, which newer ones always do.
    """
    scaled = described.get("scale_decoder_outputs", described.get("tie_word_embeddings", True))
    head, embedding = arrays.get(_HEAD), arrays.get(_EMBEDDING, ())
    if scaled and head is not None and not np.array_equal(head, embedding):
        raise ValueError(
            f"{where}: scaled logits with an output kernel that is not the embedding ({_HEAD}) is "
            "neither T5 nor T5 1.1; expected tie_word_embeddings false in config.json"
        )
    return scaled


def _names(config: T5Config) -> Iterator[tuple[str, str]]:
    """(our name, the Hugging Face name) of every parameter."""
    yield "token_embedder/embedding", _EMBEDDING
    if not config.logits_via_embedding:
        yield _OUR_HEAD, _HEAD
    for stack, sublayers in _SUBLAYERS.items():
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{stack}/relpos_bias/rel_embedding", bias
        yield f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight"
        for block in range(getattr(config, f"num_{stack}_layers")):
            for i, (part, norm, theirs) in enumerate(sublayers):
                ours, layer = f"{stack}/layers_{block}", f"{stack}.block.{block}.layer.{i}"
                yield f"{ours}/{norm}/scale", f"{layer}.layer_norm.weight"
                for name, short in _projections(config, part).items():
                    yield f"{ours}/{part}/{name}/kernel", f"{layer}.{theirs}.{short}.weight"


def _projections(config: T5Config, part: str) -> dict[str, str]:
    if part != "mlp":
        return _ATTENTION
    gated = len(config.mlp_activations) > 1
    return {name: name for name in (("wi_0", "wi_1", "wo") if gated else ("wi", "wo"))}


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """Between their layout and ours: all but embeddings and norms are transposed."""
    return array.T if name.endswith(("kernel", "rel_embedding")) else array


def _from_hf(config: T5Config, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under our names; those of no known name keep theirs."""
    arrays = dict(arrays)
    if config.logits_via_embedding:
        arrays.pop(_HEAD, None)  # a copy of the embedding
    flat = {
        ours: _turned(ours, arrays.pop(theirs))
        for ours, theirs in _names(config)
        if theirs in arrays
    }
    return flat | arrays


@functools.lru_cache(maxsize=8)
def _shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model."""
    token = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token)
    flat = flax.traverse_util.flatten_dict(nn.unbox(variables["params"]), sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def _tree(flat: Mapping[str, np.ndarray], config: T5Config, where: str) -> dict[str, Any]:
    """Flat arrays of any float dtype as the nested float32 parameters of the model.

    Raises ValueError with all names that are missing, left over, or of another shape, and for
    values that are not finite.
    """
    expected = _shapes(config)
    told = {_OUR_HEAD: f" ({_HEAD} of Hugging Face; no other array is taken for it)"}
    absent = sorted(expected.keys() - flat.keys())
    faults = [f"{name} is missing{told.get(name, '')}" for name in absent]
    faults += [f"{name} is left over" for name in sorted(flat.keys() - expected.keys())]
    faults += [
        f"{name}: got shape {flat[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in flat and flat[name].shape != shape
    ]
    if faults:
        raise ValueError(f"{where} does not fit {config}: " + "; ".join(faults))
    with np.errstate(over="ignore"):  # of float64; found below
        copied = {name: np.array(flat[name], np.float32, order="C") for name in expected}
    _require_finite(copied, where)
    return flax.traverse_util.unflatten_dict(copied, sep="/")


def _require_finite(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raises ValueError with the arrays that hold inf or NaN."""
    faulty = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if faulty:
        name, more = faulty[0], f" and {len(faulty) - 1} other arrays" if len(faulty) > 1 else ""
        bad = np.count_nonzero(~np.isfinite(arrays[name]))
        raise ValueError(
            f"{where}: {name} holds {bad:,} of {arrays[name].size:,} values that are not finite"
            f"{more}; expected real numbers: the file is damaged, was saved by a run that had "
            "diverged, or in float16, which ends at 65,504"
        )


def write_hf(
    folder: str | Path,
    config: T5Config,
    params: Any,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and model.safetensors (or shards) that transformers loads.

    params: of Transformer(config), boxed or not, on host or device. dtype: 'float32' (read back
    bit for bit) or 'bfloat16', of the file.

    Raises ValueError for activations that no T5 of theirs has, for another dtype, and for params
    that do not fit the config.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"write_hf.dtype: got {dtype!r}, expected one of {sorted(_DTYPES)}")
    described = _described(config) | {"dtype": dtype, "torch_dtype": dtype}
    config, flat = _layer_by_layer(config, params)
    arrays = {
        theirs: np.ascontiguousarray(_turned(ours, flat[ours]).astype(_DTYPES[dtype]))
        for ours, theirs in _names(config)
    }
    tensor_files.write_folder(folder, arrays, max_shard_bytes=max_shard_bytes)
    text = json.dumps(described, indent=1)
    (Path(folder) / "config.json").write_text(text, encoding="utf-8")


def _layer_by_layer(config: T5Config, params: Any) -> tuple[T5Config, dict[str, np.ndarray]]:
    """The config without scan and the parameters by name, on the host.

    Raises ValueError as `_tree`, and for parameters that these formats have no place for.
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
    return config, flax.traverse_util.flatten_dict(_tree(flat, config, "params"), sep="/")


def _without_scan(config: T5Config) -> T5Config:
    return dataclasses.replace(config, scan_layers=False)


def _described(config: T5Config) -> dict[str, Any]:
    """config.json"""
    projections = {activations: name for name, activations in _PROJECTIONS.items()}
    if config.mlp_activations not in projections:
        raise ValueError(
            f"T5Config.mlp_activations: got {config.mlp_activations}, expected one of "
            f"{sorted(projections)} to write a Hugging Face folder"
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{theirs: getattr(config, ours) for ours, theirs in _SAME_NAME.items()},
        "feed_forward_proj": projections[config.mlp_activations],
        "tie_word_embeddings": config.logits_via_embedding,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def read_t5x(
    source: str | Path, *, step: int | None = None, activations: tuple[str, ...] | None = None
) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) of a t5x checkpoint, in its own layout or orbax's, scanned or not.

    source: the folder of a run (its newest step, or `step`), or of a step; a bucket (gs://) too.
    activations: of the projections. The checkpoint holds no setting that is not a shape; by default
      two projections are T5 1.1's ("gelu", "linear"), and one is T5's ("relu",).
    params: as of `read_hf`: layers one by one; `stacking.stack_layers` stacks them for scan_layers.

    Raises FileNotFoundError where there is no checkpoint, ValueError for one that cannot be read,
    for weights that are not finite, and with all names that are missing, left over or of another
    shape.
    """
    where = str(t5x_checkpoints.find(source, step))
    flat = t5x_checkpoints.unscanned(t5x_checkpoints.read(source, step=step))
    config = _config_of_shapes(flat, activations, where)
    _warn_of_no_head(config, where)
    return config, _tree(flat, config, where)


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
    numbers = {"encoder": [0], "decoder": [0]}
    for name in flat:
        if match := re.match(r"(encoder|decoder)/layers_(\d+)/", name):
            numbers[match[1]].append(int(match[2]) + 1)
    if empty := [stack for stack, found in numbers.items() if max(found) == 0]:
        raise ValueError(f"{where}: the {empty[0]} has no layer; expected the whole of a T5")
    return T5Config(
        vocab_size=shapes["embedding"][0],
        emb_dim=shapes["embedding"][1],
        num_heads=heads,
        head_dim=shapes["query"][1] // heads,
        mlp_dim=shapes["mlp"][1],
        num_encoder_layers=max(numbers["encoder"]),
        num_decoder_layers=max(numbers["decoder"]),
        mlp_activations=activations or (("gelu", "linear") if gated else ("relu",)),
        logits_via_embedding=_OUR_HEAD not in flat,
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
    """Writes folder/checkpoint_<step>, that t5x restores whole into its Adafactor.

    params: of Transformer(config), boxed or not, on host or device.
    layout: 't5x' or 'orbax'. scanned: with the names and axes of t5x's scanned model.
    dtype: 'float32' (read back bit for bit) or 'bfloat16', of the parameters.
    opt_state: of optimizers.Adafactor on a model without scan_layers, whose moments are written
      (not for scanned); by default they begin anew.

    Raises ValueError for params that do not fit the config and for settings of another kind,
    FileExistsError where the step is there.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"write_t5x.dtype: got {dtype!r}, expected one of {sorted(_DTYPES)}")
    if opt_state is not None and (scanned or config.scan_layers):
        raise ValueError("write_t5x.opt_state: got one for scanned layers, expected None")
    config, flat = _layer_by_layer(config, params)
    flat = t5x_checkpoints.scanned(flat) if scanned else flat
    fresh = opt_state is None
    moments = (
        t5x_checkpoints.fresh_moments(flat) if fresh else t5x_checkpoints.moments_of(opt_state)
    )
    target = {name: np.asarray(array, _DTYPES[dtype]) for name, array in flat.items()}
    t5x_checkpoints.write(folder, step, target, moments, layout=layout)


def extend_vocabulary(
    config: T5Config, params: Any, vocab_size: int, key: jax.Array
) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) of a larger vocabulary, as docid codes need; the old rows stay as they are.

    New rows of the embedding, and new columns of the output kernel where there is one, are drawn
    from a normal distribution with the mean and the standard deviation of the old ones in each
    dimension: in scale with the old tokens, none of them likelier than the average one.

    params: unboxed; the result is on the host. Raises ValueError for a smaller vocabulary.
    """
    if vocab_size < config.vocab_size:
        raise ValueError(
            f"extend_vocabulary.vocab_size: got {vocab_size}, expected at least "
            f"{config.vocab_size}, that of the model"
        )
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    new, kernel = vocab_size - config.vocab_size, _OUR_HEAD
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
