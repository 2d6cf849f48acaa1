"""Planning by sets of pieces: milliseconds a query to find the best of all passages.

    python -m benchmarks.set_plans --passages=8.8e6 --batches=1,32 --output=set_plans.json

Sets and tables are drawn: the program is that of the plans Learned and OnePass after the student
has read the query. A passage is --set_size numbers of 16 bits; its score is the sum of the query's
table there. A batch of queries goes through the passages in blocks, with the best --planned so far.
A time is that of a batch whose table is on the device, until the best are on the host; median and,
in brackets, the middle half.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax.analysis.speed import device_name
from dgr_jax.retrieval.student_planned import PlanIndex, best_passages


def drawn(passages: int, set_size: int, block: int, vocabulary: int) -> PlanIndex:
    """Passages of drawn pieces, on the device; the last block is filled up."""
    blocks = -(-passages // block)
    shape = (blocks, block)
    make = functools.partial(jax.random.randint, jax.random.key(0), minval=1, maxval=vocabulary)
    order = jnp.arange(blocks * block, dtype=jnp.int32).reshape(shape)
    return PlanIndex(
        members=jax.jit(lambda: make((*shape, set_size), dtype=jnp.int32).astype(jnp.uint16))(),
        passages=order,
        rows=order,
        allowed=order < passages,
        identifiers=jnp.zeros((1, 1), jnp.int32),
        weight=jnp.float32(1),
    )


def measured(index: PlanIndex, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    search = jax.jit(lambda table, index: best_passages(table, index, args.planned))
    random, times = np.random.default_rng(1), []
    for _ in range(args.repeats + 1):  # the first one compiles
        table = jax.device_put(random.random((batch, args.vocabulary), np.float32))
        start = np.array([time.perf_counter(), time.process_time()])
        jax.device_get(search(table, index))
        times.append(np.array([time.perf_counter(), time.process_time()]) - start)
    low, middle, high = np.percentile(1e3 * np.array(times[1:])[:, 0] / batch, (25, 50, 75))
    cpu = 1e3 * float(np.median(np.array(times[1:])[:, 1])) / batch
    return {"batch": batch, "ms": middle, "low": low, "high": high, "cpu_ms": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = lambda text: int(float(text))
    parser.add_argument("--passages", type=count, default=8_800_000)
    parser.add_argument("--set_size", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32_128)
    parser.add_argument("--planned", type=int, default=1000)
    parser.add_argument("--block", type=count, default=1 << 16, help="passages of a block")
    parser.add_argument(
        "--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32]
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    device = device_name(jax.devices()[0])
    index = drawn(args.passages, args.set_size, args.block, args.vocabulary)
    print(f"{device}, jax {jax.__version__}; {args.passages:,} passages of {args.set_size} pieces")
    lines = []
    for batch in args.batches:
        lines.append(line := measured(index, batch, args))
        print(
            f"batches of {batch}: {line['ms']:.2f} ({line['low']:.2f}-{line['high']:.2f}) ms a "
            f"query, {line['cpu_ms']:.2f} ms of processor",
            flush=True,
        )
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        report = {"device": device, "settings": settings, "lines": lines}
        args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
