"""The tables of docs/scaling.md: every size of T5 on three topologies, before one is rented.

    python scripts/scaling_tables.py --plans=plans.json docs/scaling.md
    python scripts/scaling_tables.py --plans=plans.json --compile=base,xxl docs/scaling.md

For each size the meshes are ranked by formula; the best is shown, compiled where --compile names
the size and the topology is of TPUs. Plans that were compiled are kept in --plans and not compiled
again: a stopped run goes on. The tables replace what stands between the marks of the document.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from dgr_jax.capacity import chips, planning, programs, tables
from dgr_jax.capacity.chips import GIB, Topology
from dgr_jax.capacity.counting import TAKEN
from dgr_jax.capacity.planning import CapacityPlan
from dgr_jax.capacity.sizes import PreparedSizes, estimated_sizes
from dgr_jax.config import cli, gin_files
from dgr_jax.experiments.generative import Experiment
from dgr_jax.partitioning import Mesh

SIZES = ("small", "base", "large", "xl", "xxl")
TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4", "h100:8")
BEGIN, END = "<!-- scaling_tables: begin -->", "<!-- scaling_tables: end -->"
HEADER = ("size", "step", "DATA,MODEL,FSDP", "GiB a chip", "parameters", "temporaries", "TFLOPs",
          "GiB sent", "bound by", "ms at best", "queries/s at best", "counted")  # fmt: skip


def experiment(size: str) -> Experiment:
    """MS MARCO, whole, with a student of this size."""
    files = ["--gin_file=msmarco.gin", f"--gin_file=models/{size}.gin"]
    large = ["--gin.T5Config.remat=full", "--gin.T5Config.scan_layers=True"]
    batch = ["--gin.BATCH_SIZE=2048", "--gin.LIST_BATCH_SIZE=256", "--gin.SEARCH_BATCH_SIZE=64"]
    args, bindings = cli.parse(cli.parser("plan", ""), [*files, *large, *batch])
    return gin_files.load_experiment(args, bindings, keep=False)


class Kept:
    """Compiled plans in a file of JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plans = json.loads(path.read_text()) if path.exists() else {}

    def plan(
        self,
        size: str,
        step: str,
        topology: Topology,
        mesh: Mesh,
        sizes: PreparedSizes,
        compile: bool,
    ) -> CapacityPlan:
        """Compiled, if asked for now or before; else by formula."""
        name = f"{size} {step} {topology} {mesh.data},{mesh.model},{mesh.fsdp}"
        made = experiment(size)
        found = planning.plan(step, made, sizes, topology, mesh, compile=False)
        if compile and topology.is_tpu and name not in self.plans:
            compiled = planning.plan(step, made, sizes, topology, mesh)
            self.plans[name] = tables.as_dict(compiled)
            self.path.write_text(json.dumps(self.plans, indent=1))
        return tables.from_dict(found, self.plans[name]) if name in self.plans else found


def rows(topology: Topology, kept: Kept, compiled: list[str]) -> Iterator[tuple[str, ...]]:
    """A row for each size and step."""
    for size in SIZES:
        made = experiment(size)
        sizes = estimated_sizes(made, TAKEN)
        for step in programs.PROGRAMS:
            ranked = planning.sweep(step, made, sizes, topology)
            if not ranked:
                continue
            mesh = ranked[0][0]
            found = kept.plan(size, step, topology, mesh, sizes, size in compiled)
            yield (size, step, f"{mesh.data},{mesh.model},{mesh.fsdp}", *numbers(found))


def numbers(found: CapacityPlan) -> tuple[str, ...]:
    """Cells of one plan."""
    gib = lambda size: f"{size / GIB:.2f}"
    total = gib(found.total) if found.fits else f"{gib(found.total)} (does not fit)"
    least = max(found.times.values())
    return (
        total, gib(found.parts["parameters"]), gib(found.parts["temporaries"]),
        f"{found.flops / 1e12:.2f}", gib(sum(found.sent.values())), found.bound,
        f"{least * 1e3:.1f}", f"{found.queries_per_second:,.0f}", found.source,
    )  # fmt: skip


def table(topology: Topology, kept: Kept, compiled: list[str]) -> str:
    """A Markdown table."""
    chip = topology.chip
    lines = [
        f"### {topology}: {topology.size} chips of {chip.memory / GIB:.0f} GiB",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(topology, kept, compiled)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("--plans", type=Path, required=True, help="file of compiled plans")
    parser.add_argument("--compile", default="", help="sizes to compile, such as base,xxl")
    args = parser.parse_args()
    kept, compiled = Kept(args.plans), [s for s in args.compile.split(",") if s]
    made = [table(chips.topology(name), kept, compiled) for name in TOPOLOGIES]
    before, _, rest = args.document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n\n".join([BEGIN, *made, END])
    args.document.write_text(before + text + after, encoding="utf-8")


if __name__ == "__main__":
    main()
