"""A step on generation examples of several views: encodings shared, and one for each example.

    python -m benchmarks.examples_together --model_dir=DIR [--together=5]

DIR: an experiment with such identifiers (quickstart_dgr.gin) whose `prepare` stage is done. Both
steps are those of its stage `generate`, from parameters at random, on as many examples, and take
turns; queries lie side by side in rows of the encoder, as in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.config import cli, gin_files
from dgr_jax.models.t5 import Transformer
from dgr_jax.stages import student
from dgr_jax.stages.prepared import Prepared
from dgr_jax.training.packed_queries import PackedQueries
from dgr_jax.training.step import init_state, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--together", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    flags = cli.parse(cli.parser("train", ""), [f"--model_dir={args.model_dir}"])
    experiment = gin_files.load_experiment(*flags, keep=False)
    settings = experiment.generate
    batch_size = settings.batch_size // args.together * args.together
    model = Transformer(experiment.sized(Prepared.load(experiment.model_dir).vocabulary.size))
    mesh = partitioning.make_mesh(experiment.mesh)
    optimizer = settings.optimizer.transformation(settings.steps)
    print(device_name(jax.devices()[0]))
    sources, states = {}, {}
    for count in (1, args.together):
        grouped = dataclasses.replace(settings, batch_size=batch_size, examples_per_query=count)
        source = student.mixture(experiment, grouped)
        sources[count] = PackedQueries(
            source, shards=partitioning.batch_shards(mesh), microbatches=settings.microbatches
        )
        states[count] = init_state(model, optimizer, mesh, seed=0)
    step = make_train_step(settings.objective, model, optimizer, mesh, states[1])
    spent: dict[int, list] = {count: [] for count in sources}
    for number in range(args.steps + 1):
        for count, source in sources.items():
            batch = source.batch(number)
            start = np.array([time.perf_counter(), time.process_time()])
            states[count], metrics = step(states[count], batch)
            jax.block_until_ready((states[count], metrics))
            spent[count].append([time.perf_counter(), time.process_time()] - start)
    for count, found in spent.items():
        clock, processor = 1e3 * np.median(found[1:], axis=0)
        print(f"{count} an encoding: {clock:.0f} ms a step, {processor:.0f} of processor time")
    ratios = np.divide(spent[1][1:], spent[args.together][1:])
    for kind, ratio in zip(("by the clock", "by processor time"), ratios.T, strict=True):
        low, median, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        print(f"1 / {args.together} {kind}: {median:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
