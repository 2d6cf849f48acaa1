"""All that is measured of an accelerator, in minutes and in one table.

    python -m benchmarks.gpu --output=gpu.json
    python -m benchmarks.gpu --toy                 # the same parts at toy size, on a CPU too

Needs a checkout and what it runs by: no TensorFlow, no network, no data. Weights, identifiers and
queries are drawn. Parts, each a benchmark of this folder in a process of its own:

  step      what a trie adds to a step of beam search (benchmarks.constraint); with --static_path
            beside the public library
  queries   whole queries of T5-small and T5-base (benchmarks.decode)
  plan      planning by sets of pieces, 8.8M passages (benchmarks.set_plans)
  generate  a training step of T5-base, bfloat16, with its model FLOPs utilisation
  distill   a distillation step of the same (both benchmarks.train_step)

A part that fails is said and the next one runs; none starts once --minutes are over, and one that
runs then is stopped. The exit status is 1 unless every part came to its end.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Row = tuple[str, str]  # what was measured, and the figure with its unit


def steps(records: list[dict[str, Any]]) -> Iterator[Row]:
    for record in records:
        if "added_ms" in record or "ms_of_static" in record:
            where = f"{record['rows']:,} rows, V = {record['vocabulary']:,}, {record['batch']} x "
            ratio = record.get("ms_of_static")
            yield (
                f"{record['system']}, {where}{record['beams']} beams",
                f"{record['ms']:.3f} ms a step, {record.get('added_ms', 0):.3f} ms added"
                + (f", {ratio:.2f} of the public library's" if ratio else ""),
            )


def queries(report: dict[str, Any]) -> Iterator[Row]:
    for line in report["lines"]:
        for system, speed in line["queries_per_second"].items():
            yield (
                f"{system}, T5-{line['model']}, {line['beams']} beams",
                f"{speed['median']:,.0f} queries/s ({speed['low']:,.0f}-{speed['high']:,.0f})",
            )


def plans(report: dict[str, Any]) -> Iterator[Row]:
    settings = report["settings"]
    for line in report["lines"]:
        yield (
            f"{settings['passages']:,} passages of {settings['set_size']} pieces, batches of "
            f"{line['batch']}",
            f"{line['ms']:.3f} ms a query ({line['low']:.3f}-{line['high']:.3f})",
        )


def generation(report: dict[str, Any]) -> Iterator[Row]:
    ours, model = report["generation"]["ours"], report["settings"]["model"]
    yield (
        f"generation, T5-{model}, batch {report['settings']['batch']}",
        f"{ours['ms']['median']:.1f} ms a step, {ours['tokens_per_second']['median']:,.0f} "
        f"tokens/s, utilisation {ours['mfu']['median']:.1%}",
    )


def distillation(report: dict[str, Any]) -> Iterator[Row]:
    line, settings = report["distillation"], report["settings"]
    yield (
        f"distillation, T5-{settings['model']}, {settings['lists']} x {settings['passages']}",
        f"{line['shared']['ms']['median']:.1f} ms a step, {line['time']['median']:.2f} of the time "
        f"and {line['temporaries']:.2f} of the memory of encoding each pair",
    )


@dataclass(frozen=True)
class Part:
    """A benchmark of this folder: its flags, those at toy size, and the rows of its report."""

    module: str
    flags: str
    toy: str
    rows: Callable[[Any], Iterator[Row]]


STEP = "--systems=logits,unconstrained,trie{static} --batches=32x10"
TRAIN = "--systems=ours --optimizer=adafactor"
PARTS = {
    "step": Part(
        "constraint",
        STEP + " --sizes=1e6,1e7 --vocabularies=2048,32128 --rounds=11 --seconds=8",
        STEP + " --sizes=2000 --vocabularies=256 --rounds=3 --seconds=2",
        steps,
    ),
    "queries": Part(
        "decode",
        "--models=small,base --beams=10 --systems=ours,unconstrained --batch=32 --dtype=bfloat16",
        "--models=small --beams=4 --systems=ours,unconstrained --batch=2 --identifiers=2000 "
        "--codes=3 --codebook=32 --vocab_size=512 --query_length=8 --repeats=2",
        queries,
    ),
    "plan": Part(
        "set_plans",
        "--passages=8.8e6 --batches=1,32 --repeats=20",
        "--passages=5000 --set_size=8 --vocabulary=512 --planned=10 --block=1024 --batches=1,4",
        plans,
    ),
    "generate": Part(
        "train_step",
        TRAIN + " --parts=generation --model=base --dtype=bfloat16 --batch=256 --steps=20",
        TRAIN + " --parts=generation --model=small --batch=2 --steps=1 --vocab_size=512",
        generation,
    ),
    "distill": Part(
        "train_step",
        TRAIN + " --parts=distillation --model=base --dtype=bfloat16 --lists=64 --steps=10",
        TRAIN + " --parts=distillation --model=small --lists=2 --passages=3 --steps=1 "
        "--vocab_size=512",
        distillation,
    ),
}


def run(name: str, part: Part, args: argparse.Namespace, seconds: float) -> Any:
    """The report of a part, or what went wrong, in a line."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "report.json"
        flags = (part.toy if args.toy else part.flags).format(
            static=",static" if args.static_path else ""
        )
        command = [sys.executable, "-m", f"benchmarks.{part.module}", *flags.split()]
        if name == "step" and args.static_path:
            command.append(f"--static_path={args.static_path}")
        try:
            ended = subprocess.run(
                [*command, f"--output={output}"], timeout=seconds, stdout=sys.stderr
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s: --minutes were over"
        if ended.returncode:
            return f"failed with exit status {ended.returncode}"
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--static_path", default="", help="checkout of the public library")
    parser.add_argument("--toy", action="store_true", help="sizes that tell nothing of speed")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"unknown parts {unknown}; expected some of {list(PARTS)}")
    ends = time.monotonic() + 60 * args.minutes
    table = Table("part", "what", "measured", title="toy sizes" if args.toy else None)
    reports: dict[str, Any] = {}
    for name in args.parts:
        started = time.monotonic()
        left = ends - started
        said = run(name, PARTS[name], args, left) if left > 0 else "not started: --minutes are over"
        reports[name] = {"seconds": round(time.monotonic() - started, 1), "report": said}
        rows = [("", said)] if isinstance(said, str) else PARTS[name].rows(said)
        for what, figure in rows:
            table.add_row(name, what, figure)
        if args.output:
            args.output.write_text(json.dumps(reports, indent=1))
    Console(width=150).print(table)
    sys.exit(any(isinstance(part["report"], str) for part in reports.values()))


if __name__ == "__main__":
    main()
