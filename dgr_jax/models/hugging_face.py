"""T5, T5 1.1 and FLAN-T5 in and out of Hugging Face folders.

Hugging Face keeps kernels as [out, in], this package as [in, out]. The original T5 has tied
embeddings with logits scaled by D ** -0.5, and one relu projection; T5 1.1 and FLAN-T5 have an
output kernel of their own, unscaled, and a gated gelu.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.models import flat_params, tensor_files
from dgr_jax.models.t5 import T5Config

logger = logging.getLogger(__name__)

# feed_forward_proj of config.json -> activations of the projections. Its gelu is the tanh form.
_PROJECTIONS = {
    "relu": ("relu",),
    "gated-relu": ("relu", "linear"),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_SAME_NAME = {  # our name of a setting -> its name in config.json
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
_DEFAULTS = {  # the values of settings that the first configs leave out
    "dropout_rate": 0.1,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
# The parts of a block in order: (our name of a part, our name of its norm, their name of the part).
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
_EMBEDDING = "shared.weight"
_COPIES = (_EMBEDDING, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The first published checkpoints hold this array; no implementation reads it.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read_hf(source: str | Path, *, revision: str | None = None) -> tuple[T5Config, dict[str, Any]]:
    """(config, params) of a Hugging Face T5.

    source: a folder with config.json and model.safetensors (or its shards and their index), or
      else the id of a model on the hub, which the hub's client downloads (extra `pretrained`).
    revision: the revision of the model on the hub.
    params: nested dict of float32 numpy arrays, the tree of Transformer(config).init, unboxed.

    Raises ImportError where the client is needed and not installed, OSError where the download
    fails, and ValueError for a model of another kind, for weights that are not finite, and for
    names that are missing, left over or of another shape, all of which it lists.
    """
    folder = _folder(source, revision)
    described = _read_config(folder / "config.json")
    arrays = tensor_files.read_folder(folder)
    arrays.pop(_UNUSED, None)
    arrays = _one_embedding(arrays)
    config = _config(described, arrays, folder)
    if not config.logits_via_embedding and flat_params.HEAD not in arrays:
        arrays |= _tied_head(described, arrays, folder)
    return config, flat_params.tree(_from_hf(config, arrays), config, str(folder))


def _read_config(path: Path) -> dict[str, Any]:
    """The contents of config.json. Raises FileNotFoundError, or ValueError for a damaged file."""
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
    """The embedding, for the output kernel that the file lacks, where the config ties the two.

    Empty for a T5 1.1, which has a kernel of its own, so that it is reported as missing.
    """
    if described.get("tie_word_embeddings") is not True or _EMBEDDING not in arrays:
        return {}
    logger.warning(
        "%s: no output kernel (%s): the embedding is taken for it, as tie_word_embeddings in "
        "config.json says",
        *(where, flat_params.HEAD),
    )
    return {flat_params.HEAD: arrays[_EMBEDDING]}


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
    """The arrays with the embedding under one name; files may hold it two or three times, or under
    another name. A copy that differs stays, and is reported as left over in the end."""
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
    warn_of_no_head(config, where)
    return config


def warn_of_no_head(config: T5Config, where: str | Path) -> None:
    """Warns where a T5 with two projections, as T5 1.1 and its successors have, lacks the output
    kernel that these have too."""
    if config.logits_via_embedding and len(config.mlp_activations) > 1:
        logger.warning(
            "%s: no output kernel, but two projections as in T5 1.1, which has such a kernel: "
            "logits are computed by the embedding, as in the first T5; check that the weights are "
            "complete",
            where,
        )


def _scaled(
    described: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str | Path
) -> bool:
    """Whether the logits are those of the original T5, scaled products with the embedding.

    Newer configs have a setting for it ("scale_decoder_outputs"), and always say that the
    embeddings are tied; in older ones tied embeddings mean scaled logits.
    """
    scaled = described.get("scale_decoder_outputs", described.get("tie_word_embeddings", True))
    head = arrays.get(flat_params.HEAD)
    if scaled and head is not None and not np.array_equal(head, arrays.get(_EMBEDDING)):
        raise ValueError(
            f"{where}: scaled logits with an output kernel that is not the embedding "
            f"({flat_params.HEAD}) is neither T5 nor T5 1.1; expected tie_word_embeddings false in "
            "config.json"
        )
    return scaled


def _names(config: T5Config) -> Iterator[tuple[str, str]]:
    """(our name, the Hugging Face name) of every parameter."""
    yield "token_embedder/embedding", _EMBEDDING
    if not config.logits_via_embedding:
        yield flat_params.OUR_HEAD, flat_params.HEAD
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
    """An array of their layout in ours, or the reverse: kernels and relative positions are
    transposed, embeddings and norms are not."""
    return array.T if name.endswith(("kernel", "rel_embedding")) else array


def _from_hf(config: T5Config, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under our names; an array whose name is not known keeps it."""
    arrays = dict(arrays)
    if config.logits_via_embedding:
        arrays.pop(flat_params.HEAD, None)  # a copy of the embedding
    flat = {
        ours: _turned(ours, arrays.pop(theirs))
        for ours, theirs in _names(config)
        if theirs in arrays
    }
    return flat | arrays


def write_hf(
    folder: str | Path,
    config: T5Config,
    params: Any,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and model.safetensors (or shards) that transformers loads.

    params: those of Transformer(config), boxed or not, on host or device. dtype: that of the file,
    'float32' (read back bit for bit) or 'bfloat16'.

    Raises ValueError for activations that no T5 of transformers has, for another dtype, and for
    params that do not fit the config.
    """
    if dtype not in flat_params.DTYPES:
        raise ValueError(
            f"write_hf.dtype: got {dtype!r}, expected one of {sorted(flat_params.DTYPES)}"
        )
    described = _described(config) | {"dtype": dtype, "torch_dtype": dtype}
    config, flat = flat_params.layer_by_layer(config, params)
    arrays = {
        theirs: np.ascontiguousarray(_turned(ours, flat[ours]).astype(flat_params.DTYPES[dtype]))
        for ours, theirs in _names(config)
    }
    tensor_files.write_folder(folder, arrays, max_shard_bytes=max_shard_bytes)
    text = json.dumps(described, indent=1)
    (Path(folder) / "config.json").write_text(text, encoding="utf-8")


def _described(config: T5Config) -> dict[str, Any]:
    """The contents of config.json."""
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
