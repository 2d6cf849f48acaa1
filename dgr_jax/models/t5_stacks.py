"""The layers of a T5, and its encoder and decoder: stacks of them. Axis letters: see `t5`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax.models import activations, layers
from dgr_jax.models.stacking import LAYERS, LAYERS_AXIS
from dgr_jax.models.t5_config import REMAT, T5Config


class Reading(NamedTuple):
    """The query as the decoder has read it before it writes: hidden [B, N, D], the input of
    `logits` at each token; keys_values: of self-attention, [B, N, H, K] each, for every layer, or
    for scanned layers [layers, B, N, H, K] each; there bool [B, N], False at padding."""

    hidden: jax.Array
    keys_values: Any
    there: jax.Array


TARGETS = ("batch", "targets", "length", "embed")  # logical axes of the decoder's activations


def attention(config: T5Config) -> layers.Attention:
    return layers.Attention(
        config.num_heads,
        config.head_dim,
        config.emb_dim,
        config.dropout_rate,
        jnp.dtype(config.dtype),
    )


def norm(config: T5Config) -> layers.RMSNorm:
    return layers.RMSNorm(jnp.dtype(config.dtype))


def mlp(config: T5Config) -> layers.MlpBlock:
    return layers.MlpBlock(
        config.mlp_dim, config.mlp_activations, config.dropout_rate, jnp.dtype(config.dtype)
    )


def dropout(config: T5Config) -> nn.Dropout:
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


def relpos(config: T5Config) -> layers.RelativePositionBias:
    return layers.RelativePositionBias(
        config.num_heads, config.relpos_buckets, config.relpos_max_distance
    )


class EncoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        self.pre_attention_layer_norm = norm(self.config)
        self.attention = attention(self.config)
        self.pre_mlp_layer_norm = norm(self.config)
        self.mlp = mlp(self.config)
        self.dropout = dropout(self.config)

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
        self.pre_self_attention_layer_norm = norm(self.config)
        self.self_attention = attention(self.config)
        self.pre_cross_attention_layer_norm = norm(self.config)
        self.encoder_decoder_attention = attention(self.config)
        self.pre_mlp_layer_norm = norm(self.config)
        self.mlp = mlp(self.config)
        self.dropout = dropout(self.config)

    def _rest(self, x, cross, cross_bias, deterministic):
        """Cross-attention and feed-forward, the same in training and in a decoding step."""
        y = self.pre_cross_attention_layer_norm(x)
        q, (k, v) = self.encoder_decoder_attention.queries(y), cross
        y = self.encoder_decoder_attention.shared(q, k, v, cross_bias, deterministic)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return activations.cut(x + self.dropout(y, deterministic), TARGETS)

    def _attend(self, y, k, v, bias, before, before_bias, deterministic):
        """Self-attention, also to the tokens `before`, keys and values [B, N, H, K] each; None:
        there are none."""
        q = self.self_attention.queries(y)
        if before is None:
            return self.self_attention(q, k, v, bias, deterministic)
        return self.self_attention.continued(q, before, before_bias, k, v, bias, deterministic)

    def __call__(
        self, x, bias, encoded, cross_bias, deterministic: bool, before=None, before_bias=None
    ):
        """x [B, R, T, D], bias [H, T, T] or [B, R, H, T, T], encoded [B, Q, D], cross_bias as
        `_cross_bias` makes it, before and before_bias as of `_attend` -> [B, R, T, D], and the keys
        and values of self-attention."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        y = self._attend(y, k, v, bias, before, before_bias, deterministic)
        x = x + self.dropout(y, deterministic)
        return self._rest(x, self.cross(encoded), cross_bias, deterministic), (k, v)

    def cross(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Cross-attention keys and values of a query, [B, Q, H, K] each."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def step(self, x, cache, position, bias, cross, cross_bias, before=None, before_bias=None):
        """One token of each beam: x [B, R, 1, D], cache k and v [B, R, S, H, K], bias [H, 1, S]."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        k = jax.lax.dynamic_update_slice_in_dim(cache["key"], k, position, axis=2)
        v = jax.lax.dynamic_update_slice_in_dim(cache["value"], v, position, axis=2)
        y = self._attend(y, k, v, bias, before, before_bias, True)
        x = self._rest(x + y, cross, cross_bias, True)
        return x, {"key": k, "value": v}

    def ahead(self, x, cache, bias, cross, cross_bias, before=None, before_bias=None):
        """W tokens that follow those in the cache, which is only read: x [B, R, W, D], cache k and
        v [B, R, S, H, K], bias [H, W, S + W]."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        k = jnp.concatenate([cache["key"], k], axis=2)
        v = jnp.concatenate([cache["value"], v], axis=2)
        y = self._attend(y, k, v, bias, before, before_bias, True)
        return self._rest(x + y, cross, cross_bias, True)

    def scan_ahead(self, x, of_layer, cache, bias, cross_bias, before_bias):
        """`ahead` as a step of a scan over layers: cache [B, R, layers, S, H, K]."""
        index, cross, before = of_layer
        own = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=2, keepdims=False)
        cache = jax.tree.map(own, cache)
        return self.ahead(x, cache, bias, cross, cross_bias, before, before_bias), None

    def scan(self, x, before, bias, encoded, cross_bias, deterministic: bool, before_bias):
        """`__call__` as a step of a scan over layers, which keeps no keys and values."""
        return self(x, bias, encoded, cross_bias, deterministic, before, before_bias)[0], None

    def scan_read(self, x, bias, encoded, cross_bias, deterministic: bool):
        """`__call__` as a step of a scan over layers, which keeps the keys and values."""
        return self(x, bias, encoded, cross_bias, deterministic)

    def scan_cross(self, nothing: None, encoded: jax.Array):
        """`cross` as a step of a scan over layers."""
        return nothing, self.cross(encoded)

    def scan_step(self, carry, of_layer, position, bias, cross_bias, before_bias):
        """`step` as a step of a scan over layers: carry (x, cache), cache [B, R, layers, S, H, K].

        The cache is not copied: each layer reads its part of it and writes one position.
        """
        (x, cache), (index, cross, before) = carry, of_layer
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
        y = self._attend(y, k, v, bias, before, before_bias, True)
        return (self._rest(x + y, cross, cross_bias, True), cache), None


def rematerialised(config: T5Config, layer: type[nn.Module], deterministic: int) -> Any:
    """The class of a layer with the recomputation of T5Config.remat.

    deterministic: the place of the argument of that name in the layer's call.
    """
    if config.remat == "none":
        return layer
    return nn.remat(
        layer,
        policy=REMAT[config.remat],
        static_argnums=(deterministic,),
        prevent_cse=not config.scan_layers,
    )


def _scanned(layer: Any, config: T5Config, length: int, methods: dict[str, tuple[Any, ...]]) -> Any:
    """A stack of `length` layers as one module.

    methods: name of a method -> the scan axes of its arguments after the carry.
    """
    scan = functools.partial(
        dict,
        variable_axes={"params": LAYERS_AXIS},
        split_rngs={"params": True, "dropout": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: LAYERS},
    )
    return nn.scan(layer, methods={k: scan(in_axes=axes) for k, axes in methods.items()})(config)


class EncoderStack(nn.Module):
    config: T5Config

    def setup(self) -> None:
        config, length = self.config, self.config.num_encoder_layers
        layer = rematerialised(config, EncoderLayer, 3)
        self.relpos_bias = relpos(config)
        if config.scan_layers:
            self.layers = _scanned(layer, config, length, {"scan": (nn.broadcast,) * 2})
        else:
            self.layers = [layer(config) for _ in range(length)]
        self.encoder_norm = norm(self.config)
        self.dropout = dropout(self.config)

    def __call__(self, x: jax.Array, seen: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, Q, D] -> [B, Q, D]. seen: bool [B, Q], the tokens that all look at, or int32
        segments [B, Q]: a token looks at those of its own."""
        length = x.shape[1]
        bias = self.relpos_bias(length, length, True)[None]
        if seen.dtype == bool:
            mask = seen[:, None, None, :]
        else:
            mask = (seen[:, :, None] == seen[:, None, :])[:, None]
        bias = bias + jnp.where(mask, 0.0, layers.NEGATIVE)
        x = self.dropout(x, deterministic)
        if self.config.scan_layers:
            x, _ = self.layers.scan(x, bias, deterministic)
        else:
            for layer in self.layers:
                x = layer(x, bias, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic)


class DecoderStack(nn.Module):
    config: T5Config

    def setup(self) -> None:
        config, length = self.config, self.config.num_decoder_layers
        layer = rematerialised(config, DecoderLayer, 5)
        self.relpos_bias = relpos(config)
        if config.scan_layers:
            whole = nn.broadcast
            methods: dict[str, Any] = {"scan": (0, *(whole,) * 5), "scan_cross": (whole,)}
            methods["scan_read"] = (whole,) * 4
            methods["scan_step"] = methods["scan_ahead"] = (0, *(whole,) * 4)
            self.layers = _scanned(layer, config, length, methods)
        else:
            self.layers = [layer(config) for _ in range(length)]
        self.decoder_norm = norm(config)
        self.dropout = dropout(config)
        if not config.logits_via_embedding:
            self.logits_dense = layers.Projection(config.vocab_size, ("embed", "vocab"))

    def __call__(
        self, x, encoded, valid, deterministic: bool, segments=None, reading: Reading | None = None
    ) -> jax.Array:
        """x [B, R, T, D], encoded [B, Q, D], valid bool [B, Q], [B, R, Q] or [B, R, T, Q], segments
        int32 [B, R, T] or None, reading: of `read`, which the targets go on from -> [B, R, T, D]"""
        bias = causal_bias(self.relpos_bias, x.shape[2])
        if segments is not None:
            same = segments[..., :, None] == segments[..., None, :]
            bias = bias + jnp.where(same, 0.0, layers.NEGATIVE)[:, :, None]
        x = self.dropout(x, deterministic)
        of_layers, before_bias = self._before(reading, x.shape[2])
        rest = encoded, _cross_bias(valid), deterministic
        if self.config.scan_layers:
            x, _ = self.layers.scan(x, of_layers, bias, *rest, before_bias)
        else:
            for layer, before in zip(self.layers, of_layers, strict=True):
                x, _ = layer(x, bias, *rest, before, before_bias)
        return self.dropout(self.decoder_norm(x), deterministic)

    def read(self, x, encoded, valid, there, deterministic: bool) -> Reading:
        """Tokens that the targets of a query go on from: x [B, N, D], encoded [B, Q, D], valid bool
        [B, Q], there bool [B, N]: False at padding."""
        bias = causal_bias(self.relpos_bias, x.shape[1])
        bias = bias + jnp.where(there, 0.0, layers.NEGATIVE)[:, None, None, None, :]
        x = self.dropout(x[:, None], deterministic)
        rest = bias, encoded, _cross_bias(valid), deterministic
        if self.config.scan_layers:
            x, before = self.layers.scan_read(x, *rest)
            before = jax.tree.map(lambda leaf: leaf[:, :, 0], before)
        else:
            before = []
            for layer in self.layers:
                x, keys_values = layer(x, *rest)
                before.append(jax.tree.map(lambda leaf: leaf[:, 0], keys_values))
        x = self.dropout(self.decoder_norm(x), deterministic)
        return Reading(x[:, 0], before, there)

    def _before(self, reading: Reading | None, length: int) -> tuple[Any, jax.Array | None]:
        """Keys and values of every layer, or for scanned layers a pair of them, and the bias of
        `length` targets [B, H, T, N]; None where nothing was read."""
        if reading is None:
            nothing = None if self.config.scan_layers else [None] * self.config.num_decoder_layers
            return nothing, None
        count = reading.there.shape[1]
        bias = self.relpos_bias(count + length, count, False)[:, count:]
        there = jnp.where(reading.there, 0.0, layers.NEGATIVE)
        return reading.keys_values, bias[None] + there[:, None, None]

    def cross(self, encoded: jax.Array) -> Any:
        if self.config.scan_layers:
            return self.layers.scan_cross(None, encoded)[1]
        return [layer.cross(encoded) for layer in self.layers]

    def step(self, x, cache, position, cross, valid, reading: Reading | None = None):
        """x [B, R, 1, D] -> ([B, R, 1, D], cache)"""
        bias, cross_bias = step_bias(self.relpos_bias, cache, position), _cross_bias(valid)
        of_layers, before_bias = self._before_at(reading, cache, position, 1)
        if self.config.scan_layers:
            numbers = jnp.arange(self.config.num_decoder_layers, dtype=jnp.int32)
            (x, cache), _ = self.layers.scan_step(
                (x, cache),
                (numbers, cross, of_layers),
                *(jnp.asarray(position), bias, cross_bias, before_bias),
            )
            return self.decoder_norm(x), cache
        new_cache = []
        for layer, own, *rest in zip(self.layers, cache, cross, of_layers, strict=True):
            layer_cross, before = rest
            x, own = layer.step(
                x, own, position, bias, layer_cross, cross_bias, before, before_bias
            )
            new_cache.append(own)
        return self.decoder_norm(x), new_cache

    def ahead(self, x, cache, position, cross, valid, reading: Reading | None = None):
        """x [B, R, W, D], the tokens at `position` and after -> [B, R, W, D]"""
        bias = ahead_bias(self.relpos_bias, cache, position, x.shape[2])
        cross_bias = _cross_bias(valid)
        of_layers, before_bias = self._before_at(reading, cache, position, x.shape[2])
        if self.config.scan_layers:
            numbers = jnp.arange(self.config.num_decoder_layers, dtype=jnp.int32)
            of_layer = numbers, cross, of_layers
            x, _ = self.layers.scan_ahead(x, of_layer, cache, bias, cross_bias, before_bias)
            return self.decoder_norm(x)
        for layer, own, *rest in zip(self.layers, cache, cross, of_layers, strict=True):
            layer_cross, before = rest
            x = layer.ahead(x, own, bias, layer_cross, cross_bias, before, before_bias)
        return self.decoder_norm(x)

    def _before_at(self, reading: Reading | None, cache: Any, position: jax.Array, width: int):
        """`_before` for `width` targets from a position on, of a cache that has room for it."""
        length = jax.tree.leaves(cache)[0].shape[-3]
        of_layers, bias = self._before(reading, length + width - 1)
        if bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(bias, position, width, axis=2)
        return of_layers, bias


def causal_bias(relpos_bias: Any, length: int) -> jax.Array:
    """[H, T, T]"""
    causal = jnp.tril(jnp.ones((length, length), bool))
    return relpos_bias(length, length, False) + jnp.where(causal, 0.0, layers.NEGATIVE)


def step_bias(relpos_bias: Any, cache: Any, position: jax.Array) -> jax.Array:
    """The row of `causal_bias` at a position, [H, 1, S]."""
    length = jax.tree.leaves(cache)[0].shape[-3]
    bias = jax.lax.dynamic_slice_in_dim(relpos_bias(length, length, False), position, 1, axis=1)
    return bias + jnp.where(jnp.arange(length) <= position, 0.0, layers.NEGATIVE)


def ahead_bias(relpos_bias: Any, cache: Any, position: jax.Array, width: int) -> jax.Array:
    """The rows of `causal_bias` at `width` positions, [H, W, S + W]: first for the keys of the
    cache, of which those before `position` count, then for the keys of these positions."""
    length = jax.tree.leaves(cache)[0].shape[-3]
    far = relpos_bias(length + width, length, False)
    far = jax.lax.dynamic_slice_in_dim(far, position, width, axis=1)
    far = far + jnp.where(jnp.arange(length) < position, 0.0, layers.NEGATIVE)
    return jnp.concatenate([far, causal_bias(relpos_bias, width)], axis=-1)


def _cross_bias(valid: jax.Array) -> jax.Array:
    """bool [B, Q], [B, R, Q] or [B, R, T, Q] -> additive bias [B, 1, 1 or R, 1 or T, Q]"""
    valid = valid[:, None] if valid.ndim == 2 else valid
    valid = valid[:, :, None] if valid.ndim == 3 else valid
    return jnp.where(valid, 0.0, layers.NEGATIVE)[:, None]
