"""The whole experiment over corpora of growing size: seconds, memory and disk of every stage.

    python -m benchmarks.growth --passages=1000,10000,100000 --steps=50 --folder=grown \
        --max_queries=50000 --plot=docs/growth.png

The passages are drawn as in `benchmarks.prepare`, a training and a test question for every hundred
of them. The student is that of laptop.gin with 3 codes of 256. Every stage runs as a command of
its own, over what those before it left, so that its seconds (of the processor, of all threads; in
brackets the clock's), its largest resident set and what it adds on disk are its own. Each command
starts Python and imports: the row `commands`, measured by a stage that is finished already. What
one size has compiled, the next reads, as always.

Questions and examples are in proportion to the passages. Steps are not: `--steps` of generation
and a fifth of distillation run at each size, and the lines below the table say what one pass over
all examples would take. `--max_queries` bounds the queries of candidates and teach. Where it does,
both are run again with a few hundred, so that what a further query costs is known; exponents, plot
and the lines below the table count all queries. The last column is the exponent b of size^b between
the two largest sizes, less what a command needs anyway. The plot goes on to 8.8 million passages:
by a n + b n^2 where b is clearly above 1, by size^b otherwise, but never below linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import benchmarks.prepare as collections

STAGES = ("prepare", "start", "generate", "candidates", "teach", "distill", "evaluate")
BY_QUERY = ("candidates", "teach")  # stages that take queries in proportion, where they may
GROWING = ("prepare", "start", *BY_QUERY, "evaluate")  # stages without a number of steps
FEW = 100  # queries of each source, where what all stages of BY_QUERY need is measured
MSMARCO = 8_800_000
CLEARLY = 1.2  # exponents above it are no matter of chance

Measured = dict[str, dict[str, float]]


def command(args: argparse.Namespace, model: Path, stage: str, max_queries: int) -> list[str]:
    return [
        sys.executable, "-m", "dgr_jax.train", "--gin_file=laptop.gin",
        f"--data_dir={model.parent / 'collection'}", f"--model_dir={model}",
        f"--stages={stage}", f"--gin.GENERATE_STEPS={args.steps}",
        f"--gin.DISTILL_STEPS={max(1, args.steps // 5)}", "--gin.Experiment.control=False",
        "--gin.ResidualQuantization.num_codes=3", "--gin.ResidualQuantization.codebook_size=256",
        "--gin.NUM_BEAMS=10", f"--gin.Candidates.max_queries={max_queries}", *args.also,
    ]  # fmt: skip


def run(args: argparse.Namespace, model: Path, stage: str, max_queries: int) -> dict[str, float]:
    """A command, waited for; -> its seconds, peak memory and growth of the folder in GiB."""
    before, start = size(model), time.perf_counter()
    log = model.parent / f"{stage}.log"
    with log.open("w") as written:
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        child = subprocess.Popen(
            command(args, model, stage, max_queries),
            stdout=written,
            stderr=written,
            env=environment,
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{stage}: exit status {child.returncode}\n{log.read_text()[-3000:]}")
    return {
        "processor": used.ru_utime + used.ru_stime,
        "seconds": time.perf_counter() - start,
        "peak": used.ru_maxrss / 2**20,
        "disk": size(model) - before,
    }


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30


def measure(args: argparse.Namespace, passages: int) -> Measured:
    """Name of a stage -> what it took; stages that an earlier call has measured are not run."""
    if not args.folder:
        with tempfile.TemporaryDirectory() as name:
            return measured_in(Path(name), args, passages)
    return measured_in(Path(args.folder) / str(passages), args, passages)


def measured_in(folder: Path, args: argparse.Namespace, passages: int) -> Measured:
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "measured.json"
    measured = json.loads(notes.read_text()) if notes.exists() else {}
    if not (folder / "collection").exists():
        collections.write_collection(folder / "collection", passages, args.words)
    model = folder / "model"
    for stage in (*STAGES, "commands"):
        if stage not in measured:
            name = "evaluate" if stage == "commands" else stage
            measured[stage] = run(args, model, name, args.max_queries)
            print(f"  {passages:,} {stage}: {measured[stage]}", flush=True)
            notes.write_text(json.dumps(measured, indent=1))
    report = json.loads((model / "prepare" / "report.json").read_text())
    measured["prepare"]["examples"] = sum(report["examples"].values())
    measured["candidates"]["queries"] = queries(model)
    if queries(model) < measured["prepare"]["examples"]:
        for stage in BY_QUERY:
            if f"few {stage}" not in measured:
                measured[f"few {stage}"] = run_few(args, folder, stage)
                print(f"  {passages:,} few {stage}: {measured[f'few {stage}']}", flush=True)
                notes.write_text(json.dumps(measured, indent=1))
    return measured


def queries(model: Path) -> int:
    """Queries that were asked in candidates."""
    return len(json.loads((model / "candidates" / "qids.json").read_text()))


def run_few(args: argparse.Namespace, folder: Path, stage: str) -> dict[str, float]:
    """The same stage with few queries, on a copy of what it reads."""
    if not (folder / "few").exists():
        later = shutil.ignore_patterns("candidates", "teach", "distill", "evaluate", "runs")
        shutil.copytree(folder / "model", folder / "few", ignore=later)
    measured = run(args, folder / "few", stage, FEW)
    return measured | {"queries": queries(folder / "few")}


def own_seconds(measured: Measured, stage: str) -> float:
    """Processor seconds of a stage without those of any command, for all of its queries."""
    seconds = measured[stage]["processor"] - measured["commands"]["processor"]
    if few := measured.get(f"few {stage}"):
        asked = measured["candidates"]["queries"]
        query = (measured[stage]["processor"] - few["processor"]) / (asked - few["queries"])
        seconds += query * (measured["prepare"]["examples"] - asked)
    return seconds


def exponent(first: float, last: float, ratio: float) -> str:
    """b where last / first = ratio^b; nothing where either is too little to say."""
    if min(first, last) < 0.5:
        return ""
    return f"{math.log(last / first) / math.log(ratio):.2f}"


def beyond(sizes: list[int], seconds: list[float], wanted: int) -> float:
    """Seconds at a size above the last two that were measured."""
    (n, m), (first, last) = sizes[-2:], seconds[-2:]
    grows = math.log(last / first) / math.log(m / n)
    if grows > CLEARLY:
        square = (last / m - first / n) / (m - n)
        return (last / m - square * m) * wanted + square * wanted**2
    return last * (wanted / m) ** max(1.0, grows)


def show(args: argparse.Namespace, found: dict[int, Measured]) -> None:
    sizes = sorted(found)
    print("\n| stage | " + " | ".join(f"{n:,} passages" for n in sizes) + " | exponent |")
    print("|---|" + "---|" * (len(sizes) + 1))
    for stage in (*STAGES, "commands"):
        cells = [found[n][stage] for n in sizes]
        text = [
            f"{c['processor']:,.0f} ({c['seconds']:,.0f}) s, {c['peak']:.1f} GiB, "
            f"{c['disk'] * 1024:,.0f} MiB"
            for c in cells
        ]
        grows = ""
        if stage != "commands" and len(sizes) > 1:
            own = [own_seconds(found[n], stage) for n in sizes]
            grows = exponent(own[-2], own[-1], sizes[-1] / sizes[-2])
        print(f"| {stage} | " + " | ".join(text) + f" | {grows} |")
    for n in sizes:
        examples, asked = found[n]["prepare"]["examples"], found[n]["candidates"]["queries"]
        steps = examples / args.batch_size
        print(
            f"{n:,} passages: {examples:,} examples, one pass of them {steps:,.0f} steps, "
            f"{own_seconds(found[n], 'generate') / args.steps * steps / 60:,.1f} minutes of "
            f"processor; candidates and teach: {asked:,} queries"
        )
    if len(sizes) > 1:
        for stage in GROWING:
            seconds = beyond(sizes, [own_seconds(found[n], stage) for n in sizes], MSMARCO)
            print(f"{MSMARCO:,} passages: {stage} {seconds / 3600:,.1f} hours of processor")


def draw(path: str, found: dict[int, Measured]) -> None:
    """Seconds of the stages that grow with the corpus, the lines beyond, and everyone's memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dgr_jax.plots import COLOURS, MARKERS

    sizes = sorted(found)
    figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(1, 2)
    further = [sizes[-1] * (MSMARCO / sizes[-1]) ** (place / 20) for place in range(21)]
    for stage, colour, marker in zip(STAGES, COLOURS, MARKERS, strict=True):
        look = {"color": colour, "marker": marker, "markersize": 5}
        memory.plot(sizes, [found[n][stage]["peak"] for n in sizes], label=stage, **look)
        if stage in GROWING:
            seconds = [own_seconds(found[n], stage) for n in sizes]
            lines = [seconds[-1], *(beyond(sizes, seconds, n) for n in further[1:])]
            times.plot(sizes, seconds, **look)
            times.plot(further, lines, color=colour, linestyle=":")
    for axes, label in ((times, "processor seconds, all queries"), (memory, "peak memory, GiB")):
        axes.set_xscale("log")
        axes.set_xlabel("passages")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    times.set_yscale("log")
    times.margins(y=0.1)
    for hours, name in ((1, "an hour"), (24, "a day"), (24 * 30, "a month")):
        times.axhline(hours * 3600, color="#999999", linewidth=0.7)
        times.annotate(name, (sizes[0], hours * 3600), fontsize=8, color="#555555", va="bottom")
    memory.set_ylim(0)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", default="1000,10000,100000")
    parser.add_argument("--steps", type=int, default=200, help="of generation, at each size")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="of laptop.gin; for the last lines"
    )
    parser.add_argument("--words", type=int, default=56, help="of a passage")
    parser.add_argument(
        "--max_queries", type=int, default=0, help="of each source in candidates; 0: all"
    )
    parser.add_argument("--also", action="append", default=[], help="further --gin.NAME=VALUE")
    parser.add_argument(
        "--folder",
        default="",
        help="where each size is kept, and gone on with by a later call; temporary by default",
    )
    parser.add_argument("--plot", default="", help="a PNG of seconds and memory")
    parser.add_argument("--output", help="JSON of all that was measured")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    found: dict[int, Measured] = {}
    for passages in sorted(int(n) for n in args.passages.split(",")):
        found[passages] = measure(args, passages)
        if args.output:
            Path(args.output).write_text(json.dumps(found, indent=1))
    show(args, found)
    if args.plot:
        draw(args.plot, found)


if __name__ == "__main__":
    main()
