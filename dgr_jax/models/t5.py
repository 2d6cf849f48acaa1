"""T5 and T5 1.1 (Raffel et al. 2020, Shazeer 2020) as the student: one encoder pass, many targets.

Axis letters: B queries, Q query length, R targets (or beams) of a query, T target length,
S self-attention cache length, V vocabulary, D model width, H heads, K head width.
The decoder works on [B, R, T]: the R targets of a query share its encoder output and its
cross-attention keys and values, in training (R = L * K identifiers) and in decoding (R = beams).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax import ranges
from dgr_jax.models import activations, layers
from dgr_jax.models.stacking import LAYERS, LAYERS_AXIS

# What a layer keeps of its forward pass, by T5Config.remat (t5x's names): everything; the products
# of activations and kernels, but not those of attention; only its input.
REMAT = {
    "none": None,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
_TARGETS = ("batch", "targets", "length", "embed")


@dataclass(frozen=True)
class T5Config:
    """Sizes and switches of a T5. Parameters are float32; `dtype` is that of the activations.

    vocab_size 0 means: as large as the experiment's vocabulary (text pieces and docid codes).
    remat: what a layer computes again in the backward pass: 'none', 'minimal', 'full', see REMAT.
    scan_layers: one layer is compiled and run for all; the parameters of a stack lie in arrays
      with an axis of layers, as t5x's scanned checkpoints. See `stacking`.
    prefix_adaptive_layers: of the decoder that adapts the output weights to the prefix, see
      `PrefixAdaptation` (4 in the published model); 0: the output weights of a T5.
    """

    vocab_size: int = 0
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    dtype: str = "float32"
    remat: str = dataclasses.field(default="none", metadata={"fingerprint": False})
    scan_layers: bool = False
    prefix_adaptive_layers: int = dataclasses.field(
        default=0, metadata={"fingerprint": "unless default"}
    )

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f"T5Config.remat: got {self.remat!r}, expected one of {list(REMAT)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"T5Config.dtype: got {self.dtype!r}, expected 'float32' or 'bfloat16'"
            )
        sizes = ("emb_dim", "num_heads", "head_dim", "mlp_dim", "num_decoder_layers")
        counts = ("vocab_size", "num_encoder_layers", "prefix_adaptive_layers")
        ranges.check(
            self,
            **dict.fromkeys(sizes, ranges.at_least(1)),
            **dict.fromkeys(counts, ranges.at_least(0)),
            dropout_rate=ranges.from_to_below(0, 1),
            relpos_buckets=ranges.at_least(4),  # half of them, of each direction, are distances
            relpos_max_distance=ranges.above(self.relpos_buckets / 2),
        )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))


def _attention(config: T5Config) -> layers.Attention:
    return layers.Attention(
        config.num_heads,
        config.head_dim,
        config.emb_dim,
        config.dropout_rate,
        jnp.dtype(config.dtype),
    )


def _norm(config: T5Config) -> layers.RMSNorm:
    return layers.RMSNorm(jnp.dtype(config.dtype))


def _mlp(config: T5Config) -> layers.MlpBlock:
    return layers.MlpBlock(
        config.mlp_dim, config.mlp_activations, config.dropout_rate, jnp.dtype(config.dtype)
    )


def _dropout(config: T5Config) -> nn.Dropout:
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


def _relpos(config: T5Config) -> layers.RelativePositionBias:
    return layers.RelativePositionBias(
        config.num_heads, config.relpos_buckets, config.relpos_max_distance
    )


class EncoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        self.pre_attention_layer_norm = _norm(self.config)
        self.attention = _attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = _mlp(self.config)
        self.dropout = _dropout(self.config)

    def __call__(self, x: jax.Array, bias: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, Q, D], bias [B, H, Q, Q] -> [B, Q, D]"""
        y = self.pre_attention_layer_norm(x)
        k, v = self.attention.keys_values(y)
        y = self.attention(self.attention.queries(y), k, v, bias, deterministic)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        x = x + self.dropout(y, deterministic)
        return activations.cut(x, ("batch", "length", "embed"))

    def scan(self, x: jax.Array, bias: jax.Array, deterministic: bool) -> tuple[jax.Array, None]:
        """`__call__` as a step of a scan over layers."""
        return self(x, bias, deterministic), None


class DecoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        self.pre_self_attention_layer_norm = _norm(self.config)
        self.self_attention = _attention(self.config)
        self.pre_cross_attention_layer_norm = _norm(self.config)
        self.encoder_decoder_attention = _attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = _mlp(self.config)
        self.dropout = _dropout(self.config)

    def _rest(self, x, cross, cross_bias, deterministic):
        """Cross-attention and feed-forward, the same in training and in a decoding step."""
        y = self.pre_cross_attention_layer_norm(x)
        q, (k, v) = self.encoder_decoder_attention.queries(y), cross
        y = self.encoder_decoder_attention.shared(q, k, v, cross_bias, deterministic)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return activations.cut(x + self.dropout(y, deterministic), _TARGETS)

    def __call__(self, x, bias, encoded, cross_bias, deterministic: bool) -> jax.Array:
        """x [B, R, T, D], bias [H, T, T] or [B, R, H, T, T], encoded [B, Q, D], cross_bias as
        `_cross_bias` makes it."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        y = self.self_attention(self.self_attention.queries(y), k, v, bias, deterministic)
        x = x + self.dropout(y, deterministic)
        return self._rest(x, self.cross(encoded), cross_bias, deterministic)

    def cross(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Cross-attention keys and values of a query, [B, Q, H, K] each."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def step(self, x, cache, position, bias, cross, cross_bias):
        """One token a beam: x [B, R, 1, D], cache k and v [B, R, S, H, K], bias [H, 1, S]."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        k = jax.lax.dynamic_update_slice_in_dim(cache["key"], k, position, axis=2)
        v = jax.lax.dynamic_update_slice_in_dim(cache["value"], v, position, axis=2)
        y = self.self_attention(self.self_attention.queries(y), k, v, bias, True)
        x = self._rest(x + y, cross, cross_bias, True)
        return x, {"key": k, "value": v}

    def ahead(self, x, cache, bias, cross, cross_bias):
        """Tokens after those in the cache, which stays as it is: x [B, R, W, D], cache k and v
        [B, R, S, H, K], bias [H, W, S + W]."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        k = jnp.concatenate([cache["key"], k], axis=2)
        v = jnp.concatenate([cache["value"], v], axis=2)
        y = self.self_attention(self.self_attention.queries(y), k, v, bias, True)
        return self._rest(x + y, cross, cross_bias, True)

    def scan_ahead(self, x, index_and_cross, cache, bias, cross_bias):
        """`ahead` as a step of a scan over layers: cache [B, R, layers, S, H, K]."""
        index, cross = index_and_cross
        own = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=2, keepdims=False)
        return self.ahead(x, jax.tree.map(own, cache), bias, cross, cross_bias), None

    def scan(self, x, bias, encoded, cross_bias, deterministic: bool):
        """`__call__` as a step of a scan over layers."""
        return self(x, bias, encoded, cross_bias, deterministic), None

    def scan_cross(self, nothing: None, encoded: jax.Array):
        """`cross` as a step of a scan over layers."""
        return nothing, self.cross(encoded)

    def scan_step(self, carry, index_and_cross, position, bias, cross_bias):
        """`step` as a step of a scan over layers: carry (x, cache), cache [B, R, layers, S, H, K].

        The cache stays in place: a layer reads its part and writes one position.
        """
        (x, cache), (index, cross) = carry, index_and_cross
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        zero = jnp.zeros_like(index)
        start = (zero, zero, index, position.astype(index.dtype), zero, zero)
        cache = {
            name: jax.lax.dynamic_update_slice(cache[name], new[:, :, None], start)
            for name, new in (("key", k), ("value", v))
        }
        own = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=2, keepdims=False)
        k, v = own(cache["key"]), own(cache["value"])
        y = self.self_attention(self.self_attention.queries(y), k, v, bias, True)
        return (self._rest(x + y, cross, cross_bias, True), cache), None


class PrefixLayer(DecoderLayer):
    """A decoder layer that sees no query: self-attention and feed-forward."""

    def setup(self) -> None:
        self.pre_self_attention_layer_norm = _norm(self.config)
        self.self_attention = _attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = _mlp(self.config)
        self.dropout = _dropout(self.config)

    def _rest(self, x, cross, cross_bias, deterministic):
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return activations.cut(x + self.dropout(y, deterministic), _TARGETS)

    def cross(self, encoded: jax.Array) -> None:
        return None


def _rematerialised(config: T5Config, layer: type[nn.Module], deterministic: int) -> Any:
    """The class of a layer under T5Config.remat; deterministic: the place of that argument."""
    if config.remat == "none":
        return layer
    return nn.remat(
        layer,
        policy=REMAT[config.remat],
        static_argnums=(deterministic,),
        prevent_cse=not config.scan_layers,
    )


def _scanned(layer: Any, config: T5Config, length: int, methods: dict[str, tuple[Any, ...]]) -> Any:
    """A stack of `length` layers as one module; methods: name -> axes of what follows the carry."""
    scan = functools.partial(
        dict,
        variable_axes={"params": LAYERS_AXIS},
        split_rngs={"params": True, "dropout": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: LAYERS},
    )
    return nn.scan(layer, methods={k: scan(in_axes=axes) for k, axes in methods.items()})(config)


class Encoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        config, length = self.config, self.config.num_encoder_layers
        layer = _rematerialised(config, EncoderLayer, 3)
        self.relpos_bias = _relpos(config)
        if config.scan_layers:
            self.layers = _scanned(layer, config, length, {"scan": (nn.broadcast,) * 2})
        else:
            self.layers = [layer(config) for _ in range(length)]
        self.encoder_norm = _norm(self.config)
        self.dropout = _dropout(self.config)

    def __call__(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, Q, D], valid bool [B, Q] -> [B, Q, D]"""
        length = x.shape[1]
        bias = self.relpos_bias(length, length, True)[None]
        bias = bias + jnp.where(valid, 0.0, layers.NEGATIVE)[:, None, None, :]
        x = self.dropout(x, deterministic)
        if self.config.scan_layers:
            x, _ = self.layers.scan(x, bias, deterministic)
        else:
            for layer in self.layers:
                x = layer(x, bias, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic)


class Decoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        config, length = self.config, self.config.num_decoder_layers
        layer = _rematerialised(config, DecoderLayer, 5)
        self.relpos_bias = _relpos(config)
        if config.scan_layers:
            whole = nn.broadcast
            methods: dict[str, Any] = {"scan": (whole,) * 4, "scan_cross": (whole,)}
            methods["scan_step"] = (0, whole, whole, whole)
            methods["scan_ahead"] = (0, whole, whole, whole)
            self.layers = _scanned(layer, config, length, methods)
        else:
            self.layers = [layer(config) for _ in range(length)]
        self.decoder_norm = _norm(config)
        self.dropout = _dropout(config)
        if not config.logits_via_embedding:
            self.logits_dense = layers.Dense(config.vocab_size, ("embed", "vocab"))

    def __call__(self, x, encoded, valid, deterministic: bool, segments=None) -> jax.Array:
        """x [B, R, T, D], encoded [B, Q, D], valid bool [B, Q], [B, R, Q] or [B, R, T, Q], segments
        int32 [B, R, T] or None -> [B, R, T, D]"""
        bias = _causal_bias(self.relpos_bias, x.shape[2])
        if segments is not None:
            same = segments[..., :, None] == segments[..., None, :]
            bias = bias + jnp.where(same, 0.0, layers.NEGATIVE)[:, :, None]
        x = self.dropout(x, deterministic)
        if self.config.scan_layers:
            x, _ = self.layers.scan(x, bias, encoded, _cross_bias(valid), deterministic)
        else:
            for layer in self.layers:
                x = layer(x, bias, encoded, _cross_bias(valid), deterministic)
        return self.dropout(self.decoder_norm(x), deterministic)

    def cross(self, encoded: jax.Array) -> Any:
        if self.config.scan_layers:
            return self.layers.scan_cross(None, encoded)[1]
        return [layer.cross(encoded) for layer in self.layers]

    def step(self, x, cache, position, cross, valid):
        """x [B, R, 1, D] -> ([B, R, 1, D], cache)"""
        bias = _step_bias(self.relpos_bias, cache, position)
        if self.config.scan_layers:
            numbers = jnp.arange(self.config.num_decoder_layers, dtype=jnp.int32)
            (x, cache), _ = self.layers.scan_step(
                (x, cache), (numbers, cross), jnp.asarray(position), bias, _cross_bias(valid)
            )
            return self.decoder_norm(x), cache
        new_cache = []
        for layer, layer_cache, layer_cross in zip(self.layers, cache, cross, strict=True):
            x, layer_cache = layer.step(
                x, layer_cache, position, bias, layer_cross, _cross_bias(valid)
            )
            new_cache.append(layer_cache)
        return self.decoder_norm(x), new_cache

    def ahead(self, x, cache, position, cross, valid):
        """x [B, R, W, D], the tokens at `position` and after -> [B, R, W, D]"""
        bias = _ahead_bias(self.relpos_bias, cache, position, x.shape[2])
        if self.config.scan_layers:
            numbers = jnp.arange(self.config.num_decoder_layers, dtype=jnp.int32)
            x, _ = self.layers.scan_ahead(x, (numbers, cross), cache, bias, _cross_bias(valid))
            return self.decoder_norm(x)
        for layer, layer_cache, layer_cross in zip(self.layers, cache, cross, strict=True):
            x = layer.ahead(x, layer_cache, bias, layer_cross, _cross_bias(valid))
        return self.decoder_norm(x)


def _causal_bias(relpos_bias: Any, length: int) -> jax.Array:
    """[H, T, T]"""
    causal = jnp.tril(jnp.ones((length, length), bool))
    return relpos_bias(length, length, False) + jnp.where(causal, 0.0, layers.NEGATIVE)


def _step_bias(relpos_bias: Any, cache: Any, position: jax.Array) -> jax.Array:
    """The row of `_causal_bias` at a position, [H, 1, S]."""
    length = jax.tree.leaves(cache)[0].shape[-3]
    bias = jax.lax.dynamic_slice_in_dim(relpos_bias(length, length, False), position, 1, axis=1)
    return bias + jnp.where(jnp.arange(length) <= position, 0.0, layers.NEGATIVE)


def _ahead_bias(relpos_bias: Any, cache: Any, position: jax.Array, width: int) -> jax.Array:
    """The rows of `_causal_bias` at `width` positions: [H, W, S + W], the keys of the cache, of
    which those before `position` count, and those of the positions themselves."""
    length = jax.tree.leaves(cache)[0].shape[-3]
    far = relpos_bias(length + width, length, False)
    far = jax.lax.dynamic_slice_in_dim(far, position, width, axis=1)
    far = far + jnp.where(jnp.arange(length) < position, 0.0, layers.NEGATIVE)
    return jnp.concatenate([far, _causal_bias(relpos_bias, width)], axis=-1)


def _cross_bias(valid: jax.Array) -> jax.Array:
    """bool [B, Q], [B, R, Q] or [B, R, T, Q] -> additive bias [B, 1, 1 or R, 1 or T, Q]"""
    valid = valid[:, None] if valid.ndim == 2 else valid
    valid = valid[:, :, None] if valid.ndim == 3 else valid
    return jnp.where(valid, 0.0, layers.NEGATIVE)[:, None]


class PrefixAdaptation(nn.Module):
    """Output weights that depend on the prefix: the prefix-aware weight-adaptive decoder of NCI
    (Wang et al. 2022), for identifiers whose codes are other tokens at every position.

    There p(r_i | r_<i, x) = softmax(h_i W_i'), W_i' = A(e, r_1 ... r_{i-1}) W_i: a small decoder A
    reads the query's vector e in place of the start token, then the codes before the i-th, and
    gives a D x D matrix. Here W_i are the columns of position i of the output weights, as every
    position has codes of its own; h_i A is computed, and no W_i' of a prefix is ever made; and the
    linear map from the decoder's output a [D] to the matrix, D^3 parameters, is a sum of D terms of
    rank one (a CP decomposition), beside the identity:

        h A = h + ((h P) * (a G)) R,   P, G and R [D, D].

    e is the mean of the encoder's output over the query.
    """

    config: T5Config

    def setup(self) -> None:
        config = self.config
        layer = _rematerialised(config, PrefixLayer, 5)
        project = functools.partial(layers.Dense, config.emb_dim, dtype=jnp.dtype(config.dtype))
        self.relpos_bias = _relpos(config)
        self.blocks = [layer(config) for _ in range(config.prefix_adaptive_layers)]
        self.norm = _norm(config)
        self.dropout = _dropout(config)
        self.hidden, self.gate = project(("embed", "mlp")), project(("embed", "mlp"))
        self.out = project(("mlp", "embed"))

    def __call__(self, x, prefix, encoded, valid, deterministic: bool) -> jax.Array:
        """x, prefix (embedded decoder inputs) [B, R, T, D], encoded [B, Q, D], valid bool [B, Q] or
        [B, R, Q] -> [B, R, T, D]"""
        query = jnp.broadcast_to(_mean(encoded, valid), prefix[:, :, :1].shape)
        y = self.dropout(jnp.concatenate([query, prefix[:, :, 1:]], axis=2), deterministic)
        bias = _causal_bias(self.relpos_bias, x.shape[2])
        for block in self.blocks:
            y = block(y, bias, None, None, deterministic)
        return self._adapted(x, self.dropout(self.norm(y), deterministic))

    def step(self, x, prefix, cache, position, encoded, valid):
        """x, prefix [B, R, 1, D] at a position -> ([B, R, 1, D], cache)"""
        y = jnp.where(position == 0, _mean(encoded, valid), prefix)
        bias, new_cache = _step_bias(self.relpos_bias, cache, position), []
        for block, block_cache in zip(self.blocks, cache, strict=True):
            y, block_cache = block.step(y, block_cache, position, bias, None, None)
            new_cache.append(block_cache)
        return self._adapted(x, self.norm(y)), new_cache

    def ahead(self, x, prefix, cache, position):
        """x, prefix [B, R, W, D] at `position`, which is not the first, and after"""
        y, bias = prefix, _ahead_bias(self.relpos_bias, cache, position, x.shape[2])
        for block, block_cache in zip(self.blocks, cache, strict=True):
            y = block.ahead(y, block_cache, bias, None, None)
        return self._adapted(x, self.norm(y))

    def _adapted(self, x: jax.Array, adaptive: jax.Array) -> jax.Array:
        return x + self.out(self.hidden(x) * self.gate(adaptive))


def _mean(encoded: jax.Array, valid: jax.Array) -> jax.Array:
    """encoded [B, Q, D], valid bool [B, Q] or [B, R, Q] -> [B, 1 or R, 1, D]"""
    weights = (valid[:, None] if valid.ndim == 2 else valid).astype(jnp.float32)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1.0)
    mean = jnp.einsum("brq,bqd->brd", weights, encoded.astype(jnp.float32))
    return mean[:, :, None].astype(encoded.dtype)


class Transformer(nn.Module):
    """The student. Token 0 is padding in the encoder and the start of every target."""

    config: T5Config

    def setup(self) -> None:
        config = self.config
        if config.vocab_size < 1:
            raise ValueError(
                f"T5Config.vocab_size: got {config.vocab_size}, expected the size of the vocabulary"
            )
        self.token_embedder = _Embedder(config.vocab_size, config.emb_dim)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.prefix_adaptive_layers:
            self.prefix_adaptation = PrefixAdaptation(config)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """int32 [B, Q] and [B, T] or [B, R, T] -> float32 logits [B, T, V] or [B, R, T, V]."""
        encoded = self.encode(encoder_input_tokens, deterministic)
        targets = decoder_input_tokens
        if one := targets.ndim == 2:
            targets = targets[:, None]
        logits = self.logits(self.decode(encoded, encoder_input_tokens, targets, deterministic))
        return logits[:, 0] if one else logits

    def encode(self, encoder_input_tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """int32 [B, Q] -> [B, Q, D] in the activation dtype."""
        x = self._embed(encoder_input_tokens)
        return self.encoder(x, encoder_input_tokens > 0, deterministic)

    def decode(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        deterministic: bool = True,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """encoded [B, Q, D], int32 [B, Q], int32 [B, R, T] -> [B, R, T, D], which has `logits`.

        encoder_input_tokens may be int32 [B, R, Q] or [B, R, T, Q], 0 where a target, or a token of
        it, must not look. segments, int32 [B, R, T]: a token sees those of its own segment before
        it, so that a row holds several targets, each with a start token of its own; not with
        prefix-adaptive layers, which tell positions apart.
        """
        prefix, valid = self._embed(decoder_input_tokens), encoder_input_tokens > 0
        x = self.decoder(prefix, encoded, valid, deterministic, segments)
        if self.config.prefix_adaptive_layers:
            x = self.prefix_adaptation(x, prefix, encoded, valid, deterministic)
        return x

    def init_cache(self, encoded: jax.Array, num_beams: int, length: int) -> Any:
        """Empty self-attention cache: a layer's key and value, [B, R, length, H, K] each; of
        scanned layers one key and value, [B, R, layers, length, H, K] each. With prefix-adaptive
        layers (that cache, that of these layers)."""
        config = self.config
        rows, width = (encoded.shape[0], num_beams), (length, config.num_heads, config.head_dim)

        def of(*layers: int) -> dict[str, jax.Array]:
            empty = jnp.zeros((*rows, *layers, *width), config.dtype)
            return {"key": empty, "value": empty}

        stack, adaptive = config.num_decoder_layers, config.prefix_adaptive_layers
        own = of(stack) if config.scan_layers else [of() for _ in range(stack)]
        return (own, [of() for _ in range(adaptive)]) if adaptive else own

    def cross(self, encoded: jax.Array) -> Any:
        """Every layer's cross-attention keys and values of the queries, [B, Q, H, K] each; of
        scanned layers [layers, B, Q, H, K] each. With prefix-adaptive layers (those, encoded)."""
        cross = self.decoder.cross(encoded)
        return (cross, encoded) if self.config.prefix_adaptive_layers else cross

    def step(
        self,
        tokens: jax.Array,
        cache: Any,
        position: jax.Array,
        cross: Any,
        encoder_input_tokens: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """One decoding step: tokens int32 [B, R] at `position` -> f32 logits [B, R, V], cache."""
        prefix, valid = self._embed(tokens[:, :, None]), encoder_input_tokens > 0
        if not self.config.prefix_adaptive_layers:
            x, cache = self.decoder.step(prefix, cache, position, cross, valid)
            return self.logits(x[:, :, 0]), cache
        (cross, encoded), (cache, adaptive) = cross, cache
        x, cache = self.decoder.step(prefix, cache, position, cross, valid)
        x, adaptive = self.prefix_adaptation.step(x, prefix, adaptive, position, encoded, valid)
        return self.logits(x[:, :, 0]), (cache, adaptive)

    def ahead(
        self,
        tokens: jax.Array,
        cache: Any,
        position: jax.Array,
        cross: Any,
        encoder_input_tokens: jax.Array,
    ) -> jax.Array:
        """Tokens that are known before they are decoded: int32 [B, R, W] at `position` (not 0) and
        after -> [B, R, W, D], of which `logits` are those of W steps. The cache is only read."""
        prefix, valid = self._embed(tokens), encoder_input_tokens > 0
        if not self.config.prefix_adaptive_layers:
            return self.decoder.ahead(prefix, cache, position, cross, valid)
        (cross, _), (cache, adaptive) = cross, cache
        x = self.decoder.ahead(prefix, cache, position, cross, valid)
        return self.prefix_adaptation.ahead(x, prefix, adaptive, position)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]"""
        if self.config.logits_via_embedding:
            x = x.astype(jnp.float32) / math.sqrt(self.config.emb_dim)
            return self.token_embedder.attend(x)
        return self.decoder.logits_dense(x.astype(jnp.float32))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self.token_embedder(tokens).astype(self.config.dtype)


class _Embedder(nn.Module):
    vocab_size: int
    emb_dim: int

    def setup(self) -> None:
        self.embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            (self.vocab_size, self.emb_dim),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, tokens, axis=0)

    def attend(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x, self.embedding.T)
