"""Memory of one distillation step on identifiers of several views, from shapes alone.

    python -m benchmarks.distill_memory --size=base --queries=8 --passages=6 \
      --identifiers=40 --tokens=10

Compiles the real step (loss, gradients, Adafactor) for this machine's device without running it,
and prints what the compiler lays out: parameters and optimizer, batch, temporaries. Nothing is
allocated. On another device temporaries differ in what is fused; parameters and logits do not.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp

from dgr_jax import partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.losses.ranking import distilled_ranknet
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.training.objectives import Distillation
from dgr_jax.training.optimizers import Adafactor
from dgr_jax.training.step import abstract_state, make_train_step

SIZES = {  # width, MLP width, heads, layers: T5 1.1
    "small": (512, 1024, 6, 8),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 16, 24),
}
GIB = 1 << 30


def shapes(b: int, p: int, k: int, t: int, q: int, examples: int) -> dict:
    """A distillation batch of several views: shapes and dtypes."""
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    targets = lambda n: {
        "decoder_input_tokens": ints(n, t),
        "decoder_target_tokens": ints(n, t),
        "decoder_loss_weights": floats(n, t),
    }
    lists = targets(b) | {
        "encoder_input_tokens": ints(b, 3, q),
        "identifier_tokens": ints(b, p, k, t),
        "identifier_weights": floats(b, p, k),
        "identifier_views": ints(b, p, k),
        "identifier_counts": ints(b, p, k),
        "spans": ints(b, p, 2 * k),
        "span_starts": ints(b, p, 2 * k),
        "corpus_tokens": floats(b, 1),
        "teacher_scores": floats(b, p),
        "passage_mask": jax.ShapeDtypeStruct((b, p), bool),
    }
    generation = targets(examples) | {"encoder_input_tokens": ints(examples, q)}
    return {"rank_list": lists, "generation": generation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--passages", type=int, default=6)
    parser.add_argument("--identifiers", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--query_length", type=int, default=32)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remat", default="none")
    args = parser.parse_args()
    width, mlp, heads, layers = SIZES[args.size]
    config = T5Config(
        vocab_size=32_128 + 128, emb_dim=width, num_heads=heads, head_dim=64, mlp_dim=mlp,
        num_encoder_layers=layers, num_decoder_layers=layers, dtype=args.dtype, remat=args.remat,
        scan_layers=True,
    )  # fmt: skip
    model = Transformer(config)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    optimizer = Adafactor().transformation(1000)
    state = abstract_state(model, optimizer, mesh)
    objective = Distillation(distilled_ranknet, generation_weight=500.0)
    step = make_train_step(objective, model, optimizer, mesh, state)
    batch = shapes(
        args.queries, args.passages, args.identifiers, args.tokens, args.query_length, args.examples
    )
    start = time.perf_counter()
    found = step.lower(state, batch).compile().memory_analysis()
    print(f"{device_name(jax.devices()[0])}; T5 {args.size}, {args.dtype}, remat {args.remat}")
    print(
        f"{args.queries} queries x {args.passages} passages x {args.identifiers} identifiers of "
        f"{args.tokens} tokens, {args.examples} generation examples; compiled in "
        f"{time.perf_counter() - start:.0f} s"
    )
    logits = args.queries * args.passages * args.identifiers * args.tokens * config.vocab_size * 4
    for name, size in (
        ("parameters, optimizer and batch", found.argument_size_in_bytes),
        ("temporaries", found.temp_size_in_bytes),
        ("one float32 array of all logits", logits),
    ):
        print(f"{name:32s} {size / GIB:7.2f} GiB")


if __name__ == "__main__":
    main()
