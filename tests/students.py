"""Small students with random parameters, ready to decode."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dgr_jax import partitioning
from dgr_jax.decoding import trie, trie_build
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.generative import Decoder, Search

VOCAB = 96
EOS = 1
CONFIG = T5Config(
    vocab_size=VOCAB,
    emb_dim=16,
    num_heads=4,
    head_dim=7,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def codes(count: int, length: int = 3, *, first: int = 64, seed: int = 0) -> np.ndarray:
    """Fixed-length identifiers of codes `first` to VOCAB, some of them repeated; int32."""
    return np.random.default_rng(seed).integers(first, VOCAB, (count, length)).astype(np.int32)


def texts(count: int, longest: int = 4, *, seed: int = 0) -> np.ndarray:
    """Identifiers of 1 to `longest` text tokens and EOS, padded with 0; int32."""
    random = np.random.default_rng(seed)
    rows = random.integers(3, 64, (count, longest + 1)).astype(np.int32)
    ends = random.integers(1, longest + 1, (count, 1))
    at = np.arange(longest + 1)
    return np.where(at < ends, rows, np.where(at == ends, EOS, 0)).astype(np.int32)


def queries(count: int, length: int = 8, *, seed: int = 0) -> np.ndarray:
    """Encoder inputs of 2 to `length` tokens, EOS counted, padded with 0; int32 [count, length]."""
    return texts(count, length - 1, seed=seed + 100)


@functools.cache
def parameters(config: T5Config) -> Any:
    """Random parameters on the host, of a size that makes the logits differ."""
    boxed = jax.eval_shape(
        lambda: partitioning.boxed_params(Transformer(config), jax.random.key(0))
    )
    random = np.random.default_rng(1)

    def draw(leaf: Any) -> np.ndarray:
        scale = 1.0 if leaf.ndim < 2 else 1.5 / np.sqrt(min(leaf.shape))
        return (scale * random.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, nn.unbox(boxed))


def decoder(
    rows: np.ndarray,
    search: Search,
    *,
    mesh: partitioning.Mesh = partitioning.Mesh(data=1),
    devices: int = 1,
    config: T5Config = CONFIG,
    narrow: int = 1,
    passages: np.ndarray | None = None,
) -> Decoder:
    """A student whose passage i has identifier rows[i].

    narrow: nodes of more children are wide; of 1, an index has few branches to compile.
    passages: the passage of each row, where it is not i.
    """
    placed = partitioning.make_mesh(mesh, jax.devices()[:devices])
    table = IdentifierTable.from_rows(rows, view="test", passages=passages)
    before = trie_build.GATHERS, trie_build.WIDEST_GATHER
    trie_build.GATHERS, trie_build.WIDEST_GATHER = (narrow,), 2 * narrow
    try:
        index = trie.build(table.tokens, table.lengths, vocab_size=config.vocab_size)
    finally:
        trie_build.GATHERS, trie_build.WIDEST_GATHER = before
    abstract = partitioning.abstract_params(Transformer(config), placed, mesh.rules)
    params = jax.tree.map(
        lambda x, to: jax.device_put(x, to.sharding), parameters(config), abstract
    )
    return Decoder(config, params, index, table, search, placed, rules=mesh.rules)
