"""The layers of a T5, and its encoder and decoder: stacks of them. Axis letters: see `t5`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax.models import activations, layers
from dgr_jax.models.stacking import LAYERS, LAYERS_AXIS
from dgr_jax.models.t5_config import REMAT, T5Config

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
        q = self.encoder_decoder_attention.queries(y)
        y = self.encoder_decoder_attention.shared(q, *cross, cross_bias, deterministic)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return activations.cut(x + self.dropout(y, deterministic), TARGETS)

    def __call__(self, x, bias, encoded, cross_bias, deterministic: bool) -> jax.Array:
        """x [B, R, T, D], bias [H, T, T] or [B, R, H, T, T], encoded [B, Q, D], cross_bias as
        `_cross_bias` makes it."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        y = self.self_attention(self.self_attention.queries(y), k, v, bias, deterministic)
        x = x + self.dropout(y, deterministic)
        return self._rest(x, self.cross(encoded), cross_bias, deterministic)

    def cross(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-attention keys and values of a query, [B, Q, H, K] each."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def step(self, x, cache, position, bias, cross, cross_bias):
        """One token of each beam: x [B, R, 1, D], cache k and v [B, R, S, H, K], bias [H, 1, S]."""
        y = self.pre_self_attention_layer_norm(x)
        k, v = self.self_attention.keys_values(y)
        k = jax.lax.dynamic_update_slice_in_dim(cache["key"], k, position, axis=2)
        v = jax.lax.dynamic_update_slice_in_dim(cache["value"], v, position, axis=2)
        y = self.self_attention(self.self_attention.queries(y), k, v, bias, True)
        x = self._rest(x + y, cross, cross_bias, True)
        return x, {"key": k, "value": v}

    def ahead(self, x, cache, bias, cross, cross_bias):
        """W tokens that follow those in the cache, which is only read: x [B, R, W, D], cache k and
        v [B, R, S, H, K], bias [H, W, S + W]."""
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

        The cache is not copied: each layer reads its part of it and writes one position.
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


def _scanned(
    layer: Any, config: T5Config, length: int, methods: dict[str, tuple[Any, ...]]
) -> nn.Module:
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


class DecoderStack(nn.Module):
    config: T5Config

    def setup(self) -> None:
        config, length = self.config, self.config.num_decoder_layers
        layer = rematerialised(config, DecoderLayer, 5)
        self.relpos_bias = relpos(config)
        if config.scan_layers:
            whole = nn.broadcast
            methods = {"scan": (whole,) * 4, "scan_cross": (whole,)}
            methods["scan_step"] = (0, whole, whole, whole)
            methods["scan_ahead"] = (0, whole, whole, whole)
            self.layers = _scanned(layer, config, length, methods)
        else:
            self.layers = [layer(config) for _ in range(length)]
        self.decoder_norm = norm(config)
        self.dropout = dropout(config)
        if not config.logits_via_embedding:
            self.logits_dense = layers.Projection(config.vocab_size, ("embed", "vocab"))

    def __call__(self, x, encoded, valid, deterministic: bool, segments=None) -> jax.Array:
        """x [B, R, T, D], encoded [B, Q, D], valid bool [B, Q], [B, R, Q] or [B, R, T, Q], segments
        int32 [B, R, T] or None -> [B, R, T, D]"""
        bias = causal_bias(self.relpos_bias, x.shape[2])
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
        bias = step_bias(self.relpos_bias, cache, position)
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
        bias = ahead_bias(self.relpos_bias, cache, position, x.shape[2])
        if self.config.scan_layers:
            numbers = jnp.arange(self.config.num_decoder_layers, dtype=jnp.int32)
            x, _ = self.layers.scan_ahead(x, (numbers, cross), cache, bias, _cross_bias(valid))
            return self.decoder_norm(x)
        for layer, layer_cache, layer_cross in zip(self.layers, cache, cross, strict=True):
            x = layer.ahead(x, layer_cache, bias, layer_cross, _cross_bias(valid))
        return self.decoder_norm(x)


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
