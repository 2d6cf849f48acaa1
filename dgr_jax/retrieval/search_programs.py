"""Compiled searches of a student: queries -> the identifiers that it writes.

Axis letters: B queries, Q query length, M beams.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export

from dgr_jax import partitioning, traced
from dgr_jax.decoding.beam_search import BeamResult, beam_search, score_by_token
from dgr_jax.models.t5 import Reading, T5Config, Transformer

# So that programs with this result can be kept.
jax.export.register_namedtuple_serialization(BeamResult, serialized_name="dgr_jax.BeamResult")


@functools.lru_cache(maxsize=8)
def decode_fn(
    config: T5Config,
    num_beams: int,
    length: int,
    mesh: jax.sharding.Mesh | None = None,
    record: bool = False,
    rules: partitioning.Rules = partitioning.RULES,
):
    """The compiled search: (params, constraint, int32 [B, Q]) -> BeamResult with M = num_beams.

    A query is encoded once; its cross-attention keys and values are shared by all beams.
    mesh: each data shard searches for its own rows, without waiting for others; the devices that
      share its parameters work together. Every device gets the whole result. None: no mesh.
    record: with all prefixes that were searched.
    rules: by which the devices that share parameters cut activations.
    """

    def decode(params: Any, constraint: Any, tokens: jax.Array) -> BeamResult:
        return written(config, params, constraint, tokens, num_beams, length, record=record)

    if mesh is None:
        return jax.jit(decode)
    on_shards = partitioning.on_batch_shards(decode, mesh, whole=2, rules=rules)
    program = jax.jit(on_shards, out_shardings=partitioning.replicated(mesh))
    if record:
        return program
    return traced.kept("decode", (config, num_beams, length, mesh.shape, rules), program)


def written(
    config: T5Config,
    params: Any,
    constraint: Any,
    tokens: jax.Array,
    num_beams: int,
    length: int,
    **settings: Any,
) -> BeamResult:
    """Identifiers that a student writes for queries int32 [B, Q]: beam_search with its settings."""
    apply = applied(config, params)
    encoded = apply(tokens, method="encode")
    return written_of(apply, encoded, tokens, constraint, num_beams, length, **settings)


def applied(config: T5Config, params: Any) -> Any:
    """`Transformer.apply` with parameters."""
    return functools.partial(
        Transformer(config).apply, {"params": _cast_kernels(params, config.dtype)}
    )


def written_of(
    apply: Any,
    encoded: jax.Array,
    tokens: jax.Array,
    constraint: Any,
    num_beams: int,
    length: int,
    *,
    reading: Reading | None = None,
    **settings: Any,
) -> BeamResult:
    """`written` of queries that are encoded [B, Q, D]; reading: and read, see `Transformer.read`;
    None: they are read here, where the decoder reads queries."""
    cross = apply(encoded, tokens, reading, method="cross")
    cache = apply(encoded, num_beams, length, method="init_cache")

    def step(last: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        return apply(last, cache, position, cross, tokens, method="step")

    def score(inputs: jax.Array, targets: jax.Array, cache: Any, position: jax.Array) -> jax.Array:
        x = apply(inputs, cache, position, cross, tokens, method="ahead")
        return score_by_token(functools.partial(apply, method="logits"), x, targets)

    return beam_search(
        step,
        constraint,
        cache,
        batch_size=tokens.shape[0],
        num_beams=num_beams,
        max_length=length,
        score_fn=score,
        **settings,
    )


def _cast_kernels(params: Any, dtype: str) -> Any:
    """Kernels in the dtype that they are multiplied in: cast once a batch, not once a step."""

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        return leaf.astype(dtype) if names[-1] == "kernel" and names[-2] != "logits_dense" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
