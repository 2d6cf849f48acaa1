"""A dual encoder on T5's encoder: queries and passages become vectors, whose product is the score.

Axis letters: B texts, Q their length, D model width, d vector width.

A tower's encoder and embedding have the parameter names of `t5.Transformer`, so that the weights of
any T5 fit (see `start_from`). The parameters of a shared tower are under "shared", those of
separate towers under "query" and "passage":

    shared/t5/token_embedder/embedding  shared/t5/encoder/...  shared/projection/kernel [D, d]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax import ranges
from dgr_jax.models import activations, layers
from dgr_jax.models.t5 import T5Config, Transformer

POOLINGS = ("mean", "first")
SIMILARITIES = ("dot", "cosine")
NARROWEST, WIDEST = 16, 1024


@dataclass(frozen=True)
class DualEncoderConfig:
    """Shape of a dual encoder.

    t5: sizes of the encoder, usually those of the student it is compared with; no decoder is built.
    shared: True: one tower for queries and passages; False: two towers of the same shape.
    pooling: a text's vector is the 'mean' over its tokens, or that of its 'first' token.
    projection: a learned matrix makes vectors of this width d, 16 to 1024; 0 leaves the model's.
    similarity: the score is the 'dot' product of the vectors, or their 'cosine'.
    temperature: divides the scores, in training and in search (small for 'cosine': about 0.02).
    """

    t5: T5Config = T5Config()
    shared: bool = True
    pooling: str = "mean"
    projection: int = 0
    similarity: str = "dot"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("pooling", POOLINGS), ("similarity", SIMILARITIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"DualEncoderConfig.{name}: got {getattr(self, name)!r}, expected one of "
                    f"{', '.join(map(repr, allowed))}"
                )
        if self.projection and not NARROWEST <= self.projection <= WIDEST:
            raise ValueError(
                f"DualEncoderConfig.projection: got {self.projection}, expected {NARROWEST} to "
                f"{WIDEST}, or 0 for the model's width"
            )
        ranges.check(self, temperature=ranges.above(0))

    @property
    def dim(self) -> int:
        """Width d of the vectors."""
        return self.projection or self.t5.emb_dim


class Tower(nn.Module):
    """Tokens -> vectors. Pooling, projection and normalisation are computed in float32."""

    config: DualEncoderConfig

    def setup(self) -> None:
        self.t5 = Transformer(self.config.t5)
        if self.config.projection:
            self.projection = layers.Projection(self.config.projection, ("embed", "kv"))

    def __call__(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        """int32 [B, Q] -> f32 [B, d]; by 'mean' pooling a text without tokens has the vector 0."""
        encoded = self.t5.encode(tokens, deterministic)
        x = _pool(encoded.astype(jnp.float32), tokens > 0, self.config.pooling)
        if self.config.projection:
            x = self.projection(x)
        if self.config.similarity == "cosine":
            x = _unit(x)
        return activations.cut(x, ("batch", None))


def _pool(encoded: jax.Array, valid: jax.Array, pooling: str) -> jax.Array:
    """f32 [B, Q, D], bool [B, Q] -> [B, D]"""
    if pooling == "first":
        return encoded[:, 0]
    total = jnp.sum(jnp.where(valid[..., None], encoded, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None]


def _unit(x: jax.Array) -> jax.Array:
    """The vectors scaled to length 1; the vector 0, of an empty text, stays, with a finite
    gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


class DualEncoder(nn.Module):
    """Score of a query and a passage: the dot product of their vectors.

    A query's vector is divided by the temperature, so that training and any search by inner product
    have the same scores.
    """

    config: DualEncoderConfig

    def setup(self) -> None:
        if self.config.shared:
            self.shared = Tower(self.config)
        else:
            self.query, self.passage = Tower(self.config), Tower(self.config)

    def __call__(
        self, query_tokens: jax.Array, passage_tokens: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """int32 [B, Q] and [N, Q'] -> scores f32 [B, N] of every query and every passage."""
        queries = self.encode_queries(query_tokens, deterministic)
        return scores(queries, self.encode_passages(passage_tokens, deterministic))

    def encode_queries(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """int32 [B, Q] -> f32 [B, d], divided by the temperature."""
        tower = self.shared if self.config.shared else self.query
        return tower(tokens, deterministic) / self.config.temperature

    def encode_passages(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """int32 [B, Q] -> f32 [B, d]"""
        tower = self.shared if self.config.shared else self.passage
        return tower(tokens, deterministic)


def scores(queries: jax.Array, passages: jax.Array) -> jax.Array:
    """f32 [B, d] and [N, d] -> f32 [B, N], multiplied in float32 on every device."""
    return jnp.einsum("bd,nd->bn", queries, passages, precision=jax.lax.Precision.HIGHEST)


def start_from(params: Mapping[str, Any], t5_params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` of a DualEncoder with the embedding and encoder of a T5 in each of its towers.

    t5_params: those of `pretrained.read_hf` or of a student; a decoder among them is not used.
    The projections stay as they are. Raises ValueError where a name or a shape does not fit.
    """
    taken = {name: t5_params[name] for name in ("token_embedder", "encoder") if name in t5_params}
    for tower, parts in params.items():
        wrong = _differences(parts["t5"], taken)
        if wrong:
            raise ValueError(
                f"initial parameters of tower {tower!r}: {'; '.join(wrong)}; set T5Config as it "
                "was for these parameters"
            )
    return {tower: {**parts, "t5": taken} for tower, parts in params.items()}


def _differences(expected: Any, got: Any) -> list[str]:
    """A line for every leaf that is missing, left over or of another shape."""
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (expected, got))
    ]
    names = sorted(shapes[0].keys() | shapes[1].keys())
    return [
        f"{name}: got {shapes[1].get(name, 'none')}, expected {shapes[0].get(name, 'none')}"
        for name in names
        if shapes[0].get(name) != shapes[1].get(name)
    ]
