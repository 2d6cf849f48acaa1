"""A decoder whose output weights depend on the prefix of the identifier. Axis letters: see `t5`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax.models import activations, layers, t5_stacks
from dgr_jax.models.t5_config import T5Config


class PrefixLayer(t5_stacks.DecoderLayer):
    """A decoder layer that sees no query: self-attention and feed-forward."""

    def setup(self) -> None:
        self.pre_self_attention_layer_norm = t5_stacks.norm(self.config)
        self.self_attention = t5_stacks.attention(self.config)
        self.pre_mlp_layer_norm = t5_stacks.norm(self.config)
        self.mlp = t5_stacks.mlp(self.config)
        self.dropout = t5_stacks.dropout(self.config)

    def _rest(self, x, cross, cross_bias, deterministic):
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return activations.cut(x + self.dropout(y, deterministic), t5_stacks.TARGETS)

    def cross(self, encoded: jax.Array) -> None:
        return None


class PrefixAdaptation(nn.Module):
    """Output weights that depend on the prefix: the prefix-aware weight-adaptive decoder of NCI
    (Wang et al. 2022), for identifiers whose codes are other tokens at every position.

    There p(r_i | r_<i, x) = softmax(h_i W_i') with W_i' = A(e, r_1 ... r_{i-1}) W_i: a small
    decoder A reads the query's vector e in place of the start token, then the codes before the
    i-th, and gives a D x D matrix. Here W_i are the output weights' columns for position i, as
    every position has codes of its own. h_i A is computed, so that no matrix W_i' of a prefix is
    needed. The linear map from the decoder's output a [D] to the matrix would have D^3 parameters;
    in its place stands a sum of D terms of rank one (a CP decomposition), added to the identity:

        h A = h + ((h P) * (a G)) R,   P, G and R [D, D].

    e is the mean of the encoder's output over the query.
    """

    config: T5Config

    def setup(self) -> None:
        config = self.config
        layer = t5_stacks.rematerialised(config, PrefixLayer, 5)
        project = functools.partial(
            layers.Projection, config.emb_dim, dtype=jnp.dtype(config.dtype)
        )
        self.relpos_bias = t5_stacks.relpos(config)
        self.blocks = [layer(config) for _ in range(config.prefix_adaptive_layers)]
        self.norm = t5_stacks.norm(config)
        self.dropout = t5_stacks.dropout(config)
        self.hidden, self.gate = project(("embed", "mlp")), project(("embed", "mlp"))
        self.out = project(("mlp", "embed"))

    def __call__(self, x, prefix, encoded, valid, deterministic: bool) -> jax.Array:
        """x, prefix (embedded decoder inputs) [B, R, T, D], encoded [B, Q, D], valid bool [B, Q] or
        [B, R, Q] -> [B, R, T, D]"""
        query = jnp.broadcast_to(_mean(encoded, valid), prefix[:, :, :1].shape)
        y = self.dropout(jnp.concatenate([query, prefix[:, :, 1:]], axis=2), deterministic)
        bias = t5_stacks.causal_bias(self.relpos_bias, x.shape[2])
        for block in self.blocks:
            y, _ = block(y, bias, None, None, deterministic)
        return self._adapted(x, self.dropout(self.norm(y), deterministic))

    def step(self, x, prefix, cache, position, encoded, valid):
        """x, prefix [B, R, 1, D] at a position -> ([B, R, 1, D], cache)"""
        y = jnp.where(position == 0, _mean(encoded, valid), prefix)
        bias, new_cache = t5_stacks.step_bias(self.relpos_bias, cache, position), []
        for block, block_cache in zip(self.blocks, cache, strict=True):
            y, block_cache = block.step(y, block_cache, position, bias, None, None)
            new_cache.append(block_cache)
        return self._adapted(x, self.norm(y)), new_cache

    def ahead(self, x, prefix, cache, position):
        """x, prefix [B, R, W, D] at `position` (not the first) and after it -> [B, R, W, D]"""
        y, bias = prefix, t5_stacks.ahead_bias(self.relpos_bias, cache, position, x.shape[2])
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
