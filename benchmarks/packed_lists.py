"""A distillation step on identifiers of several lengths: side by side in rows, and each padded.

    python -m benchmarks.packed_lists --model_dir=DIR

DIR: an experiment with such identifiers, several views (dgr.gin, studies/dgr_cpu.gin) or docids
(IDENTIFIERS=@Title()), whose `teach` stage is done.
Both steps are the experiment's own, from parameters at random, on the same batches, and take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.config import cli, gin_files
from dgr_jax.models.t5 import Transformer
from dgr_jax.stages import distill
from dgr_jax.stages.prepared import Prepared
from dgr_jax.training.step import init_state, make_train_step


def padded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without rows: each identifier is decoded alone, padded to the longest."""
    lists = {k: v for k, v in batch["rank_list"].items() if not k.startswith("packed_")}
    return {**batch, "rank_list": lists}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    flags = cli.parse(cli.parser("train", ""), [f"--model_dir={args.model_dir}"])
    experiment = gin_files.load_experiment(*flags, keep=False)
    objective = dataclasses.replace(experiment.distill.objective, pack_docids=True)
    settings = dataclasses.replace(experiment.distill, objective=objective)
    experiment = dataclasses.replace(experiment, distill=settings)
    vocabulary = Prepared.load(experiment.model_dir).vocabulary
    model = Transformer(experiment.sized(vocabulary.size))
    mesh = partitioning.make_mesh(experiment.mesh)
    optimizer = settings.optimizer.transformation(settings.steps)
    source = distill.batches(experiment)
    steps, states = {}, {}
    seconds: dict[str, list] = {"side by side": [], "padded": []}
    print(device_name(jax.devices()[0]))
    for name in seconds:
        states[name] = init_state(model, optimizer, mesh, seed=0)
        step = make_train_step(settings.objective, model, optimizer, mesh, states[name])
        first = source.batch(0) if name != "padded" else padded(source.batch(0))
        steps[name] = step.lower(states[name], first).compile()
        held = steps[name].memory_analysis().temp_size_in_bytes / 2**30
        shapes = {k: v.shape for k, v in first["rank_list"].items() if "_tokens" in k}
        print(f"{name}: {held:.2f} GiB of temporaries; {shapes}")
    for number in range(args.steps + 1):
        whole = source.batch(number)
        for name, found in seconds.items():
            batch = whole if name != "padded" else padded(whole)
            start = np.array([time.perf_counter(), time.process_time()])
            states[name], metrics = steps[name](states[name], batch)
            jax.block_until_ready((states[name], metrics))
            found.append([time.perf_counter(), time.process_time()] - start)
    ratios = np.divide(seconds["padded"][1:], seconds["side by side"][1:]).T
    for kind, column in (("by the clock", 0), ("of processor time", 1)):
        for name, found in seconds.items():
            spent = np.array(found)[1:, column]
            low, median, high = 1e3 * np.quantile(spent, (0.25, 0.5, 0.75))
            print(f"{name}: {median:.0f} ms a step {kind} ({low:.0f} to {high:.0f})")
        low, median, high = np.quantile(ratios[column], (0.25, 0.5, 0.75))
        print(f"padded / side by side {kind}: {median:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
