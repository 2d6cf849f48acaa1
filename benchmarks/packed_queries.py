"""Training steps with the queries of a batch side by side in rows of the encoder, and each padded.

    python -m benchmarks.packed_queries --model_dir=DIR [--stage=generate]

DIR: an experiment that has the stages before. Both steps are the experiment's own, from parameters
at random, on the same batches, and take turns.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.config import cli, gin_files
from dgr_jax.models.t5 import Transformer
from dgr_jax.stages.prepared import Prepared
from dgr_jax.training.packed_queries import PackedQueries
from dgr_jax.training.step import init_state, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--stage", choices=("generate", "distill"), default="generate")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    flags = cli.parse(cli.parser("train", ""), [f"--model_dir={args.model_dir}"])
    experiment = gin_files.load_experiment(*flags, keep=False)
    settings = getattr(experiment, args.stage)
    vocabulary = Prepared.load(experiment.model_dir).vocabulary
    model = Transformer(experiment.sized(vocabulary.size))
    mesh = partitioning.make_mesh(experiment.mesh)
    optimizer = settings.optimizer.transformation(settings.steps)
    padded = experiment.stages[args.stage].batches(experiment)
    shards = partitioning.batch_shards(mesh)
    packed = PackedQueries(padded, shards=shards, microbatches=settings.microbatches)
    sources = {"padded": padded, "side by side": packed}
    print(device_name(jax.devices()[0]))
    step = make_train_step(
        settings.objective, model, optimizer, mesh, init_state(model, optimizer, mesh, seed=0)
    )
    states = {name: init_state(model, optimizer, mesh, seed=0) for name in sources}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for number in range(args.steps + 1):
        for name, source in sources.items():
            batch = source.batch(number)
            begun = time.perf_counter(), time.process_time()
            states[name], metrics = step(states[name], batch)
            jax.block_until_ready(metrics)
            ended = time.perf_counter(), time.process_time()
            seconds[name].append((ended[0] - begun[0], ended[1] - begun[1]))
    medians = {name: np.median(of[1:], axis=0) for name, of in seconds.items()}
    for name, (clock, processor) in medians.items():
        compiled = seconds[name][0][1]
        print(
            f"{name}: {1e3 * clock:.1f} ms a step, {1e3 * processor:.1f} ms of processor time; the "
            f"first step {compiled:.1f} s"
        )
    clock, processor = medians["padded"] / medians["side by side"]
    print(f"side by side: {clock:.2f} times as fast, {processor:.2f} by processor time")


if __name__ == "__main__":
    main()
