"""Passages -> queries, by top-k sampling from a T5 that writes without a constraint.

Axis letters: B passages, Q passage length, S samples of a passage, T query length, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax import partitioning, ranges
from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.decoding.constraint import Unconstrained
from dgr_jax.decoding.sampling import sample
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.overlap import one_behind
from dgr_jax.special_tokens import EOS_ID, UNK_ID


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    number: how many samples to draw for a passage. top_k: every token is drawn from this many of
    the most likely ones (Fan et al. 2018). temperature: divides the log-probabilities before
    drawing. batch_size: how many passages are sampled together, rounded up to a multiple of the
    mesh's data shards.
    """

    number: int = 10
    top_k: int = 10
    temperature: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("number", "top_k", "batch_size")
        ranges.check(
            self,
            **dict.fromkeys(counts, ranges.at_least(1)),
            temperature=ranges.above(0),
            seed=ranges.SEED,
        )


@functools.lru_cache(maxsize=8)
def sample_fn(
    config: T5Config,
    settings: Sampling,
    length: int,
    text_size: int,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules = partitioning.RULES,
) -> Callable[[Any, jax.Array, jax.Array], BeamResult]:
    """The compiled sampler: (params, key, int32 [B, Q]) -> BeamResult with M = S, T = length.

    A passage is encoded once; its cross-attention keys and values are shared by all samples. Only
    text pieces, ids above UNK and below `text_size`, and EOS are written.
    mesh: each data shard draws for its own rows, with its own random numbers. Every device gets the
    whole result.
    """
    model = Transformer(config)
    ids = np.arange(config.vocab_size)
    written = (ids == EOS_ID) | ((ids > UNK_ID) & (ids < text_size))

    def draw(params: Any, key: jax.Array, tokens: jax.Array) -> BeamResult:
        apply = functools.partial(model.apply, {"params": params})
        encoded = apply(tokens, method="encode")
        cross = apply(encoded, tokens, method="cross")

        def step(last: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
            logits, cache = apply(last, cache, position, cross, tokens, method="step")
            return jnp.where(written, logits, -jnp.inf), cache

        return sample(
            step,
            Unconstrained(length, EOS_ID),
            apply(encoded, settings.number, length, method="init_cache"),
            key=jax.random.fold_in(key, jax.lax.axis_index(partitioning.BATCH_AXES)),
            batch_size=tokens.shape[0],
            num_samples=settings.number,
            temperature=settings.temperature,
            best_tokens=settings.top_k,
        )

    on_shards = partitioning.on_batch_shards(draw, mesh, whole=2, rules=rules)
    return jax.jit(on_shards, out_shardings=partitioning.replicated(mesh))


@dataclass(frozen=True)
class Sampler:
    """Parameters and settings ready to sample queries of token batches.

    params: placed on the mesh as `partitioning.abstract_params` says, by the same rules.
    length: number of tokens of a query, with EOS. text_size: that of the vocabulary.
    """

    config: T5Config
    params: Any
    settings: Sampling
    length: int
    text_size: int
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules = partitioning.RULES

    def sequences(self, blocks: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
        """The samples of each block of passages, int32 [n, S, T], padded with 0 after EOS; a sample
        that has not ended after T tokens is all 0.

        blocks: (index of the first passage, tokens int32 [n, Q]), with the same Q in all blocks.
        The samples depend on that index, the settings and the mesh, and not on earlier blocks.
        While the reader uses a batch, the device works on the next one, also of the next block.
        """
        held: list[np.ndarray] = []
        for tokens, count, last in one_behind(self._started(blocks)):
            held.append(np.asarray(tokens)[:count])
            if last:
                yield np.concatenate(held)
                held = []

    def _started(
        self, blocks: Iterable[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[jax.Array, int, bool]]:
        """(samples, perhaps still being computed; number of passages; whether the block ends) of
        every batch."""
        size = partitioning.shared_rows(self.settings.batch_size, self.mesh)
        compiled = replace(self.settings, seed=0)  # the seed comes with the key
        draw = sample_fn(self.config, compiled, self.length, self.text_size, self.mesh, self.rules)
        key = jax.random.key(self.settings.seed)
        for first, tokens in blocks:
            for start in range(0, len(tokens), size):
                part = tokens[start : start + size]
                placed = partitioning.place_padded(part, (size, tokens.shape[1]), self.mesh)
                drawn = draw(self.params, jax.random.fold_in(key, first + start), placed)
                yield drawn.tokens, len(part), start + size >= len(tokens)
