"""The parts of a T5 stack: norm, dense, gated MLP, relative positions, attention.

Parameter names, shapes and logical axes are those of t5x (Roberts et al. 2022), so that its
checkpoints load: kernels are two-dimensional, attention heads are joined ("joined_kv").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax.models import eight_bits

Dtype = Any
NEGATIVE = -1e9  # added to masked attention logits; finite, so that an all-masked row stays finite

default_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class RMSNorm(nn.Module):
    """T5 layer norm, no mean and no bias (Zhang & Sennrich 2019): [..., D] -> [..., D]."""

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale: Any = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],)
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, F] -> [..., F], with gradients that are plain products of matrices.

    JAX's own rule makes the kernel's gradient a product over all leading axes, transposed
    afterwards. XLA for CPUs then makes transposed copies of its operands, for which it computes
    the norms, dropout and activations before them a second time.
    """
    return jnp.dot(x, kernel)


def _product_forward(x: jax.Array, kernel: jax.Array) -> Any:
    return jnp.dot(x, kernel), (x, kernel)


def _product_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows = lambda y: y.reshape(-1, y.shape[-1])
    return jnp.dot(gradient, kernel.T), jnp.dot(rows(x).T, rows(gradient))


product.defvjp(_product_forward, _product_backward)


class Projection(nn.Module):
    """x [..., I] @ kernel [I, F] -> [..., F], no bias; the kernel is float32, cast to dtype, or one
    of `eight_bits`."""

    features: int
    axes: tuple[str, str]
    dtype: Dtype = jnp.float32
    kernel_init: Callable = default_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "values"):
            values, scale = (self.get_variable("params", name) for name in ("values", "scale"))
            return eight_bits.product(x, values, scale).astype(self.dtype)
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel: Any = self.param("kernel", init, (x.shape[-1], self.features))
        return product(x.astype(self.dtype), kernel.astype(self.dtype))


class MlpBlock(nn.Module):
    """T5 feed-forward block: product of the activated projections (Shazeer 2020), then `wo`."""

    mlp_dim: int
    activations: Sequence[str] = ("gelu", "linear")
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        hidden = None
        for i, activation in enumerate(self.activations):
            name = "wi" if len(self.activations) == 1 else f"wi_{i}"
            y = Projection(self.mlp_dim, ("embed", "mlp"), self.dtype, name=name)(x)
            y = y if activation == "linear" else getattr(nn, activation)(y)
            hidden = y if hidden is None else hidden * y
        hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(hidden, deterministic)
        return Projection(x.shape[-1], ("mlp", "embed"), self.dtype, name="wo")(hidden)


def relative_buckets(
    query_length: int, key_length: int, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """Bucket of every (query, key) distance, int32 [query_length, key_length] (Raffel et al. 2020).

    Half of the buckets are exact distances, the other half grow logarithmically up to
    `max_distance`. Bidirectional stacks split the buckets between the two directions.
    """
    distance = jnp.arange(key_length)[None, :] - jnp.arange(query_length)[:, None]
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    far = jnp.minimum(far, num_buckets - 1)
    return bucket + jnp.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
    """Learned bias of attention logits by distance: -> [H, query_length, key_length]."""

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, query_length: int, key_length: int, bidirectional: bool) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        embedding: Any = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (self.num_heads, self.num_buckets),
        )
        buckets = relative_buckets(
            query_length,
            key_length,
            bidirectional=bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return embedding[:, buckets].astype(self.dtype)


def _scaled_init(head_dim: int) -> Callable:
    """T5's attention has no factor 1/sqrt(d); the query kernel's initial values hold it instead."""

    def init(key, shape, dtype=jnp.float32):
        return default_init(key, shape, dtype) / math.sqrt(head_dim)

    return init


class Attention(nn.Module):
    """Projections and products of T5 attention: H heads of K = head_dim, D = emb_dim.

    `__call__` takes keys and values with the leading axes of the queries. `shared` takes one set of
    keys and values for each query, [B, S, H, K], and uses it for all R targets without repeating
    it; `continued` does both.
    """

    num_heads: int
    head_dim: int
    emb_dim: int
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        project = functools.partial(
            Projection, self.num_heads * self.head_dim, ("embed", "joined_kv"), self.dtype
        )
        self.query = project(kernel_init=_scaled_init(self.head_dim))
        self.key = project()
        self.value = project()
        self.out = Projection(self.emb_dim, ("joined_kv", "embed"), self.dtype)
        self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)

    def queries(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., H, K]"""
        return self._heads(self.query(x))

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., D] -> two of [..., H, K]"""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def _weights(self, logits: jax.Array, deterministic: bool) -> jax.Array:
        weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)
        return self.dropout(weights, deterministic)

    def _output(self, mixed: jax.Array) -> jax.Array:
        return self.out(mixed.reshape(*mixed.shape[:-2], -1))

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, deterministic: bool
    ) -> jax.Array:
        """q [..., T, H, K], k and v [..., S, H, K], bias [..., H, T, S] -> [..., T, D]."""
        logits = jnp.einsum("...thd,...shd->...hts", q, k) + bias
        weights = self._weights(logits, deterministic)
        return self._output(jnp.einsum("...hts,...shd->...thd", weights, v))

    def continued(
        self,
        q: jax.Array,
        before: tuple[jax.Array, jax.Array],
        before_bias: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Targets that go on from tokens which they share: q [B, R, T, H, K], before: their keys
        and values [B, N, H, K] each, before_bias [B, H, T, N], k and v [B, R, S, H, K], bias
        [..., H, T, S] -> [B, R, T, D]."""
        own = jnp.einsum("brthd,brshd->brhts", q, k) + bias
        far = jnp.einsum("brthd,bnhd->brhtn", q, before[0]) + before_bias[:, None]
        weights = self._weights(jnp.concatenate([far, own], -1), deterministic)
        far, own = jnp.split(weights, [far.shape[-1]], axis=-1)
        mixed = jnp.einsum("brhtn,bnhd->brthd", far, before[1])
        return self._output(mixed + jnp.einsum("brhts,brshd->brthd", own, v))

    def shared(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, deterministic: bool
    ) -> jax.Array:
        """q [B, R, T, H, K], k and v [B, S, H, K], bias [B, 1, 1 or R, 1 or T, S] ->
        [B, R, T, D]."""
        logits = jnp.einsum("brthd,bshd->bhrts", q, k) + bias
        weights = self._weights(logits, deterministic)
        return self._output(jnp.einsum("bhrts,bshd->brthd", weights, v))
