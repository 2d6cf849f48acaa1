"""Where the time of a whole query goes: the parts of a search, each compiled and timed alone.

    taskset -c 0 python -m benchmarks.query_parts --models=small,base --kernels=float,int8

The search is that of benchmarks.decode: 16 queries of 32 tokens, 10 beams, a million identifiers of
8 codes and EOS, random weights. Of its nine tokens the first is one row a query, three are steps of
all beams, and five are scored in one pass. Processor milliseconds a batch, medians; the rest of the
whole search is what the trie, the selection of beams and the loop take.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode
from dgr_jax.analysis.speed import device_name
from dgr_jax.decoding import trie
from dgr_jax.decoding.beam_search import score_by_token
from dgr_jax.models import eight_bits
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import search_programs

BATCH, QUERY, BEAMS, CODES, VOCAB = 16, 32, 10, 8, 32_128
LENGTH, STEPS, AHEAD = CODES + 1, 3, 5


class WithoutLogits(Transformer):
    """A student whose steps end before the logits."""

    def logits(self, x: jax.Array) -> jax.Array:
        return x


def spent(function: Callable, *arguments: Any, rounds: int) -> tuple[float, Any]:
    """(processor milliseconds, result) of a function, compiled."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        start = time.process_time()
        result = jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.process_time() - start))
    return float(np.median(times)), result


def parts(config: T5Config, params: Any, index: Any, rounds: int) -> Iterator[tuple[str, float]]:
    """Names and processor milliseconds a batch, the whole last."""
    timed = functools.partial(spent, rounds=rounds)
    of = lambda params: search_programs.applied(config, params)
    bare = lambda params: functools.partial(WithoutLogits(config).apply, {"params": params})
    tokens = np.random.default_rng(2).integers(2, VOCAB, (BATCH, QUERY), np.int32)
    random = np.random.default_rng(3)
    ms, encoded = timed(lambda p, x: of(p)(x, method="encode"), params, tokens)
    yield "encoder", ms
    ms, cross = timed(lambda p, e, x: of(p)(e, x, None, method="cross"), params, encoded, tokens)
    yield "keys and values across", ms

    def step(params, last, cache, cross, tokens):
        """Three steps in a loop, as in a search, so that the cache stays where it is."""

        def body(position, carried):
            x, cache, last = carried
            x, cache = bare(params)(last, cache, position, cross, tokens, method="step")
            return x, cache, last + (x.sum() > 1e9)

        x = jnp.zeros((*last.shape, config.emb_dim), config.dtype)
        return jax.lax.fori_loop(1, 1 + STEPS, body, (x, cache, last))[0]

    for rows, times in ((1, 1 / STEPS), (BEAMS, 1)):
        cache = of(params)(encoded, rows, LENGTH, method="init_cache")
        last = jnp.full((BATCH, rows), VOCAB - 9, jnp.int32)
        ms, x = timed(step, params, last, cache, cross, tokens)
        name = "first step" if rows == 1 else f"{STEPS} steps"
        yield f"{name}: decoder", ms * times
        ms, logits = timed(lambda p, x: of(p)(x, method="logits"), params, x)
        yield f"{name}: logits", ms * times * STEPS
        ms, _ = timed(lambda x: jax.nn.logsumexp(x, -1), logits)
        yield f"{name}: normaliser", ms * times * STEPS
    parents = random.integers(0, BEAMS, (BATCH, BEAMS, 1, 1, 1), np.int32)
    reorder = lambda leaf, parents: jnp.take_along_axis(leaf, parents, axis=1, mode="clip")
    reordered = lambda cache, parents: jax.tree.map(lambda leaf: reorder(leaf, parents), cache)
    yield f"{STEPS} steps: reordering", STEPS * timed(reordered, cache, parents)[0]
    inputs = jnp.full((BATCH, BEAMS, AHEAD), VOCAB - 9, jnp.int32)
    ahead = lambda p, x, cache, cross, tokens: of(p)(
        x, cache, jnp.int32(4), cross, tokens, method="ahead"
    )
    ms, x = timed(ahead, params, inputs, cache, cross, tokens)
    yield "last five tokens: decoder", ms
    score = lambda p, x, targets: score_by_token(
        functools.partial(of(p), method="logits"), x, targets
    )
    yield "last five tokens: logits, normaliser", timed(score, params, x, inputs)[0]
    whole = lambda p, index, x: search_programs.written(config, p, index, x, BEAMS, LENGTH)
    yield "whole", timed(whole, params, index, tokens)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = lambda text: text.split(",")
    parser.add_argument("--models", type=names, default=["small"])
    parser.add_argument("--kernels", type=names, default=["float", "int8"])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(device_name(jax.devices()[0]), "jax", jax.__version__, flush=True)
    rows = decode.identifier_rows(1_000_000, CODES, 256, VOCAB)
    index = trie.build(rows, vocab_size=VOCAB).constraint()
    for model in arguments.models:
        config = T5Config(vocab_size=VOCAB, **decode.SIZES[model])
        drawn = jax.device_put(decode.random_params(config))
        for kernels in arguments.kernels:
            params, total = eight_bits.searched(drawn, kernels), 0.0
            for name, ms in parts(config, params, index, arguments.rounds):
                if name == "whole":
                    print(f"{model} {kernels:6s}{'the rest':40s}{ms - total:8.1f}")
                print(f"{model} {kernels:6s}{name:40s}{ms:8.1f}", flush=True)
                total += ms


if __name__ == "__main__":
    main()
