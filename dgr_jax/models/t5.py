"""T5 and T5 1.1 (Raffel et al. 2020, Shazeer 2020) as the student: one encoder pass, many targets.

Axis letters: B queries, Q query length, R targets (or beams) of a query, T target length,
S self-attention cache length, V vocabulary, D model width, H heads, K head width.
The decoder works on [B, R, T]: the R targets of a query share its encoder output and its
cross-attention keys and values, in training (R = L * K identifiers) and in decoding (R = beams).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax.models.prefix_adaptation import PrefixAdaptation
from dgr_jax.models.query_rows import QueryRows
from dgr_jax.models.t5_config import REMAT, T5Config
from dgr_jax.models.t5_stacks import DecoderStack, EncoderStack, Reading

__all__ = ["REMAT", "Reading", "T5Config", "Transformer"]


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
        self.encoder = EncoderStack(config)
        self.decoder = DecoderStack(config)
        if config.prefix_adaptive_layers:
            self.prefix_adaptation = PrefixAdaptation(config)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        deterministic: bool = True,
        rows: QueryRows | None = None,
    ) -> jax.Array:
        """int32 [B, Q] and [B, T] or [B, R, T] -> float32 logits [B, T, V] or [B, R, T, V]. rows:
        as of `encode`."""
        encoded = self.encode(encoder_input_tokens, deterministic, rows)
        targets = decoder_input_tokens
        if single := targets.ndim == 2:
            targets = targets[:, None]
        logits = self.logits(self.decode(encoded, encoder_input_tokens, targets, deterministic))
        return logits[:, 0] if single else logits

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        deterministic: bool = True,
        rows: QueryRows | None = None,
    ) -> jax.Array:
        """int32 [B, Q] -> [B, Q, D] in the activation dtype. rows: the same queries side by side;
        the encoder reads these, and what it makes of padding is then 0."""
        valid = encoder_input_tokens > 0
        if rows is None:
            return self.encoder(self._embed(encoder_input_tokens), valid, deterministic)
        tokens, segments = (x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.segments))
        return rows.apart(self.encoder(self._embed(tokens), segments, deterministic), valid)

    def decode(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        deterministic: bool = True,
        segments: jax.Array | None = None,
        reading: Reading | None = None,
    ) -> jax.Array:
        """encoded [B, Q, D], int32 [B, Q], int32 [B, R, T] -> [B, R, T, D], the input of `logits`.

        encoder_input_tokens may be int32 [B, R, Q] or [B, R, T, Q], with 0 at tokens of the query
        that a target, or a token of it, must not see. segments, int32 [B, R, T]: a token sees only
        earlier tokens of its own segment, so that a row can hold several targets, each with a start
        token of its own. Prefix-adaptive layers, which depend on positions, do not allow it. With
        T5Config.decoder_query_tokens, `reading` is what `read` returns; None: it is called here.
        """
        if self.config.decoder_query_tokens and reading is None:
            reading = self.read(encoded, encoder_input_tokens, deterministic)
        prefix, valid = self._embed(decoder_input_tokens), encoder_input_tokens > 0
        x = self.decoder(prefix, encoded, valid, deterministic, segments, reading)
        if self.config.prefix_adaptive_layers:
            x = self.prefix_adaptation(x, prefix, encoded, valid, deterministic)
        return x

    def read(
        self, encoded: jax.Array, encoder_input_tokens: jax.Array, deterministic: bool = True
    ) -> Reading:
        """The decoder reads the first tokens of the query, T5Config.decoder_query_tokens of them at
        most: encoded [B, Q, D], int32 [B, Q]. All targets of the query go on from there, as if
        these tokens stood before each; so a query is read once.

        They are moved to the end of their places, so that padding of the query changes nothing.
        """
        if encoder_input_tokens.ndim != 2:
            raise ValueError(
                "T5Config.decoder_query_tokens: got targets that see different parts of a query, "
                "expected 0 with identifiers of several views"
            )
        tokens = encoder_input_tokens[:, : self.config.decoder_query_tokens]
        missing = (tokens == 0).sum(1, keepdims=True)
        places = (jnp.arange(tokens.shape[1]) - missing) % tokens.shape[1]
        tokens = jnp.take_along_axis(tokens, places, axis=1)
        x, valid = self._embed(tokens), encoder_input_tokens > 0
        return self.decoder.read(x, encoded, valid, tokens > 0, deterministic)

    def token_weights(self, reading: Reading) -> jax.Array:
        """What the query says of every token of the vocabulary, f32 [B, V], at least 0 (Zeng et al.
        2024): w[v] = max over its tokens j of log(1 + relu(E_v . h_j / sqrt(D))), E the token
        embeddings, h_j what the decoder makes of token j. That of padding is 0."""
        hidden = reading.hidden.astype(jnp.float32) / math.sqrt(self.config.emb_dim)
        scores = jnp.where(reading.there[..., None], self.token_embedder.attend(hidden), 0.0)
        weights = jnp.log1p(jax.nn.relu(scores.max(1)))
        return weights.at[:, 0].set(0.0)

    def init_cache(self, encoded: jax.Array, num_beams: int, length: int) -> Any:
        """An empty self-attention cache: a key and a value for every layer, [B, R, length, H, K]
        each; for scanned layers a single key and value, [B, R, layers, length, H, K] each. With
        prefix-adaptive layers: (the decoder's cache, the cache of these layers)."""
        config = self.config
        rows, width = (encoded.shape[0], num_beams), (length, config.num_heads, config.head_dim)

        def of(*layers: int) -> dict[str, jax.Array]:
            empty = jnp.zeros((*rows, *layers, *width), config.dtype)
            return {"key": empty, "value": empty}

        stack, adaptive = config.num_decoder_layers, config.prefix_adaptive_layers
        own = of(stack) if config.scan_layers else [of() for _ in range(stack)]
        return (own, [of() for _ in range(adaptive)]) if adaptive else own

    def cross(
        self, encoded: jax.Array, encoder_input_tokens: jax.Array, reading: Reading | None = None
    ) -> Any:
        """What all steps know of the queries, which have int32 [B, Q] tokens: the cross-attention
        keys and values for every layer, [B, Q, H, K] each; for scanned layers [layers, B, Q, H, K]
        each. With prefix-adaptive layers: (the keys and values, encoded). With decoder_query_tokens
        (the keys and values, what `read` returns)."""
        cross = self.decoder.cross(encoded)
        if self.config.decoder_query_tokens:
            return cross, reading or self.read(encoded, encoder_input_tokens)
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
            cross, reading = self._known(cross)
            x, cache = self.decoder.step(prefix, cache, position, cross, valid, reading)
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
        """Decodes tokens that are known beforehand: int32 [B, R, W] at `position` (not 0) and those
        after it -> [B, R, W, D], whose `logits` are those of W steps. The cache is only read."""
        prefix, valid = self._embed(tokens), encoder_input_tokens > 0
        if not self.config.prefix_adaptive_layers:
            cross, reading = self._known(cross)
            return self.decoder.ahead(prefix, cache, position, cross, valid, reading)
        (cross, _), (cache, adaptive) = cross, cache
        x = self.decoder.ahead(prefix, cache, position, cross, valid)
        return self.prefix_adaptation.ahead(x, prefix, adaptive, position)

    def _known(self, cross: Any) -> tuple[Any, Reading | None]:
        return cross if self.config.decoder_query_tokens else (cross, None)

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
