"""Where the time of an experiment goes, stage by stage, and what a question costs after it.

    python -m benchmarks.quickstart --gin_file=quickstart.gin --model_dir=DIR --cache=FOLDER
    python -m benchmarks.quickstart --model_dir=DIR --questions=5

The first prints seconds by the clock and of the processor for each stage that is not done yet, and
what of the clock went into tracing, lowering and compiling (or reading what is compiled). With an
empty --cache it is the first run on a machine, with a full one a later run. The second prints the
processor seconds, user and system, of whole `python -m dgr_jax.retrieve` commands: the first with
an empty cache of programs, and those after it.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dgr_jax import traced
from dgr_jax.config import cli, gin_files

_PARTS = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile": "/jax/core/compile/backend_compile_duration",
}


def stages(experiment: Any) -> None:
    """Runs the stages one by one and prints a row for each."""
    import jax

    from dgr_jax.stages import pipeline

    seconds: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: seconds.update({name: duration})
    )
    row("imports", time.perf_counter() - _START, time.process_time(), seconds)
    for stage in experiment.stages:
        seconds.clear()
        clock, processor = time.perf_counter(), time.process_time()
        pipeline.run(experiment, [stage])
        row(stage, time.perf_counter() - clock, time.process_time() - processor, seconds)


def row(name: str, clock: float, processor: float, seconds: Counter[str]) -> None:
    parts = " | ".join(f"{seconds[event]:.1f}" for event in _PARTS.values())
    sys.stdout.write(f"| {name} | {clock:.1f} | {processor:.1f} | {parts} |\n")


def questions(model_dir: str, count: int) -> None:
    """Asks in processes of their own, which share a new cache of programs."""
    ask = [sys.executable, "-m", "dgr_jax.retrieve", "--model_dir", model_dir]
    with tempfile.TemporaryDirectory() as cache:
        spent = []
        for _ in range(1 + count):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [*ask, "--query", "Why do bees dance?"]
            environment = os.environ | {"XDG_CACHE_HOME": cache}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    first, *later = spent
    middle = statistics.median(later)
    sys.stdout.write(
        f"first {first:.2f} s, later {middle:.2f} s ({min(later):.2f} to {max(later):.2f})\n"
    )


def main() -> None:
    parser = cli.parser("quickstart", __doc__ or "")
    parser.add_argument("--cache", help="folder of compiled and traced programs; default: none")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="ask N + 1 times")
    args, bindings = cli.parse(parser)
    if args.questions:
        questions(args.model_dir, args.questions)
        return
    if args.cache:
        Path(args.cache).mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = args.cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        traced.keep_in(Path(args.cache))
    cli.reuse_memory()
    sys.stdout.write(
        f"| stage | clock | processor | {' | '.join(_PARTS)} |\n|---|---|---|---|---|---|\n"
    )
    stages(gin_files.load_experiment(args, bindings))


if __name__ == "__main__":
    _START = time.perf_counter()
    main()
